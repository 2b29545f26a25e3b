"""An operation happens whole or not at all, and never by half."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops
from pieces import NAMES
from pieces import WIDTH
from pieces import assert_close
from pieces import assert_unchanged
from pieces import batch
from pieces import called
from pieces import collected_warnings
from pieces import convert
from pieces import differ
from pieces import encoder
from pieces import nudge
from pieces import plain
from pieces import predicted
from pieces import state_of
from pieces import tuned_encoder
from processes import Child
from processes import run_code
from support import tiny_bert
from support import to_numpy

import keras_srlora

MODULES = {"first": "one", "second": "two"}


def recomposed_encoder(rng, recipe="paper"):
    """Converted, trained and recomposed, so that pairs were fused."""
    model = encoder()
    convert(model, recipe)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    x, y = batch(rng, 64), batch(rng, 64)
    callback = keras_srlora.RecompositionCallback(interval=3)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert callback.events
    return model


def srlora_layers(model):
    return [model.get_layer(name) for name in NAMES]


# Merging, whatever the optimizer is.


class NoConfig(keras.optimizers.schedules.LearningRateSchedule):
    """As in many tutorials: it says nothing of how it was made."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1.0 + 0.0 * ops.cast(step, "float32"))


class NotRegistered(NoConfig):
    def get_config(self):
        return {"rate": self.rate}


