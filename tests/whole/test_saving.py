"""Files: what is read back trains on as the original does."""

import keras
import numpy as np
import pytest
from support import assert_same_variables
from support import effective
from support import recomposing_fit
from support import regression_data
from support import state_arrays
from support import statistics
from support import to_numpy
from support import two_layer_model

import keras_srlora
from keras_srlora.layers.record import Record


def trained_model(rng):
    model = two_layer_model(rng, rank=4)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    data = regression_data(rng)
    recomposing_fit(model, data, interval=5)
    return model, data


def same_to_the_bit(first, second):
    assert_same_variables(first.variables, second.variables)
    assert_same_variables(first.optimizer.variables, second.optimizer.variables)
    states = [state_arrays(m.get_layer("hidden")) for m in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert {"left", "sensitivity.average_a", "events", "fused_b"} <= states[
        0
    ].keys()
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name], states[1][name], name)


def copied_state(model):
    return state_arrays(model.get_layer("hidden"))


def by_keras_file(model, folder):
    path = str(folder / "model.keras")
    model.save(path)
    return keras.saving.load_model(path)


def by_weights_file(model, folder):
    path = str(folder / "model.weights.h5")
    model.save_weights(path)
    fresh = two_layer_model(np.random.default_rng(9), rank=4)
    fresh.compile(keras.optimizers.Adam(0.01), "mse")
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(path)
    return fresh


@pytest.mark.parametrize("route", [by_keras_file, by_weights_file])
def test_a_file_holds_everything(route, tmp_path, rng):
    model, data = trained_model(rng)
    loaded = route(model, tmp_path)
    assert type(loaded.optimizer).__name__ == "Adam"
    same_to_the_bit(model, loaded)
    # And trains on as the original, over further recompositions.
    callbacks = [recomposing_fit(m, data) for m in (model, loaded)]
    assert callbacks[0].events and (
        callbacks[0].to_dict() == callbacks[1].to_dict()
    )
    same_to_the_bit(model, loaded)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_a_file_of_the_middle_of_a_run_is_a_stock_one(suffix, tmp_path, rng):
    """The wrapped optimizer is saved as the stock one, without a warning."""
    model = two_layer_model(rng, rank=4)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    path = str(tmp_path / f"model{suffix}")
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, save_freq=7, save_weights_only=suffix != ".keras"
    )
    callback = keras_srlora.RecompositionCallback(interval=5)
    data = regression_data(rng)
    model.fit(
        *data,
        batch_size=8,
        verbose=0,
        shuffle=False,
        callbacks=[callback, checkpoint],
    )
    if suffix == ".keras":
        loaded = keras.saving.load_model(path)
    else:
        loaded = two_layer_model(np.random.default_rng(9), rank=4)
        loaded.compile(keras.optimizers.Adam(0.01), "mse")
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(path)
    assert type(loaded.optimizer).__name__ == "Adam"
    assert int(to_numpy(loaded.optimizer.iterations)) == 7
    layer = loaded.get_layer("hidden")
    assert (
        len(layer.record.events) == 2 and statistics(layer).average_a.max() > 0
    )
    moments = [
        v for v in loaded.optimizer.variables if v.path.endswith("momentum")
    ]
    assert moments and all(np.abs(to_numpy(v)).max() > 0 for v in moments)


def test_a_checkpoint_loaded_during_fit_reaches_the_statistics(tmp_path, rng):
    model, data = trained_model(rng)
    path = str(tmp_path / "model.weights.h5")
    model.save_weights(path)
    held = copied_state(model)

    class Load(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.load_weights(path)
            self.seen = copied_state(self.model)

    fresh = two_layer_model(np.random.default_rng(9), rank=4)
    fresh.compile(keras.optimizers.Adam(0.01), "mse")
    load = Load()
    callback = keras_srlora.RecompositionCallback(interval=5)
    with pytest.warns(UserWarning, match="saved after step 8: pass"):
        fresh.fit(
            *data,
            batch_size=8,
            verbose=0,
            shuffle=False,
            callbacks=[callback, load],
        )
    for name in held:
        np.testing.assert_array_equal(held[name], load.seen[name], name)
    recomposing_fit(model, data)
    np.testing.assert_array_equal(
        effective(fresh.get_layer("hidden")),
        effective(model.get_layer("hidden")),
    )


def test_backup_and_restore_goes_on_at_the_epoch(tmp_path, rng):
    """The stock callback, and an exception in the second epoch."""
    data = regression_data(rng)

    def start():
        keras.utils.set_random_seed(3)
        model = two_layer_model(rng, rank=4)
        model.compile(keras.optimizers.Adam(0.01), "mse")
        return model

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if self._model.stop_here and batch == 3:
                raise KeyboardInterrupt

        def on_epoch_begin(self, epoch, logs=None):
            self._model.stop_here = epoch == 1

    def callbacks(stop=False):
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        callback = keras_srlora.RecompositionCallback(interval=5)
        return [callback, backup] + ([Stop()] if stop else [])

    arguments = dict(batch_size=8, epochs=3, verbose=0, shuffle=False)
    whole = start()
    whole.fit(*data, callbacks=callbacks()[:1], **arguments)
    with pytest.raises(KeyboardInterrupt):
        start().fit(*data, callbacks=callbacks(stop=True), **arguments)
    resumed = start()
    resumed.fit(*data, callbacks=callbacks(), **arguments)
    same_to_the_bit(whole, resumed)


def test_a_layer_that_was_never_initialised_is_saved_as_such(tmp_path, rng):
    loaded = by_keras_file(two_layer_model(rng), tmp_path)
    assert not loaded.get_layer("hidden").initialized
    assert state_arrays(loaded.get_layer("hidden")) == {}


def test_state_round_trip():
    assert Record.from_arrays({}).directions is None


def test_serialized_wrapper_is_the_stock_optimizer(rng):
    model = two_layer_model(rng)
    wrapper = keras_srlora.SensitivityOptimizer(
        keras.optimizers.AdamW(0.003, weight_decay=0.1), model
    )
    config = keras.saving.serialize_keras_object(wrapper)
    loaded = keras.saving.deserialize_keras_object(config)
    assert type(loaded).__name__ == "AdamW" and loaded.weight_decay == 0.1


def converted_mlp():
    inputs = keras.Input((12,))
    x = keras.layers.LayerNormalization(name="norm")(inputs)
    x = keras.layers.Dense(16, activation="tanh", name="hidden")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_srlora.enable_srlora(model, rank=4)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def test_a_converted_model_is_read_back_as_frozen_as_it_was(tmp_path, rng):
    model, data = converted_mlp(), regression_data(rng)
    recomposing_fit(model, data)
    loaded = by_keras_file(model, tmp_path)
    names = [v.path for v in model.trainable_variables]
    assert [v.path for v in loaded.trainable_variables] == names
    assert "hidden/bias" not in names and "norm/gamma" not in names
    same_to_the_bit(model, loaded)
    for m in (model, loaded):
        recomposing_fit(m, data)
    same_to_the_bit(model, loaded)


def test_a_merged_model_is_saved_read_and_trained_on(tmp_path, rng):
    model, data = converted_mlp(), regression_data(rng)
    recomposing_fit(model, data)
    keras_srlora.merge_srlora(model)
    loaded = by_keras_file(model, tmp_path)
    np.testing.assert_array_equal(
        loaded.predict(data[0], verbose=0), model.predict(data[0], verbose=0)
    )
    before = to_numpy(loaded.get_layer("hidden").kernel)
    loaded.fit(*data, verbose=0)
    assert (
        np.abs(to_numpy(loaded.get_layer("hidden").kernel) - before).max() > 0
    )
