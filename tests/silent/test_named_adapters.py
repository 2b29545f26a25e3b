"""Several named adapters on one model, and what else PEFT's users know."""

import json

import keras
import numpy as np
import pytest
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
from pieces import others
from pieces import paths
from pieces import predicted
from pieces import state_of
from pieces import tuned_encoder
from support import tiny_bert
from support import to_numpy

import keras_srlora


def add_adapter(*arguments):
    return keras_srlora.add_adapter(*arguments)


SPECS = {
    "a": {"recipe": "paper"},
    # Of another rank, scale and recipe.
    "b": {"recipe": "adaptive", "rank": 3, "lora_alpha": 6.0},
    # One layer alone.
    "c": {"recipe": "paper", "names": ["second"]},
}


def files(folder, specs=SPECS):
    """Writes adapters; returns `{name: (path, tuned model)}`."""
    made = {}
    for seed, (name, arguments) in enumerate(specs.items()):
        model = encoder()
        nudge(convert(model, **arguments), seed)
        path = folder / f"{name}.safetensors"
        with collected_warnings():
            keras_srlora.save_adapter(model, path)
        made[name] = path, model
    return made


def with_adapters(folder, specs=SPECS):
    """One model with all of them, and `{name: tuned model}`."""
    made = files(folder, specs)
    names = list(specs)
    model = encoder()
    nudge(convert(model, **specs[names[0]]))
    with collected_warnings():
        keras_srlora.load_adapter(model, made[names[0]][0])
        for name in names[1:]:
            add_adapter(model, name, made[name][0])
    tuned = {name: reference for name, (_, reference) in made.items()}
    return model, {"default": tuned.pop(names[0]), **tuned}


def srlora_layers(model):
    return [model.get_layer(name) for name in NAMES]


# Switching.


def test_the_first_adapter_is_the_default_one():
    model = tuned_encoder()
    assert list(keras_srlora.list_adapters(model)) == ["default"]


def test_adapters_are_switched(rng, tmp_path):
    model, tuned = with_adapters(tmp_path)
    x = batch(rng)
    assert set(keras_srlora.list_adapters(model)) == {"default", "b", "c"}
    layers = srlora_layers(model)
    classes = [type(layer) for layer in layers]
    for name in ("b", "default", "c", "b", "c", "default", "default"):
        keras_srlora.set_adapter(model, name)
        assert_close(called(model, x), called(tuned[name], x))
        assert_close(predicted(model, x), called(tuned[name], x))
        # No conversion.
        assert [type(layer) for layer in srlora_layers(model)] == classes


def test_other_models_on_the_layers_are_switched_too(rng, tmp_path):
    model, tuned = with_adapters(tmp_path)
    x = batch(rng)
    outer = keras.Model(model.input, model.get_layer("second").output)
    for name in ("default", "b", "c", "default"):
        keras_srlora.set_adapter(model, name)
        assert_close(predicted(outer, x), called(tuned[name], x))


def test_an_added_adapter_starts_fresh_and_is_the_one_in_use(rng):
    x, model = batch(rng), encoder()
    pretrained = called(model, x)
    nudge(convert(model))
    tuned = called(model, x)
    add_adapter(model, "fresh")
    keras_srlora.set_adapter(model, "fresh")
    assert_close(called(model, x), pretrained)
    assert len(model.trainable_variables) == 4
    keras_srlora.set_adapter(model, "default")
    assert_close(called(model, x), tuned)


def test_an_adapter_is_trained_and_leaves_the_others_alone(rng):
    x, y = batch(rng, 48), batch(rng, 48)
    model = tuned_encoder()
    default = called(model, x)
    add_adapter(model, "new")
    keras_srlora.set_adapter(model, "new")
    model.compile(keras.optimizers.Adam(0.05), "mse")
    callback = keras_srlora.RecompositionCallback(interval=2)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    assert callback.events
    trained = called(model, x)
    assert differ(trained, default)
    keras_srlora.set_adapter(model, "default")
    assert_close(called(model, x), default)
    assert_close(predicted(model, x), default)
    keras_srlora.set_adapter(model, "new")
    assert_close(called(model, x), trained)
    # And on.
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
    keras_srlora.set_adapter(model, "default")
    assert_close(called(model, x), default)


def test_training_goes_on_after_switching_without_compiling(rng, tmp_path):
    """Right, or refused with a message that says what to do."""
    model, tuned = with_adapters(tmp_path)
    x, y = batch(rng, 16), batch(rng, 16)
    keras_srlora.set_adapter(model, "default")
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, batch_size=8, verbose=0)
    keras_srlora.set_adapter(model, "b")
    expected = called(tuned["b"], x)
    assert_close(called(model, x), expected)
    try:
        with collected_warnings() as messages:
            model.fit(x, y, batch_size=8, verbose=0)
    except ValueError as error:
        assert "compile" in str(error)
        return
    assert differ(called(model, x), expected, 1e-3) or messages
    keras_srlora.set_adapter(model, "c")
    assert_close(called(model, x), called(tuned["c"], x))


