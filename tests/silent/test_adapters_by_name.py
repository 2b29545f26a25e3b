"""Several adapters on one model: each computes what it did by itself."""

import keras
import numpy as np
import pytest
from pieces import NAMES
from pieces import WIDTH
from pieces import assert_close
from pieces import assert_unchanged
from pieces import batch
from pieces import called
from pieces import convert
from pieces import differ
from pieces import encoder
from pieces import nudge
from pieces import predicted
from pieces import state_of
from pieces import tuned_encoder
from support import to_numpy

import keras_srlora
from keras_srlora import add_adapter
from keras_srlora import combine_adapters
from keras_srlora import delete_adapter
from keras_srlora import list_adapters
from keras_srlora import set_adapter


def layers_of(model):
    return [model.get_layer(name) for name in NAMES]


def trained(model, rng, interval=3):
    """Trains the current adapter, with recompositions."""
    model.compile(keras.optimizers.Adam(0.05), "mse")
    x, y = batch(rng, 32), batch(rng, 32)
    callback = keras_srlora.RecompositionCallback(interval=interval)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[callback])


def saved(path, recipe="paper", seed=3, **arguments):
    """Writes an adapter file, and returns what its model computes."""
    model = encoder()
    nudge(convert(model, recipe, **arguments), seed)
    keras_srlora.save_adapter(model, path)
    return lambda x: called(model, x)


@pytest.mark.parametrize("recipe", ["paper", "lora_restarts"])
def test_each_adapter_computes_what_it_did(recipe, rng, tmp_path):
    x, pretrained = batch(rng), encoder()
    of_file = saved(tmp_path / "file", recipe)
    model = encoder()
    convert(model, recipe)
    trained(model, rng)
    first = predicted(model, x)
    assert list_adapters(model) == ["default"]
    assert add_adapter(model, "file", tmp_path / "file") == "default"
    assert_close(predicted(model, x), of_file(x))
    add_adapter(model, "fresh")
    assert_close(predicted(model, x), predicted(pretrained, x))
    trained(model, rng)
    third = predicted(model, x)
    assert differ(third, first) and differ(third, of_file(x))
    assert list_adapters(model) == ["default", "file", "fresh"]
    expected = {"default": first, "file": of_file(x), "fresh": third}
    for name in ["default", "fresh", "file", "default", "file", "fresh"]:
        set_adapter(model, name)
        assert_close(predicted(model, x), expected[name])
        assert_close(called(model, x), expected[name])
    with keras_srlora.adapter_disabled(model):
        assert_close(predicted(model, x), predicted(pretrained, x))


def test_the_current_adapter_is_saved_trained_and_merged(rng, tmp_path):
    x, model = batch(rng), tuned_encoder()
    first = called(model, x)
    add_adapter(model, "other")
    trained(model, rng)
    second = called(model, x)
    keras_srlora.save_adapter(model, tmp_path / "other")
    fresh = encoder()
    keras_srlora.load_adapter(fresh, tmp_path / "other")
    assert_close(called(fresh, x), second)
    set_adapter(model, "default")
    assert_close(called(model, x), first)
    # Its run goes on, and the record is its own.
    trained(model, rng)
    set_adapter(model, "other")
    assert_close(called(model, x), second)
    keras_srlora.merge_srlora(model)
    assert_close(called(model, x), second)
    # What waited is gone with the layers that it was for.
    convert(model)
    assert list_adapters(model) == ["default"]


def test_switching_many_times_stays_exact(rng, tmp_path):
    saved(tmp_path / "b", seed=4)
    x, model = batch(rng), encoder()
    convert(model)
    trained(model, rng)
    first = called(model, x)
    add_adapter(model, "b", tmp_path / "b")
    second = called(model, x)
    for _ in range(50):
        set_adapter(model, "default")
        set_adapter(model, "b")
    assert_close(called(model, x), second)
    set_adapter(model, "default")
    assert_close(called(model, x), first)


def test_where_nothing_was_fused_switching_is_exact_to_the_bit(rng, tmp_path):
    saved(tmp_path / "b", "lora_restarts", seed=4)
    model = tuned_encoder("lora_restarts")
    before = state_of(model)
    add_adapter(model, "b", tmp_path / "b")
    for _ in range(3):
        set_adapter(model, "default")
        assert_unchanged(model, before)
        set_adapter(model, "b")


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="nothing is compiled"
)
def test_switching_compiles_nothing(rng, tmp_path):
    saved(tmp_path / "b", seed=4)
    model, x = tuned_encoder(), batch(rng)
    add_adapter(model, "b", tmp_path / "b")
    predicted(model, x)
    function = model.predict_function
    for name in ("default", "b"):
        set_adapter(model, name)
        assert_close(predicted(model, x), called(model, x))
        assert model.predict_function is function


