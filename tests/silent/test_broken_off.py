"""What breaks off in its middle leaves each layer whole."""

import contextlib
import os
import signal

import keras
import numpy as np
import pytest
from pieces import NAMES
from pieces import assert_close
from pieces import assert_unchanged
from pieces import batch
from pieces import called
from pieces import convert
from pieces import differ
from pieces import encoder
from pieces import fit
from pieces import nudge
from pieces import predicted
from pieces import state_of
from pieces import tuned_encoder

import keras_srlora
from keras_srlora.layers import frozen
from keras_srlora.layers import pairs

# Ctrl-C, or a device that runs out of memory.
ERRORS = [(1, KeyboardInterrupt), (2, MemoryError)]


def before_call(monkeypatch, owner, name, at, action):
    """Runs an action before one call of a function; returns all calls."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            action()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def break_off(monkeypatch, owner, name, error, at=2):
    """Lets a function raise in one of its calls, and no more after that."""

    def fail():
        raise error("in the middle")

    before_call(monkeypatch, owner, name, at, fail)


def recomposed(rng, recipe="paper", seed=7):
    """Converted and trained, so that pairs were fused."""
    model = encoder(seed)
    convert(model, recipe)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    callback = keras_srlora.RecompositionCallback(interval=3)
    fit(model, (batch(rng, 32), batch(rng, 32)), [callback], epochs=4)
    assert callback.events
    return model


@pytest.mark.parametrize("at, error", ERRORS)
def test_an_update_is_merged_once_whatever_breaks_off(
    at, error, rng, monkeypatch
):
    model, x = recomposed(rng), batch(rng)
    expected = called(model, x)
    break_off(monkeypatch, frozen.FloatKernel, "merge", error, at)
    with pytest.raises(error):
        keras_srlora.merge_srlora(model)
    assert_close(called(model, x), expected)
    assert_close(predicted(model, x), expected)
    keras_srlora.merge_srlora(model)
    assert_close(predicted(model, x), expected)
    assert all(type(y) is keras.layers.Dense for y in model.layers[1:])


@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_model_is_unloaded_once_whatever_breaks_off(
    at, recipe, rng, monkeypatch
):
    model, x = recomposed(rng, recipe), batch(rng)
    break_off(monkeypatch, frozen.FloatKernel, "unload", KeyboardInterrupt, at)
    with pytest.raises(KeyboardInterrupt):
        keras_srlora.unload_srlora(model)
    # Without a warning, which would be an error here.
    keras_srlora.unload_srlora(model)
    assert_close(predicted(model, x), called(encoder(), x))


@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
def test_a_conversion_that_breaks_off_can_go_on(recipe, rng, monkeypatch):
    model, x = encoder(), batch(rng)
    expected = called(model, x)
    break_off(monkeypatch, pairs, "_decompose", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(model, recipe)
    assert_close(called(model, x), expected)
    keras_srlora.initialize_factors(model)
    assert_close(predicted(model, x), expected)
    nudge([model.get_layer(name) for name in NAMES])
    keras_srlora.unload_srlora(model)
    assert_close(predicted(model, x), expected)


def set_default(model, folder):
    keras_srlora.set_adapter(model, "default")


def add_fresh(model, folder):
    keras_srlora.add_adapter(model, "third")


def add_file(model, folder):
    keras_srlora.add_adapter(model, "third", folder / "a.safetensors")


def combine(model, folder):
    keras_srlora.combine_adapters(model, {"default": 0.5, "b": 0.5}, "third")


@pytest.mark.parametrize("change", [set_default, add_fresh, add_file, combine])
def test_a_switch_of_adapters_is_whole(change, rng, tmp_path, monkeypatch):
    model, x = tuned_encoder(target_rank=8), batch(rng)
    keras_srlora.save_adapter(
        tuned_encoder(seed=7, lora_alpha=4.0), tmp_path / "a.safetensors"
    )
    default = called(model, x)
    keras_srlora.add_adapter(model, "b")
    nudge([model.get_layer(name) for name in NAMES], seed=5)
    expected = called(model, x)
    assert differ(expected, default)
    with monkeypatch.context() as patch:
        # A fresh adapter has no `restore_adapter`, but random numbers.
        name = "a_initializer" if change is add_fresh else "restore_adapter"
        break_off(patch, pairs, name, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            change(model, tmp_path)
    assert_close(called(model, x), expected)
    assert keras_srlora.list_adapters(model) == ["default", "b"]
    keras_srlora.set_adapter(model, "default")
    assert_close(predicted(model, x), default)
    keras_srlora.set_adapter(model, "b")
    assert_close(predicted(model, x), expected)
    change(model, tmp_path)


# Ctrl-C itself, which waits until the operation is whole.


def press_ctrl_c(monkeypatch, owner, name):
    """Lets Ctrl-C arrive at the first call of a function."""

    def press():
        signal.raise_signal(signal.SIGINT)

    return before_call(monkeypatch, owner, name, 1, press)


class PressCtrlC(keras.callbacks.Callback):
    """Lets Ctrl-C arrive while the first layer is recomposed, at a step."""

    def __init__(self, monkeypatch, step):
        super().__init__()
        self.patch, self.step = monkeypatch, step

    def on_train_batch_begin(self, batch, logs=None):
        if batch == self.step:
            press_ctrl_c(self.patch, frozen.FloatKernel, "store")


@pytest.mark.usefixtures("ctrl_c_raises")
def test_all_layers_are_recomposed_in_spite_of_ctrl_c(rng, monkeypatch):
    x, y = batch(rng, 32), batch(rng, 32)
    models = [encoder(), encoder()]
    for model in models:
        convert(model)
        model.compile(keras.optimizers.Adam(0.05), "mse")
    # Two steps, and what the recomposition after them leaves as it is.
    fit(models[0], (x[:16], y[:16]), epochs=1)
    expected = called(models[0], x)
    model = models[1]
    callback = keras_srlora.RecompositionCallback(interval=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fit(model, (x, y), [PressCtrlC(patch, 2), callback], epochs=1)
    layers = [model.get_layer(name) for name in NAMES]
    assert [len(layer.record.events) for layer in layers] == [1, 1]
    assert_close(called(model, x), expected)
    assert_close(predicted(model, x), expected)
    fit(model, (x, y), [callback], epochs=1)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_a_loaded_adapter_is_whole_in_spite_of_ctrl_c(
    rng, tmp_path, monkeypatch
):
    x, path = batch(rng), tmp_path / "a.safetensors"
    model = tuned_encoder()
    keras_srlora.save_adapter(model, path)
    expected = called(model, x)
    nudge([model.get_layer(name) for name in NAMES], seed=5)
    assert differ(called(model, x), expected)
    calls = press_ctrl_c(monkeypatch, pairs, "restore_adapter")
    with pytest.raises(KeyboardInterrupt):
        keras_srlora.load_adapter(model, path)
    assert len(calls) == len(NAMES)
    assert_close(called(model, x), expected)
    assert_close(predicted(model, x), expected)


# What nobody refuses inside of `adapter_disabled`, and would be lost.


def train(model):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.ones((8, 8), "float32")
    model.fit(x, x, verbose=0)


def set_weights(model):
    model.set_weights(tuned_encoder(seed=8).get_weights())


def load_a_file(model):
    model.load_weights("weights.weights.h5")


@pytest.mark.parametrize("change", [train, set_weights, load_a_file])
def test_what_a_disabled_adapter_would_lose_is_told(
    change, rng, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = recomposed(rng)
    model.save_weights("weights.weights.h5")
    before = state_of(model)
    with pytest.raises(ValueError, match="are gone"):
        with keras_srlora.adapter_disabled(model):
            change(model)
    assert_unchanged(model, before[: len(state_of(model))])


def test_what_disabled_adapters_within_each_other_would_lose_is_told():
    model = tuned_encoder()
    before = state_of(model)
    with pytest.raises(ValueError, match="are gone"):
        with keras_srlora.adapter_disabled(model):
            with keras_srlora.adapter_disabled(model):
                nudge([model.get_layer("first")])
    assert_unchanged(model, before)


def test_an_error_inside_of_a_disabled_adapter_is_the_one_that_is_raised(rng):
    model = tuned_encoder()
    with pytest.raises(KeyError):
        with keras_srlora.adapter_disabled(model):
            train(model)
            raise KeyError


# Folders that nothing can be written to.


@contextlib.contextmanager
def read_only(folder):
    """Takes the right to write, from the superuser too."""
    superuser = os.geteuid() == 0
    folder.chmod(0o555)
    try:
        if superuser:
            os.seteuid(65534)
        yield
    finally:
        if superuser:
            os.seteuid(0)
        folder.chmod(0o755)


MODULES = {"first": "one", "second": "two"}
WRITERS = {
    "save_adapter": lambda m, f: keras_srlora.save_adapter(
        m, f / "a.safetensors"
    ),
    "export_lora": lambda m, f: keras_srlora.export_lora(m, f / "a.lora.h5"),
    "export_peft": lambda m, f: keras_srlora.export_peft(
        m, f / "peft", modules=MODULES
    ),
    "model.save": lambda m, f: m.save(f / "model.keras"),
}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of Unix")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_is_read_only_stays_empty(writer, rng, tmp_path):
    model, folder = recomposed(rng), tmp_path / "read_only"
    folder.mkdir()
    before = state_of(model)
    with pytest.raises(OSError), read_only(folder):
        WRITERS[writer](model, folder)
    assert list(folder.iterdir()) == []
    assert_unchanged(model, before)
    WRITERS[writer](model, folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of Unix")
def test_a_checkpoint_that_cannot_be_written_leaves_a_model_to_go_on(
    rng, tmp_path
):
    model, x = encoder(), batch(rng, 32)
    convert(model, "lora_restarts")
    model.compile(keras.optimizers.Adam(0.05), "mse")
    folder = tmp_path / "read_only"
    folder.mkdir()
    checkpoint = keras.callbacks.ModelCheckpoint(
        str(folder / "{epoch}.weights.h5"), save_weights_only=True
    )
    callback = keras_srlora.RecompositionCallback(interval=2)
    with pytest.raises(OSError), read_only(folder):
        fit(model, (x, x), [callback, checkpoint])
    fit(model, (x, x), [callback, checkpoint])
    assert len(list(folder.iterdir())) == 2
    tuned = called(model, x)
    assert_close(predicted(model, x), tuned)
    keras_srlora.merge_srlora(model)
    assert_close(predicted(model, x), tuned)