def test_what_is_written_is_the_adapter_in_use(rng, tmp_path):
    model, tuned = with_adapters(tmp_path)
    x = batch(rng)
    for name in ("b", "c", "default"):
        keras_srlora.set_adapter(model, name)
        with collected_warnings():
            keras_srlora.save_adapter(model, tmp_path / "again")
            fresh = encoder()
            keras_srlora.load_adapter(fresh, tmp_path / "again")
        assert_close(called(fresh, x), called(tuned[name], x))


@pytest.mark.parametrize("name", ["default", "b", "c"])
def test_the_adapter_in_use_is_merged(name, rng, tmp_path):
    model, tuned = with_adapters(tmp_path)
    x = batch(rng)
    keras_srlora.set_adapter(model, name)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), called(tuned[name], x))
    assert_close(predicted(model, x), called(tuned[name], x))
    assert not any("lora" in v.path for v in model.variables)


@pytest.mark.parametrize("name", ["default", "b", "c"])
def test_the_pretrained_model_is_the_same_with_each(name, rng, tmp_path):
    model, _ = with_adapters(tmp_path)
    x = batch(rng)
    pretrained = called(encoder(), x)
    keras_srlora.set_adapter(model, name)
    with keras_srlora.adapter_disabled(model):
        assert_close(called(model, x), pretrained)
        with pytest.raises(ValueError, match="adapter_disabled"):
            keras_srlora.set_adapter(model, "b")
    keras_srlora.unload_srlora(model)
    assert_close(called(model, x), pretrained)


def test_a_kerashub_backbone_has_several_adapters(rng):
    pytest.importorskip("keras_hub")
    from support import bert_outputs

    bert = tiny_bert(dropout=0.0)
    pretrained = bert_outputs(bert)
    nudge(keras_srlora.enable_srlora(bert, 2, recipe="paper"), size=0.2)
    tuned = bert_outputs(bert)
    add_adapter(bert, "other")
    keras_srlora.set_adapter(bert, "other")
    assert_close(bert_outputs(bert), pretrained, 1e-4)
    keras_srlora.set_adapter(bert, "default")
    assert_close(bert_outputs(bert), tuned, 1e-4)


# Deleting and combining.


def test_an_adapter_is_deleted(rng, tmp_path):
    model, tuned = with_adapters(tmp_path)
    x = batch(rng)
    keras_srlora.set_adapter(model, "default")
    keras_srlora.delete_adapter(model, "b")
    assert set(keras_srlora.list_adapters(model)) == {"default", "c"}
    assert_close(called(model, x), called(tuned["default"], x))
    with pytest.raises(ValueError, match="'b'"):
        keras_srlora.set_adapter(model, "b")
    keras_srlora.set_adapter(model, "c")
    assert_close(called(model, x), called(tuned["c"], x))


def test_the_adapter_in_use_is_not_deleted_without_a_word(rng, tmp_path):
    model, tuned = with_adapters(tmp_path)
    x = batch(rng)
    keras_srlora.set_adapter(model, "b")
    before = state_of(model)
    with pytest.raises(ValueError, match="'b'"):
        keras_srlora.delete_adapter(model, "b")
    assert_unchanged(model, before)
    assert_close(called(model, x), called(tuned["b"], x))


WEIGHTS = [
    {"default": 1.0, "b": 0.0},
    {"default": 0.5, "b": 0.5},
    {"default": 1.0, "b": -1.0, "c": 2.0},
    {"default": np.float32(0.25), "c": np.int64(1)},
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_combination_is_the_weighted_sum_of_the_updates(
    weights, rng, tmp_path
):
    model, tuned = with_adapters(tmp_path)
    plain = encoder()
    expected = encoder()
    for name in NAMES:
        kernel = to_numpy(plain.get_layer(name).kernel)
        total = kernel.copy()
        for adapter, weight in weights.items():
            layer = tuned[adapter].get_layer(name)
            if hasattr(layer, "effective_kernel"):
                total += weight * (to_numpy(layer.effective_kernel()) - kernel)
        expected.get_layer(name).kernel.assign(total)
    keras_srlora.combine_adapters(model, weights)
    assert "combined" in keras_srlora.list_adapters(model)
    keras_srlora.set_adapter(model, "combined")
    x = batch(rng)
    assert_close(called(model, x), called(expected, x))
    assert_close(predicted(model, x), called(expected, x))
    # The others are what they were.
    for name in weights:
        keras_srlora.set_adapter(model, name)
        assert_close(called(model, x), called(tuned[name], x))


def test_a_combination_is_saved_and_exported(rng, tmp_path):
    model, _ = with_adapters(tmp_path)
    keras_srlora.combine_adapters(
        model, {"default": 0.5, "b": 0.5}, name="mixture"
    )
    keras_srlora.set_adapter(model, "mixture")
    x = batch(rng)
    with collected_warnings():
        keras_srlora.save_adapter(model, tmp_path / "mixture")
        fresh = encoder()
        keras_srlora.load_adapter(fresh, tmp_path / "mixture")
    assert_close(called(fresh, x), called(model, x))
    keras_srlora.export_lora(model, tmp_path / "mixture.lora.h5")
    expected = called(model, x)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), expected)