class OwnAdam(keras.optimizers.Adam):
    """Not registered, and with an argument that its config does not have."""

    def __init__(self, extra, learning_rate=0.01, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.extra = extra


class OwnSGD(keras.optimizers.SGD):
    """Not registered."""


OPTIMIZERS = {
    "schedule_without_config": lambda: keras.optimizers.Adam(NoConfig(0.02)),
    "schedule_not_registered": lambda: keras.optimizers.Adam(
        NotRegistered(0.02)
    ),
    "optimizer_not_registered": lambda: OwnSGD(0.02, momentum=0.5),
    "optimizer_with_an_argument": lambda: OwnAdam(object(), 0.02),
    "rate_of_a_function": lambda: keras.optimizers.Adam(lambda: 0.02),
    "loss_scale_of_it": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(NoConfig(0.02))
    ),
    "registered": lambda: keras.optimizers.Adam(0.02, beta_1=0.7),
    "ema_and_clipping": lambda: keras.optimizers.AdamW(
        0.02, use_ema=True, clipnorm=1.0, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_merging_does_not_depend_on_the_optimizer(kind, back, rng):
    model, x = tuned_encoder(), batch(rng, 16)
    optimizer = OPTIMIZERS[kind]()
    model.compile(optimizer, "mse")
    if kind != "schedule_not_registered":
        model.fit(x, x, batch_size=8, verbose=0)
    tuned = called(model, x)
    layers = srlora_layers(model)
    getattr(keras_srlora, back)(model)
    assert plain(layers)
    if back == "merge_srlora":
        assert_close(called(model, x), tuned)
    assert type(model.optimizer) is type(optimizer)
    for name in ("beta_1", "momentum", "clipnorm", "use_ema", "extra"):
        before = getattr(optimizer, name, None)
        assert getattr(model.optimizer, name, None) == before
    assert float(np.array(model.optimizer.learning_rate)) == pytest.approx(0.02)
    before = to_numpy(layers[0].kernel)
    model.fit(x, x, batch_size=8, verbose=0)
    assert differ(layers[0].kernel, before, 1e-5)
    # A warning that a state was not loaded would be an error.
    assert not any("lora" in v.path for v in model.optimizer.variables)


@pytest.mark.parametrize("kind", ["schedule_without_config", "registered"])
def test_the_old_moments_are_gone_after_merging(kind, rng):
    model, x = tuned_encoder(), batch(rng, 16)
    model.compile(OPTIMIZERS[kind](), "mse")
    model.fit(x, x, batch_size=8, verbose=0)
    keras_srlora.merge_srlora(model)
    assert int(np.array(model.optimizer.iterations)) == 0
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    slots = [tuple(v.shape) for v in model.optimizer.variables]
    assert all(slots.count(shape) >= 2 for shape in shapes)


# Switched off for a while.


def test_adapters_are_switched_off_within_each_other(rng):
    x, model = batch(rng), encoder()
    pretrained = called(model, x)
    nudge(convert(model))
    tuned, before = called(model, x), state_of(model)
    with keras_srlora.adapter_disabled(model):
        with keras_srlora.adapter_disabled(model):
            assert_close(called(model, x), pretrained)
        assert_close(called(model, x), pretrained)
        assert_close(predicted(model, x), pretrained)
    assert_unchanged(model, before)
    assert_close(predicted(model, x), tuned)


def test_a_part_is_switched_off_within_the_whole(rng):
    x, inner = batch(rng), encoder()
    outer = keras.Sequential([inner, keras.layers.Dense(3)])
    outer.build((None, WIDTH))
    pretrained = called(outer, x)
    nudge(convert(outer))
    before = state_of(outer)
    with keras_srlora.adapter_disabled(outer):
        with keras_srlora.adapter_disabled(inner):
            assert_close(called(outer, x), pretrained)
        assert_close(called(outer, x), pretrained)
    assert_unchanged(outer, before)
    with keras_srlora.adapter_disabled(inner):
        with keras_srlora.adapter_disabled(outer):
            assert_close(called(outer, x), pretrained)
    assert_unchanged(outer, before)


def test_an_error_inside_of_two_puts_everything_back(rng):
    model = tuned_encoder()
    before = state_of(model)
    with pytest.raises(KeyError):
        with keras_srlora.adapter_disabled(model):
            with keras_srlora.adapter_disabled(model):
                raise KeyError
    assert_unchanged(model, before)


def fit_with_the_callback(model, folder):
    model.compile("adam", "mse")
    x = np.ones((8, WIDTH), "float32")
    callback = keras_srlora.RecompositionCallback(interval=1)
    model.fit(x, x, batch_size=2, verbose=0, callbacks=[callback])


# Each of them is refused inside, and nothing is changed or written.
INSIDE = {
    "merge_srlora": lambda m, f: keras_srlora.merge_srlora(m),
    "load_adapter": lambda m, f: keras_srlora.load_adapter(
        m, f.parent / "other.safetensors"
    ),
    "fit": fit_with_the_callback,
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_cannot_be_done_while_switched_off_is_refused(name, rng, tmp_path):
    model, x = recomposed_encoder(rng), batch(rng)
    keras_srlora.save_adapter(tuned_encoder(), tmp_path / "other.safetensors")
    folder = tmp_path / "inside"
    folder.mkdir()
    tuned, before = called(model, x), state_of(model)
    with keras_srlora.adapter_disabled(model):
        pretrained = called(model, x)
        with pytest.raises(ValueError, match="adapter_disabled"):
            INSIDE[name](model, folder)
        assert_close(called(model, x), pretrained)
    assert_unchanged(model, before)
    assert_close(predicted(model, x), tuned)
    assert list(folder.iterdir()) == []
    keras_srlora.merge_srlora(model)
    assert_close(predicted(model, x), tuned)


@pytest.mark.parametrize("writer", ["save_adapter", "export_lora"])
def test_what_is_written_while_switched_off_is_the_adapter_or_refused(
    writer, rng, tmp_path
):
    """Never, without a word, an adapter of zeros."""
    model, x = recomposed_encoder(rng), batch(rng)
    tuned = called(model, x)
    path = tmp_path / "a.lora.h5"
    with contextlib.suppress(ValueError):
        with keras_srlora.adapter_disabled(model):
            getattr(keras_srlora, writer)(model, path)
    assert_close(called(model, x), tuned)
    if not path.exists():
        return
    other = encoder()
    if writer == "save_adapter":
        keras_srlora.load_adapter(other, path)
        assert_close(called(other, x), tuned)
    else:
        import h5py

        with h5py.File(path) as file:
            factors = [np.array(v) for v in _datasets(file)]
        assert any(factor.any() for factor in factors)


def _datasets(group):
    for value in group.values():
        if hasattr(value, "values"):
            yield from _datasets(value)
        elif value.shape:
            yield value


# Back to the plain pretrained model.


@pytest.mark.parametrize("recipe", ["paper", "adaptive", "lora_restarts"])
def test_unloading_gives_the_plain_pretrained_model_back(recipe, rng):
    x, pretrained = batch(rng), called(encoder(), np.zeros((1, WIDTH)))
    model = recomposed_encoder(rng, recipe)
    reference = encoder()
    paths = sorted(v.path for v in reference.variables)
    layers = srlora_layers(model)
    returned = keras_srlora.unload_srlora(model)
    assert plain(layers)
    assert set(map(id, returned)) == set(map(id, layers))
    assert sorted(v.path for v in model.variables) == paths
    assert_close(called(model, x), called(reference, x))
    assert_close(predicted(model, x), called(reference, x))
    assert_close(called(model, np.zeros((1, WIDTH))), pretrained)
    with pytest.raises(ValueError, match="no SRLoRA layer"):
        keras_srlora.unload_srlora(model)
    convert(model)
    assert_close(called(model, x), called(reference, x))


def test_unloading_keeps_the_head_and_its_training(rng):
    inner = encoder()
    model = keras.Sequential([inner, keras.layers.Dense(3, name="head")])
    model.build((None, WIDTH))
    x, y = batch(rng, 16), batch(rng, 16, 3)
    nudge(convert(model))
    model.compile("adam", "mse")
    model.fit(x, y, batch_size=8, verbose=0)
    head = to_numpy(model.layers[-1].kernel)
    keras_srlora.unload_srlora(model)
    np.testing.assert_array_equal(to_numpy(model.layers[-1].kernel), head)
    model.fit(x, y, batch_size=8, verbose=0)


def test_unloading_a_kerashub_backbone(rng, tmp_path):
    pytest.importorskip("keras_hub")
    bert, reference = tiny_bert(dropout=0.0), tiny_bert(dropout=0.0)
    nudge(keras_srlora.enable_srlora(bert, 2, recipe="paper"))
    keras_srlora.unload_srlora(bert)
    assert type(bert) is type(reference)
    for a, b in zip(bert.variables, reference.variables, strict=True):
        assert a.path.split("/")[-1] == b.path.split("/")[-1]
        assert_close(a, b, 1e-5)


def test_unloading_inside_of_a_switched_off_block_is_whole(rng):
    """Refused, or done: afterwards it is one of the two models."""
    x, model = batch(rng), encoder()
    pretrained = called(model, x)
    nudge(convert(model))
    tuned = called(model, x)
    refused = False
    with keras_srlora.adapter_disabled(model):
        try:
            keras_srlora.unload_srlora(model)
        except ValueError:
            refused = True
    assert_close(called(model, x), tuned if refused else pretrained)
    assert plain(srlora_layers(model)) != refused


# Factors that are not finite.


def poisoned(value, factor=0, place=1):
    """The factors of the last layer have an entry that is no number."""
    model = tuned_encoder()
    layer = srlora_layers(model)[place]
    array = to_numpy(layer.factors[factor])
    array[0, 0] = value
    layer.factors[factor].assign(array)
    return model


WRITERS = {
    "save_adapter": lambda m, f: keras_srlora.save_adapter(
        m, f / "a.safetensors"
    ),
    "save_adapter_include_trainable": lambda m, f: keras_srlora.save_adapter(
        m, f / "a.safetensors", include_trainable=True
    ),
    "export_lora": lambda m, f: keras_srlora.export_lora(m, f / "a.lora.h5"),
    "export_lora_rank": lambda m, f: keras_srlora.export_lora(
        m, f / "a.lora.h5", 1
    ),
    "export_peft": lambda m, f: keras_srlora.export_peft(
        m, f / "peft", modules=MODULES
    ),
    "merge_srlora": lambda m, f: keras_srlora.merge_srlora(m),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "value, factor", [(np.nan, 0), (np.nan, 1), (-np.inf, 1)]
)
def test_factors_that_are_not_finite_are_refused(
    writer, value, factor, tmp_path
):
    model = poisoned(value, factor)
    before = state_of(model)
    with pytest.raises(ValueError, match="second"):
        WRITERS[writer](model, tmp_path)
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []
    assert not plain(srlora_layers(model))


@pytest.mark.parametrize("writer", WRITERS)
def test_factors_whose_product_overflows_are_refused(writer, tmp_path):
    """Each of them is finite; the update is not."""
    model = tuned_encoder()
    for factor in srlora_layers(model)[1].factors:
        factor.assign(1e30 * np.ones(factor.shape))
    before = state_of(model)
    if writer.startswith("save"):
        # Factors that are finite are what a file holds.
        WRITERS[writer](model, tmp_path)
        keras_srlora.load_adapter(encoder(), tmp_path / "a.safetensors")
        return
    with pytest.raises(ValueError, match="second"):
        WRITERS[writer](model, tmp_path)
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_in_half_precision_that_overflows_is_not_merged():
    """65,504 is the largest number of float16."""
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8, dtype="float16", name="half")]
    )
    (layer,) = keras_srlora.enable_srlora(model, 1, target_layer_names=["half"])
    for factor in layer.factors:
        factor.assign(1000.0 * np.ones(factor.shape))
    before = state_of(model)
    with pytest.raises(ValueError, match="half"):
        keras_srlora.merge_srlora(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_pretrained_model_can_be_reached_with_factors_that_are_broken(
    value, rng
):
    x, pretrained = batch(rng), called(encoder(), np.zeros((1, WIDTH)))
    model, reference = poisoned(value), encoder()
    with keras_srlora.adapter_disabled(model):
        assert_close(called(model, x), called(reference, x))
    # As it was: nothing was mended on the way.
    assert not np.isfinite(to_numpy(srlora_layers(model)[1].factors[0])).all()
    keras_srlora.unload_srlora(model)
    assert_close(called(model, x), called(reference, x))
    assert_close(called(model, np.zeros((1, WIDTH))), pretrained)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_is_loaded_over_factors_that_are_broken(
    value, rng, tmp_path
):
    x, good = batch(rng), tuned_encoder()
    keras_srlora.save_adapter(good, tmp_path / "a.safetensors")
    model = poisoned(value)
    keras_srlora.load_adapter(model, tmp_path / "a.safetensors")
    assert_close(called(model, x), called(good, x))


def test_a_kernel_is_not_decomposed_with_factors_that_are_broken():
    model = poisoned(np.nan)
    layer, before = srlora_layers(model)[1], state_of(model)
    with pytest.raises(ValueError, match="second"):
        layer.initialize_factors()
    assert_unchanged(model, before)


def test_a_trained_head_that_is_not_finite_is_not_saved(tmp_path):
    model = keras.Sequential(
        [encoder(), keras.layers.Dense(3, name="head")], name="model"
    )
    model.build((None, WIDTH))
    nudge(convert(model))
    model.layers[-1].kernel.assign(np.nan * np.ones((WIDTH, 3)))
    with pytest.raises(ValueError, match="head"):
        keras_srlora.save_adapter(
            model, tmp_path / "a.safetensors", include_trainable=True
        )
    assert list(tmp_path.iterdir()) == []


# One adapter after another.


def with_head(inner):
    model = keras.Sequential([inner, keras.layers.Dense(3, name="head")])
    model.build((None, WIDTH))
    return model


FILES = {
    "both": NAMES,
    "first": ["first"],
    "second": ["second"],
}


@pytest.mark.parametrize("recipe", ["paper", "adaptive"])
@pytest.mark.parametrize("b", FILES)
@pytest.mark.parametrize("a", FILES)
def test_an_adapter_is_replaced_by_exactly_the_next(
    a, b, recipe, rng, tmp_path
):
    x, outputs = batch(rng), {}
    for seed, (part, names) in enumerate(
        {"a": FILES[a], "b": FILES[b]}.items()
    ):
        tuned = with_head(encoder())
        nudge(convert(tuned, recipe, names), seed)
        with collected_warnings():
            keras_srlora.save_adapter(tuned, tmp_path / part)
        outputs[part] = called(tuned.layers[0], x)
    model = with_head(encoder())
    with collected_warnings():
        keras_srlora.load_adapter(model, tmp_path / "a")
        assert_close(called(model.layers[0], x), outputs["a"])
        keras_srlora.load_adapter(model, tmp_path / "b")
        assert_close(called(model.layers[0], x), outputs["b"])
        # What is saved now is B, too.
        keras_srlora.save_adapter(model, tmp_path / "again")
        again = with_head(encoder())
        keras_srlora.load_adapter(again, tmp_path / "again")
    assert_close(called(again.layers[0], x), outputs["b"])


def test_an_adapter_is_replaced_after_recompositions(rng, tmp_path):
    x, tuned = batch(rng), encoder()
    with collected_warnings():
        nudge(convert(tuned, names=["second"]))
        keras_srlora.save_adapter(tuned, tmp_path / "b")
    model = recomposed_encoder(rng)
    keras_srlora.load_adapter(model, tmp_path / "b")
    assert_close(called(model, x), called(tuned, x))


def test_an_adapter_that_does_not_fit_leaves_the_former_whole(rng, tmp_path):
    keras_srlora.save_adapter(tuned_encoder(seed=8), tmp_path / "other")
    model = recomposed_encoder(rng)
    before = state_of(model)
    with pytest.raises(ValueError, match="pretrained"):
        keras_srlora.load_adapter(model, tmp_path / "other")
    assert_unchanged(model, before)


# Quantization.


@pytest.mark.parametrize("type_check", [True, False])
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
@pytest.mark.parametrize("kind", ["dense", "einsum"])
def test_an_srlora_layer_is_not_quantized(mode, type_check, kind, rng):
    x = batch(rng)
    if kind == "dense":
        layer = keras_srlora.SRLoRADense(WIDTH, rank=2)
    else:
        layer = keras_srlora.SRLoRAEinsumDense("ab,bc->ac", WIDTH, rank=2)
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    before, expected = state_of(model), called(model, x)
    with pytest.raises(ValueError, match="merge_srlora"):
        layer.quantize(mode, type_check=type_check)
    assert_unchanged(model, before)
    assert_close(called(model, x), expected)
    assert layer.quantization_mode is None


@pytest.mark.parametrize("part", ["outer", "inner"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_converted_model_is_quantized_whole_or_not_at_all(mode, part, rng):
    """The head alone would be neither."""
    model = with_head(encoder())
    nudge(convert(model))
    x = batch(rng)
    before, expected = state_of(model), called(model, x)
    target = model if part == "outer" else model.layers[0]
    with collected_warnings(), pytest.raises(ValueError, match="merge_srlora"):
        target.quantize(mode)
    assert_unchanged(model, before)
    assert_close(called(model, x), expected)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), expected)
    with collected_warnings():
        model.quantize(mode)
    layers = [*model.layers[0].layers[1:], model.layers[-1]]
    assert {layer.quantization_mode for layer in layers} == {mode}
    assert_close(called(model, x), expected, 0.5)


def test_a_converted_backbone_of_kerashub_is_quantized_after_merging(rng):
    pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    nudge(keras_srlora.enable_srlora(bert, 2), size=0.1)
    before = state_of(bert)
    with collected_warnings(), pytest.raises(ValueError, match="merge_srlora"):
        bert.quantize("int8")
    assert_unchanged(bert, before)
    keras_srlora.merge_srlora(bert)
    with collected_warnings():
        bert.quantize("int8")
    query = next(
        layer for layer in bert._flatten_layers() if layer.name == "query"
    )
    assert query.quantization_mode == "int8"


@pytest.mark.parametrize("kind", ["dense", "einsum"])
def test_the_dtype_policy_does_not_quantize_by_the_back_door(kind):
    """Keras quantizes where a layer is given another policy, too."""
    if kind == "dense":
        layer = keras_srlora.SRLoRADense(WIDTH, rank=2)
    else:
        layer = keras_srlora.SRLoRAEinsumDense("ab,bc->ac", WIDTH, rank=2)
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    before = state_of(model)
    with pytest.raises(ValueError, match="merge_srlora"):
        layer.dtype_policy = "int8_from_float32"
    assert_unchanged(model, before)
    assert layer.quantization_mode is None


# A disk that fails.


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


FILE_WRITERS = {
    "save_adapter": lambda m, f: keras_srlora.save_adapter(
        m, f / "a.safetensors"
    ),
    "export_lora": lambda m, f: keras_srlora.export_lora(m, f / "a.lora.h5"),
    "export_peft": lambda m, f: keras_srlora.export_peft(m, f, modules=MODULES),
}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("writer", ["save_adapter", "export_peft"])
@pytest.mark.parametrize("size", [0, 100, 500])
def test_a_full_disk_leaves_the_former_file(writer, size, tmp_path):
    FILE_WRITERS[writer](tuned_encoder(), tmp_path)
    before = contents(tmp_path)
    other = tuned_encoder(seed=8)
    state = state_of(other)
    with pytest.raises(OSError), full_disk(size):
        FILE_WRITERS[writer](other, tmp_path)
    assert contents(tmp_path) == before
    assert_unchanged(other, state)


ON_A_FULL_DISK = """
import pathlib, resource, sys
import keras, numpy
import keras_srlora

# A crash leaves no dump.
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
layer = keras_srlora.SRLoRADense(8, rank=2, name="first")
model = keras.Sequential([keras.Input((8,)), layer])
keras_srlora.initialize_factors(model)
layer.lora_kernel_b.assign(numpy.ones((2, 8)))
path = pathlib.Path(sys.argv[1]) / "a.lora.h5"
keras_srlora.export_lora(model, path)
before = path.read_bytes()
layer.lora_kernel_b.assign(2 * numpy.ones((2, 8)))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for size in (0, 100, 500, 2000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        keras_srlora.export_lora(model, path)
    except OSError:
        pass
    else:
        raise SystemExit("no error")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [x.name for x in path.parent.iterdir()] == ["a.lora.h5"]
    assert path.read_bytes() == before
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_former_export_for_kerashub(tmp_path):
    """In a process of its own: HDF5 may take the whole process with it."""
    folder = tmp_path / "exports"
    folder.mkdir()
    child = Child(run_code, (ON_A_FULL_DISK, [str(folder)]), tmp_path / "log")
    child.assert_ends()


def test_an_export_of_two_files_is_whole(tmp_path):
    """The second one cannot be written: the first is not replaced."""
    keras_srlora.export_peft(tuned_encoder(), tmp_path, modules=MODULES)
    before = contents(tmp_path)["adapter_model.safetensors"]
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    (tmp_path / "adapter_config.json" / "in the way").touch()
    other = tuned_encoder(seed=8)
    with pytest.raises(OSError):
        keras_srlora.export_peft(other, tmp_path, modules=MODULES)
    assert contents(tmp_path)["adapter_model.safetensors"] == before


def no_such_folder(folder):
    return folder / "nowhere" / "d.safetensors"


def a_folder(folder):
    (folder / "d.safetensors").mkdir()
    return folder / "d.safetensors"


@pytest.mark.parametrize("where", [no_such_folder, a_folder, "full"])
@pytest.mark.parametrize("function", ["enable_srlora", "initialize_factors"])
def test_directions_that_cannot_be_written_leave_the_model_whole(
    where, function, rng, tmp_path
):
    """Plain as it was, or converted and decomposed with a warning."""
    x, limit = batch(rng), 2**30
    if where == "full":
        path, limit = tmp_path / "d.safetensors", 100
    else:
        path = where(tmp_path)
    if function == "enable_srlora":
        model = encoder()
    else:
        model = keras.Sequential(
            [
                keras.Input((WIDTH,)),
                *(
                    keras_srlora.SRLoRADense(WIDTH, rank=2, recipe="paper")
                    for _ in NAMES
                ),
            ]
        )
    expected, before, failed = called(model, x), state_of(model), False
    with collected_warnings() as messages:
        try:
            with full_disk(limit):
                if function == "enable_srlora":
                    convert(model, directions=path)
                else:
                    keras_srlora.initialize_factors(model, path)
        except (OSError, ValueError):
            failed = True
    assert_close(called(model, x), expected)
    if failed:
        assert_unchanged(model, before)
    else:
        assert any("direction" in text for text in messages)
    # In either case it can be done again, elsewhere.
    if function == "enable_srlora" and failed:
        convert(model)
    else:
        keras_srlora.initialize_factors(model)
    assert_close(called(model, x), expected)


@pytest.mark.parametrize("function", ["save_adapter", "export_lora"])
def test_a_folder_that_is_not_there_is_named(function, tmp_path):
    model = tuned_encoder()
    with pytest.raises(OSError, match="nowhere"):
        getattr(keras_srlora, function)(
            model, tmp_path / "nowhere" / "a.lora.h5"
        )
