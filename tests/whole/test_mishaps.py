"""What goes wrong in the middle of a run, or of a write, harms nothing."""

import contextlib
import resource

import keras
import numpy as np
import pytest
from support import assert_same_variables
from support import converted_model
from support import effective
from support import frozen_kernel
from support import regression_data
from support import state_arrays
from support import to_numpy

import keras_srlora
from keras_srlora import RecompositionCallback


def compiled(optimizer="adam"):
    return converted_model(optimizer)


def fit(model, *callbacks, data=None, epochs=3, **kwargs):
    """24 steps."""
    return model.fit(
        *(data or regression_data(np.random.default_rng(0))),
        batch_size=8,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=list(callbacks),
        **kwargs,
    )


def states(model):
    return {n: state_arrays(model.get_layer(n)) for n in ("first", "second")}


def kernels(model):
    return [frozen_kernel(model.get_layer(n)) for n in ("first", "second")]


class At(keras.callbacks.Callback):
    """Does something to the model before a batch, once."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action, self.seen = step, action, 0

    def on_train_batch_begin(self, batch, logs=None):
        if self.seen == self.step:
            self.action(self.model)
        self.seen += 1


# Numbers.


def assert_only_factors_are_lost(data, optimizer="adam"):
    """Recomposed at step 4; what is bad from step 6 on touches nothing else."""
    model, pretrained = compiled(optimizer), compiled()
    held = {}

    def keep(model):
        held.update(kernels=kernels(model), states=states(model))

    callback = RecompositionCallback(interval=4)
    with pytest.warns(UserWarning, match="factors or its scores") as caught:
        fit(model, callback, At(5, keep), data=data, epochs=2)
    said = [str(warning.message) for warning in caught]
    for name in ("first", "second"):
        assert any(f"Layer '{name}'" in message for message in said)
    assert {event.step for event in callback.events} == {4}
    assert_same_variables(held["kernels"], kernels(model))
    for name, old in held["states"].items():
        new = states(model)[name]
        for key in (
            "fused_a",
            "fused_b",
            "anchors",
            "visits",
            "events",
            "left",
        ):
            np.testing.assert_array_equal(old[key], new[key], key)
    # The pretrained model is still there.
    with keras_srlora.adapter_disabled(model):
        for name in ("first", "second"):
            np.testing.assert_allclose(
                effective(model.get_layer(name)),
                effective(pretrained.get_layer(name)),
                atol=1e-6,
            )


def test_nan_in_the_data():
    x, y = regression_data(np.random.default_rng(0))
    x[40:48] = np.nan  # batch 5
    assert_only_factors_are_lost((x, y))


def test_a_learning_rate_that_overflows():
    class Rate(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            early = keras.ops.cast(step, "float32") < 5.0
            return keras.ops.where(early, 0.01, 1e38)

    data = regression_data(np.random.default_rng(0))
    # SGD does not normalise: weights overflow with the second such step.
    assert_only_factors_are_lost(data, keras.optimizers.SGD(Rate()))


# Other callbacks.


class Mishap(Exception):
    pass


def test_an_exception_in_another_callback(tmp_path):
    """The state is that of the last step; it is saved, and trains on."""

    def fail(model):
        raise Mishap

    model, other = compiled(), compiled()
    callback = RecompositionCallback(interval=4)
    with pytest.raises(Mishap):
        fit(model, At(16, fail), callback)
    fit(other, RecompositionCallback(interval=4), epochs=2)
    assert_same_variables(model.variables, other.variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for m in (model, other, loaded):
        fit(m, RecompositionCallback(interval=4), initial_epoch=2)
    for m in (model, loaded):
        assert_same_variables(m.variables, other.variables)
        assert_same_variables(m.optimizer.variables, other.optimizer.variables)


def test_a_layer_frozen_during_the_run_is_noticed():
    def freeze(model):
        model.get_layer("first").trainable = False

    if keras.backend.backend() == "jax":
        pytest.skip("Keras itself fails in the next step")
    model, callback = compiled(), RecompositionCallback(interval=4)
    flags = [v.trainable for v in model.variables]
    x, y = regression_data(np.random.default_rng(0), samples=128)
    with pytest.raises(RuntimeError, match="frozen.*'first'"):
        fit(model, callback, At(6, freeze), data=(x, y))
    # It is as after the steps that were done, and it goes on.
    assert {event.step for event in callback.events} == {4}
    assert [v.trainable for v in model.variables] == flags
    fit(model, callback)
    assert {event.step for event in callback.events} == {4, 8, 12, 16, 20}


def test_layers_merged_during_the_run_are_noticed():
    def merge(model):
        keras_srlora.merge_srlora(model)

    model = compiled()
    with pytest.raises(RuntimeError, match="optimizer of the model was repl"):
        fit(model, At(6, merge), RecompositionCallback(interval=4))
    assert type(model.get_layer("first")) is keras.layers.Dense


def test_a_layer_removed_during_the_run_is_noticed():
    def remove(model):
        layer = model.get_layer("second")
        model._layers.remove(layer)  # what `Sequential.pop` does

    if keras.backend.backend() == "jax":
        pytest.skip("Keras itself fails on writing its state back")
    model, callback = compiled(), RecompositionCallback(interval=4)
    with pytest.raises(RuntimeError, match="removed.*'second'"):
        fit(model, callback, At(6, remove))
    assert {event.step for event in callback.events} == {4}


def test_a_callback_on_two_models_at_once():
    callback, inner = RecompositionCallback(interval=4), compiled()
    held = [to_numpy(v) for v in inner.variables]
    optimizer = inner.optimizer

    def start_another(model):
        with pytest.raises(ValueError, match="Make another one"):
            fit(inner, callback)

    model, alone = compiled(), compiled()
    fit(model, callback, At(5, start_another))
    fit(alone, RecompositionCallback(interval=4))
    # Neither run took any harm.
    assert inner.optimizer is optimizer
    assert_same_variables(held, inner.variables)
    assert_same_variables(model.variables, alone.variables)
    # Afterwards it may follow another model.
    fit(inner, callback)


def test_restored_best_weights_take_their_record_with_them():
    """`EarlyStopping` brings back weights of an earlier epoch."""
    model, callback = compiled(), RecompositionCallback(interval=4)

    class Worse(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["val"] = float(epoch)

    best = keras.callbacks.EarlyStopping(
        "val", mode="min", patience=2, restore_best_weights=True
    )
    fit(model, callback, Worse(), best)
    whole = states(model)
    # 8 steps are those of the best epoch: a recomposition at 4.
    with pytest.warns(UserWarning, match="weights of an earlier step"):
        with keras_srlora.adapter_disabled(model):
            for name in ("first", "second"):
                np.testing.assert_allclose(
                    effective(model.get_layer(name)),
                    effective(compiled().get_layer(name)),
                    atol=1e-6,
                )
    other = compiled()
    fit(other, RecompositionCallback(interval=4), epochs=1)
    for name, expected in states(other).items():
        state = states(model)[name]
        assert len(whole[name]["events"]) > len(state["events"]) == 1
        for key in ("visits", "anchors", "slot_direction"):
            np.testing.assert_array_equal(state[key], expected[key], key)
        for key in ("fused_a", "fused_b", "events"):
            np.testing.assert_array_equal(state[key], expected[key], key)
    fit(model, RecompositionCallback(interval=4), epochs=1)


# Backups that are not those of an epoch's end.


def backed_up(tmp_path, step, **kwargs):
    """A run that an exception ended before a step; and what resumes it."""

    def fail(model):
        raise Mishap

    def backup():
        return keras.callbacks.BackupAndRestore(str(tmp_path / "b"), **kwargs)

    model = compiled()
    with pytest.raises(Mishap):
        fit(model, backup(), At(step, fail), RecompositionCallback(interval=4))
    return backup()


def test_a_backup_of_the_middle_of_an_epoch_is_told(tmp_path):
    backup = backed_up(tmp_path, step=14, save_freq=3)
    with pytest.warns(UserWarning, match="after step 12: in the middle of an"):
        fit(compiled(), backup, RecompositionCallback(interval=4))


def test_a_backup_behind_the_callback_is_told(tmp_path):
    """Weights of a later epoch than the number: too late to mend."""
    backup = backed_up(tmp_path, step=17)
    path = tmp_path / "b" / "training_metadata.json"
    path.write_text(path.read_text().replace('"epoch": 2', '"epoch": 1'))
    callback = RecompositionCallback(interval=4)
    with pytest.warns(UserWarning, match="initial_epoch=2.*behind it"):
        fit(compiled(), callback, backup)


# Loss scaling.


def test_a_file_written_under_loss_scaling_is_a_stock_one(tmp_path):
    if keras.backend.backend() == "jax":
        pytest.skip("JAX has no float16 product on a CPU")
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(keras.optimizers.Adam(0.01))
        path = str(tmp_path / "model.keras")
        checkpoint = keras.callbacks.ModelCheckpoint(path, save_freq=6)
        fit(model, RecompositionCallback(interval=4), checkpoint, epochs=1)
        loaded = keras.saving.load_model(path)
    finally:
        keras.config.set_dtype_policy(policy)
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    assert "save_own_variables" not in vars(model.optimizer)
    assert [v.shape for v in loaded.optimizer.variables] == [
        v.shape for v in model.optimizer.variables
    ]
    moments = [
        v for v in loaded.optimizer.variables if v.path.endswith("momentum")
    ]
    assert moments and all(np.abs(to_numpy(v)).max() > 0 for v in moments)


# A disk that is full.


@contextlib.contextmanager
def room_for(size):
    """The system refuses to write files of more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_adapter(tmp_path, tmp_path_factory):
    pytest.importorskip("safetensors")
    path = tmp_path / "adapter.safetensors"
    model = compiled()
    keras_srlora.save_adapter(model, path, include_trainable=True)
    held, files = path.read_bytes(), list(tmp_path.iterdir())
    fit(model, RecompositionCallback(interval=4))
    # JAX then has compiled what it needs, and writes nothing of its own.
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "adapter.safetensors"
    keras_srlora.save_adapter(model, elsewhere, include_trainable=True)
    with room_for(1000), pytest.raises(OSError):
        keras_srlora.save_adapter(model, path, include_trainable=True)
    assert path.read_bytes() == held and list(tmp_path.iterdir()) == files
    fresh = compiled()
    keras_srlora.load_adapter(fresh, path)