def test_adapters_of_other_scales_are_computed_right(rng, tmp_path):
    of_file = saved(tmp_path / "b", lora_alpha=5.0)
    model, x = tuned_encoder(), batch(rng)
    first = predicted(model, x)
    add_adapter(model, "b", tmp_path / "b")
    assert_close(predicted(model, x), of_file(x))
    set_adapter(model, "default")
    assert_close(predicted(model, x), first)
    set_adapter(model, "b")
    assert_close(predicted(model, x), of_file(x))


def with_head():
    model = keras.Sequential(
        [encoder(), keras.layers.Dense(3, name="head")], name="model"
    )
    model.build((None, WIDTH))
    return model


def test_a_head_belongs_to_the_adapter_that_it_was_trained_with(rng):
    model, x = with_head(), batch(rng)
    nudge(convert(model))
    head = model.layers[-1].kernel
    first = predicted(model, x)
    add_adapter(model, "other")
    head.assign(to_numpy(head) + 1.0)
    nudge(layers_of(model.layers[0]), seed=9)
    second = predicted(model, x)
    set_adapter(model, "default")
    assert_close(predicted(model, x), first)
    # Also where it is frozen meanwhile, for inference.
    model.trainable = False
    set_adapter(model, "other")
    assert_close(predicted(model, x), second)


def test_biases_go_on_from_what_they_are_with_a_warning(rng):
    model, x = encoder(), batch(rng)
    nudge(convert(model, bias="srlora_only"))
    layers_of(model)[0].bias.assign(np.ones(WIDTH))
    first = predicted(model, x)
    with pytest.warns(UserWarning, match="first/bias"):
        add_adapter(model, "other")
    layers_of(model)[0].bias.assign(np.zeros(WIDTH))
    set_adapter(model, "default")
    assert_close(predicted(model, x), first)


def test_a_layer_that_an_adapter_does_not_name_is_the_pretrained_one(
    rng, tmp_path
):
    of_file = saved(tmp_path / "b", names=["second"])
    model, x = tuned_encoder(), batch(rng)
    first = called(model, x)
    add_adapter(model, "b", tmp_path / "b")
    assert_close(called(model, x), of_file(x))
    set_adapter(model, "default")
    assert_close(called(model, x), first)


def test_a_file_may_bring_layers_that_were_plain(rng, tmp_path):
    of_file = saved(tmp_path / "both")
    model, x = encoder(), batch(rng)
    nudge(convert(model, names=["first"]))
    first = predicted(model, x)
    add_adapter(model, "both", tmp_path / "both")
    assert_close(predicted(model, x), of_file(x))
    set_adapter(model, "default")
    assert_close(predicted(model, x), first)
    set_adapter(model, "both")
    assert_close(predicted(model, x), of_file(x))


def test_the_adapters_of_a_part_are_those_of_the_whole(rng, tmp_path):
    of_file = saved(tmp_path / "b")
    model, x = with_head(), batch(rng)
    nudge(convert(model))
    first = predicted(model, x)
    add_adapter(model.layers[0], "b", tmp_path / "b")
    assert list_adapters(model) == ["default", "b"]
    assert_close(predicted(model.layers[0], x), of_file(x))
    set_adapter(model, "default")
    assert_close(predicted(model, x), first)


# The weighted sum.


def update_of(model, pretrained):
    return [
        to_numpy(layer.effective_kernel()) - to_numpy(plain.kernel)
        for layer, plain in zip(layers_of(model), layers_of(pretrained))
    ]


@pytest.mark.parametrize("recipe", ["paper", "lora_restarts"])
def test_a_weighted_sum_is_exact(recipe, rng, tmp_path):
    pretrained, updates = encoder(), {}
    model = tuned_encoder(recipe)
    updates["default"] = update_of(model, pretrained)
    for seed, name in enumerate(("b", "c"), 5):
        saved(tmp_path / name, recipe, seed, lora_alpha=float(seed))
        add_adapter(model, name, tmp_path / name)
        updates[name] = update_of(model, pretrained)
    weights = {"default": 0.5, "b": np.float32(-1.5)}
    assert combine_adapters(model, weights, "sum") == "c"
    for i, actual in enumerate(update_of(model, pretrained)):
        expected = sum(w * updates[name][i] for name, w in weights.items())
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    x = batch(rng)
    total = predicted(model, x)
    # It is an adapter as any other.
    keras_srlora.save_adapter(model, tmp_path / "sum")
    other = encoder()
    keras_srlora.load_adapter(other, tmp_path / "sum")
    assert_close(called(other, x), total)
    set_adapter(model, "b")
    for actual, expected in zip(update_of(model, pretrained), updates["b"]):
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    set_adapter(model, "sum")
    assert_close(predicted(model, x), total)
    with keras_srlora.adapter_disabled(model):
        assert_close(called(model, x), called(pretrained, x))
    assert list_adapters(model) == ["default", "b", "c", "sum"]