# What is refused, before anything is changed.

REFUSED = {
    "set_unknown": lambda m, f: keras_srlora.set_adapter(m, "nothing"),
    "delete_unknown": lambda m, f: keras_srlora.delete_adapter(m, "nothing"),
    "add_twice": lambda m, f: add_adapter(m, "b"),
    "add_default": lambda m, f: add_adapter(m, "default"),
    "add_no_name": lambda m, f: add_adapter(m, ""),
    "add_number": lambda m, f: add_adapter(m, 3),
    "combine_unknown": lambda m, f: keras_srlora.combine_adapters(
        m, {"default": 1.0, "nothing": 1.0}
    ),
    "combine_nothing": lambda m, f: keras_srlora.combine_adapters(m, {}),
    "combine_list": lambda m, f: keras_srlora.combine_adapters(m, ["b"]),
    "combine_nan": lambda m, f: keras_srlora.combine_adapters(
        m, {"default": float("nan")}
    ),
    "combine_over_another": lambda m, f: keras_srlora.combine_adapters(
        m, {"default": 1.0}, name="b"
    ),
    "add_of_other_weights": lambda m, f: add_adapter(m, "new", f / "other"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(what, rng, tmp_path):
    keras_srlora.save_adapter(tuned_encoder(seed=8), tmp_path / "other")
    model, _ = with_adapters(tmp_path)
    keras_srlora.set_adapter(model, "default")
    before, x = state_of(model), batch(rng)
    expected = called(model, x)
    names = set(keras_srlora.list_adapters(model))
    with pytest.raises(ValueError):
        REFUSED[what](model, tmp_path)
    assert set(keras_srlora.list_adapters(model)) == names
    assert_unchanged(model, before)
    assert_close(predicted(model, x), expected)


def test_a_file_that_is_not_there_adds_nothing(tmp_path):
    model = tuned_encoder()
    with pytest.raises(FileNotFoundError):
        add_adapter(model, "new", tmp_path / "nothing")
    assert list(keras_srlora.list_adapters(model)) == ["default"]


@pytest.mark.parametrize("function", ["add_adapter", "set_adapter"])
def test_a_plain_model_has_no_adapters(function):
    with pytest.raises(ValueError, match="no SRLoRA layer"):
        getattr(keras_srlora, function)(encoder(), "default")


def test_factors_that_are_not_finite_are_not_combined(tmp_path):
    model, _ = with_adapters(tmp_path)
    keras_srlora.set_adapter(model, "default")
    factor = srlora_layers(model)[1].lora_kernel_b
    factor.assign(np.nan * np.ones(factor.shape))
    with pytest.raises(ValueError, match="second"):
        keras_srlora.combine_adapters(model, {"default": 1.0, "b": 1.0})


# Scales.


def test_an_alpha_pattern_gives_layers_their_own_alpha(rng):
    model, x = encoder(), batch(rng)
    expected = called(model, x)
    convert(
        model,
        rank=2,
        lora_alpha=4,
        # The first that matches holds.
        alpha_pattern={"first": 6, ".*": 8},
        rank_pattern={"second": 4},
    )
    first, second = srlora_layers(model)
    assert (first.lora_alpha, second.lora_alpha) == (6, 8)
    assert (first.scale, second.scale) == (3.0, 2.0)
    assert_close(called(model, x), expected)


def test_an_alpha_pattern_survives_files(rng, tmp_path):
    model, x = encoder(), batch(rng)
    nudge(convert(model, alpha_pattern={"first": 6}))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(called(loaded, x), called(model, x))
    keras_srlora.save_adapter(model, tmp_path / "a.safetensors")
    fresh = encoder()
    keras_srlora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert_close(called(fresh, x), called(model, x))


def test_layers_outside_of_the_alpha_pattern_keep_the_alpha():
    model = encoder()
    convert(model, lora_alpha=4, alpha_pattern={"second": 1})
    assert [layer.scale for layer in srlora_layers(model)] == [2.0, 0.5]


def test_rslora_scales_by_the_root_of_the_rank(rng, tmp_path):
    model, x = encoder(), batch(rng)
    nudge(
        convert(model, rank=4, target_rank=6, lora_alpha=8.0, use_rslora=True)
    )
    for layer in srlora_layers(model):
        assert layer.scale == pytest.approx(4.0)
    keras_srlora.save_adapter(model, tmp_path / "a.safetensors")
    fresh = encoder()
    keras_srlora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert_close(called(fresh, x), called(model, x))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(called(loaded, x), called(model, x))
    expected = called(model, x)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), expected)