def test_a_weighted_sum_can_be_trained_on(rng, tmp_path):
    saved(tmp_path / "b", "lora_restarts", seed=4)
    model = tuned_encoder("lora_restarts")
    add_adapter(model, "b", tmp_path / "b")
    combine_adapters(model, {"default": 1.0, "b": 1.0})
    before = update_of(model, encoder())
    trained(model, rng)
    assert differ(update_of(model, encoder())[0], before[0], 1e-3)


def test_an_adapter_scaled_by_zero_is_the_pretrained_model(rng):
    x, model = batch(rng), tuned_encoder()
    combine_adapters(model, {"default": 0.0}, "nothing")
    assert_close(called(model, x), called(encoder(), x))


def test_a_sum_of_too_high_a_rank_is_refused(tmp_path):
    arguments = {"rank": 1, "target_rank": 1, "recipe": "lora_restarts"}
    model = encoder()
    nudge(convert(model, **arguments))
    names = ["b", "c"]
    for seed, name in enumerate(names, 5):
        saved(tmp_path / name, seed=seed, **arguments)
        add_adapter(model, name, tmp_path / name)
    before = state_of(model)
    weights = dict.fromkeys(["default", *names], 1.0)
    with pytest.raises(ValueError, match="rank 3"):
        combine_adapters(model, weights)
    assert_unchanged(model, before)
    assert list_adapters(model) == ["default", "b", "c"]


# Refused, before anything changes.


def two_adapters():
    model = tuned_encoder()
    add_adapter(model, "other")
    return model


REFUSED = {
    "add_taken": lambda m: add_adapter(m, "default"),
    "add_current": lambda m: add_adapter(m, "other"),
    "add_empty": lambda m: add_adapter(m, ""),
    "add_number": lambda m: add_adapter(m, 3),
    "set_unknown": lambda m: set_adapter(m, "nobody"),
    "delete_unknown": lambda m: delete_adapter(m, "nobody"),
    "delete_current": lambda m: delete_adapter(m, "other"),
    "combine_unknown": lambda m: combine_adapters(m, {"nobody": 1.0}),
    "combine_empty": lambda m: combine_adapters(m, {}),
    "combine_list": lambda m: combine_adapters(m, ["default"]),
    "combine_nan": lambda m: combine_adapters(m, {"default": np.nan}),
    "combine_text": lambda m: combine_adapters(m, {"default": "1"}),
    "combine_taken": lambda m: combine_adapters(m, {"default": 1}, "other"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_makes_no_sense_is_refused(call):
    model = two_adapters()
    before = state_of(model)
    with pytest.raises(ValueError, match="Received"):
        REFUSED[call](model)
    assert_unchanged(model, before)
    assert list_adapters(model) == ["default", "other"]


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    keras_srlora.save_adapter(tuned_encoder(seed=8), tmp_path / "other")
    model = tuned_encoder()
    before = state_of(model)
    with pytest.raises(ValueError, match="pretrained"):
        add_adapter(model, "other", tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        add_adapter(model, "other", tmp_path / "nowhere")
    assert_unchanged(model, before)
    assert list_adapters(model) == ["default"]


def test_a_deleted_adapter_is_gone():
    model = two_adapters()
    delete_adapter(model, "default")
    assert list_adapters(model) == ["other"]
    with pytest.raises(ValueError, match="no adapter"):
        set_adapter(model, "default")


def test_other_weights_that_were_loaded_meanwhile_are_noticed(tmp_path):
    model = two_adapters()
    encoder(seed=8).save_weights(tmp_path / "other.weights.h5")
    keras_srlora.load_plain_weights(model, tmp_path / "other.weights.h5")
    before = state_of(model)
    with pytest.raises(ValueError, match="pretrained kernel"):
        set_adapter(model, "default")
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", ["add", "set", "combine", "list"])
def test_inside_of_adapter_disabled_it_is_refused(call):
    calls = {
        "add": lambda m: add_adapter(m, "third"),
        "set": lambda m: set_adapter(m, "default"),
        "combine": lambda m: combine_adapters(m, {"default": 1.0}),
        "list": list_adapters,
    }
    model = two_adapters()
    before = state_of(model)
    with keras_srlora.adapter_disabled(model):
        with pytest.raises(ValueError, match="adapter_disabled"):
            calls[call](model)
    assert_unchanged(model, before)


def test_a_plain_model_has_no_adapters():
    with pytest.raises(ValueError, match="no SRLoRA layer"):
        list_adapters(encoder())