# Layers that are trained in full, and saved with the adapter.


def with_norm(seed=7):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((WIDTH,))
    x = keras.layers.Dense(WIDTH, "tanh", name="first")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(WIDTH, "tanh", name="second")(x)
    x = keras.layers.Dense(WIDTH, "tanh", name="third")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


@pytest.mark.parametrize("names", [["norm", "third"], ["n.*", ".*third"]])
def test_modules_to_save_are_trained_and_saved(names, rng, tmp_path):
    model, x = with_norm(), batch(rng, 16)
    convert(model, names=["first", "second"], modules_to_save=names)
    full = ["norm/beta", "norm/gamma", "third/bias", "third/kernel"]
    assert others(model) == sorted([*full, "head/bias", "head/kernel"])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, batch(rng, 16, 3), batch_size=8, verbose=0)
    # Always, without `include_trainable`; the head is told as before.
    with collected_warnings() as messages:
        keras_srlora.save_adapter(model, tmp_path / "a.safetensors")
    assert not any("norm" in text or "third" in text for text in messages)
    fresh = with_norm()
    # The head is not in the file.
    for a, b in zip(
        fresh.get_layer("head").weights, model.get_layer("head").weights
    ):
        a.assign(to_numpy(b))
    keras_srlora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert_close(called(fresh, x), called(model, x))
    trained = [p for p in others(fresh) if "head" not in p]
    assert trained == full


def test_modules_to_save_are_not_converted():
    model = with_norm()
    made = keras_srlora.enable_srlora(model, 2, modules_to_save=["third"])
    assert {layer.name for layer in made} == {"first", "second"}
    assert type(model.get_layer("third")) is keras.layers.Dense
    assert "third/kernel" in paths(model.trainable_variables)


def test_modules_to_save_of_a_kerashub_backbone(tmp_path):
    pytest.importorskip("keras_hub")
    bert = tiny_bert(num_layers=1)
    keras_srlora.enable_srlora(
        bert, 2, modules_to_save=[".*layer_norm", "pooled_dense"]
    )
    left = {path.split("/")[-2] for path in others(bert)}
    assert "pooled_dense" in left and any("norm" in name for name in left)
    assert "token_embedding" not in left


# Switched off, with more than the adapter trained.


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"bias": "srlora_only"}, "first/bias"),
        ({"bias": "all"}, "norm/beta"),
        ({"modules_to_save": ["norm"]}, "norm"),
    ],
)
def test_what_else_was_trained_is_named_when_switched_off(
    arguments, named, rng
):
    model, x = with_norm(), batch(rng, 16)
    with collected_warnings():
        convert(model, names=["first", "second"], **arguments)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(x, batch(rng, 16, 3), batch_size=8, verbose=0)
    with pytest.warns(UserWarning, match=named):
        with keras_srlora.adapter_disabled(model):
            pass


def test_a_head_is_not_named_when_switched_off(rng):
    """It has no pretrained value that one could go back to."""
    model, x = with_norm(), batch(rng, 16)
    convert(model, names=["first", "second"])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(x, batch(rng, 16, 3), batch_size=8, verbose=0)
    with keras_srlora.adapter_disabled(model):
        pass


def test_the_names_of_adapters_are_in_no_file_of_one(tmp_path):
    """A file is one adapter: it is loaded under any name."""
    made = files(tmp_path, {"a": SPECS["a"]})
    model = tuned_encoder()
    add_adapter(model, "one", made["a"][0])
    add_adapter(model, "two", made["a"][0])
    outputs = []
    x = np.ones((1, WIDTH), "float32")
    for name in ("one", "two"):
        keras_srlora.set_adapter(model, name)
        outputs.append(called(model, x))
    assert_close(*outputs)
    json.dumps(list(keras_srlora.list_adapters(model)))
