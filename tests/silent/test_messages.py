"""Errors say what is wrong, where, what was received and what to do."""

import keras
import numpy as np
import pytest
from pieces import WIDTH
from pieces import assert_unchanged
from pieces import collected_warnings
from pieces import convert
from pieces import encoder
from pieces import state_of
from pieces import tuned_encoder

import keras_srlora
from keras_srlora import enable_srlora

# Names of layers.


@pytest.mark.parametrize("empty", [[], (), {}, set()])
def test_an_empty_list_of_targets_is_named(empty):
    model = encoder()
    before = state_of(model)
    with pytest.raises(ValueError) as caught:
        enable_srlora(model, 2, target_layer_names=empty)
    message = str(caught.value)
    assert "target_layer_names" in message and "Received" in message
    assert "exclude_layer_names" not in message
    assert_unchanged(model, before)


def test_an_empty_list_of_exclusions_excludes_nothing():
    model = encoder()
    made = enable_srlora(
        model, 2, target_layer_names=["first"], exclude_layer_names=[]
    )
    assert len(made) == 1


def test_exclusions_that_leave_nothing_are_named():
    with pytest.raises(ValueError, match="exclude_layer_names"):
        enable_srlora(
            encoder(),
            2,
            target_layer_names=["first"],
            exclude_layer_names=["first"],
        )


@pytest.mark.parametrize(
    "argument",
    ["target_layer_names", "exclude_layer_names", "rank_pattern"],
)
@pytest.mark.parametrize("bad", ["*dense", "(first", "[", ""])
def test_an_expression_that_is_none_is_named(argument, bad):
    """Not an error of the module `re`, which names nothing."""
    model = encoder()
    value = {bad: 2} if argument.endswith("pattern") else [bad]
    arguments = {"target_layer_names": ["first"], argument: value}
    with pytest.raises(ValueError, match=argument):
        enable_srlora(model, 2, **arguments)


@pytest.mark.parametrize(
    "argument",
    ["target_layer_names", "exclude_layer_names", "rank_pattern"],
)
@pytest.mark.parametrize("bad", [3, [None], [3], "first"])
def test_what_is_no_list_of_names_is_named(argument, bad):
    arguments = {"target_layer_names": ["first"], argument: bad}
    with pytest.raises(ValueError, match=argument):
        enable_srlora(encoder(), 2, **arguments)


# Layers that are not built.


def unbuilt():
    layer = keras_srlora.SRLoRADense(WIDTH, rank=2, name="hidden")
    return keras.Sequential([layer, keras.layers.Dense(3)], name="classifier")


FUNCTIONS = {
    "initialize_factors": lambda m, f: keras_srlora.initialize_factors(m),
    "merge_srlora": lambda m, f: keras_srlora.merge_srlora(m),
    "unload_srlora": lambda m, f: keras_srlora.unload_srlora(m),
    "save_adapter": lambda m, f: keras_srlora.save_adapter(
        m, f / "a.safetensors"
    ),
    "load_adapter": lambda m, f: keras_srlora.load_adapter(m, saved(f)),
    "export_lora": lambda m, f: keras_srlora.export_lora(m, f / "a.lora.h5"),
    "export_peft": lambda m, f: keras_srlora.export_peft(
        m, f / "peft", modules={"hidden": "hidden"}
    ),
    "adapter_disabled": lambda m, f: keras_srlora.adapter_disabled(
        m
    ).__enter__(),
    "print_trainable_parameters": lambda m, f: (
        keras_srlora.print_trainable_parameters(m)
    ),
    "load_plain_weights": lambda m, f: keras_srlora.load_plain_weights(
        m, weights(f)
    ),
    "SensitivityOptimizer": lambda m, f: keras_srlora.SensitivityOptimizer(
        keras.optimizers.Adam(), m
    ),
    "add_adapter": lambda m, f: keras_srlora.add_adapter(m, "other"),
    "set_adapter": lambda m, f: keras_srlora.set_adapter(m, "default"),
}


def saved(folder):
    path = folder.parent / "saved.safetensors"
    keras_srlora.save_adapter(tuned_encoder(), path)
    return path


def weights(folder):
    path = folder.parent / "saved.weights.h5"
    encoder().save_weights(path)
    return path


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_layer_that_is_not_built_is_named(function, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    model = unbuilt()
    with pytest.raises(ValueError) as caught:
        FUNCTIONS[function](model, folder)
    message = str(caught.value)
    if function == "load_plain_weights":
        # Of Keras itself.
        assert "not yet been built" in message
        return
    assert "None" not in message
    assert "not built" in message
    assert "hidden" in message or "classifier" in message
    assert list(folder.iterdir()) == []


METHODS = {
    "enable_lora": lambda layer: layer.enable_lora(2),
    "initialize_factors": lambda layer: layer.initialize_factors(),
    "effective_kernel": lambda layer: layer.effective_kernel(),
    "quantize": lambda layer: layer.quantize("int8", type_check=False),
    "factors": lambda layer: layer.factors,
    "Sensitivity": lambda layer: keras_srlora.Sensitivity([layer]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dense", "einsum"])
def test_a_method_of_a_layer_that_is_not_built_names_it(method, kind):
    if kind == "dense":
        layer = keras_srlora.SRLoRADense(4, rank=2, name="hidden")
    else:
        layer = keras_srlora.SRLoRAEinsumDense(
            "ab,bc->ac", 4, rank=2, name="hidden"
        )
    # A property that Keras or Python asks for raises `AttributeError`.
    with pytest.raises((ValueError, AttributeError)) as caught:
        METHODS[method](layer)
    message = str(caught.value)
    assert "hidden" in message and "None" not in message
    assert "NoneType" not in message


def test_the_message_of_enable_lora_is_about_the_factors():
    (layer, _) = convert(encoder())
    with pytest.raises(ValueError, match="merge_srlora") as caught:
        layer.enable_lora(2)
    assert "'first'" in str(caught.value)


def test_fit_builds_a_layer_that_is_not_built_or_names_it(rng):
    model = unbuilt()
    model.compile("adam", "mse")
    x = rng.standard_normal((8, WIDTH)).astype("float32")
    try:
        model.fit(
            x,
            x[:, :3],
            batch_size=4,
            verbose=0,
            callbacks=[keras_srlora.RecompositionCallback()],
        )
    except ValueError as error:
        assert "hidden" in str(error) and "None" not in str(error)


# What is no model.


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("wrong", [None, "model", 3, [], keras.layers.Dense(2)])
def test_what_is_no_model_is_refused_by_name(function, wrong, tmp_path):
    """Two arguments in the wrong order, a list, a layer."""
    if function == "SensitivityOptimizer" and wrong == []:
        pytest.skip("a list of layers is welcome there")
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises((ValueError, TypeError)) as caught:
        FUNCTIONS[function](wrong, folder)
    message = str(caught.value)
    assert "keras.Model" in message or "There is nothing" in message
    assert list(folder.iterdir()) == []


def test_a_layer_inside_of_a_frozen_run_is_named():
    """The error of a model without SRLoRA layers names the model."""
    model = encoder(name="plain_one")
    for function in ("merge_srlora", "initialize_factors"):
        with pytest.raises(ValueError, match="plain_one"):
            getattr(keras_srlora, function)(model)


# Numbers that are none.


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 0},
        {"rank": 2.0},
        {"rank": "2"},
        {"rank": None},
        {"target_rank": 1},
        {"lora_alpha": 0},
        {"lora_alpha": float("nan")},
        {"lora_alpha": np.float32("nan")},
        {"lora_alpha": True},
        {"rank_pattern": {"first": 0}},
        {"rank_pattern": {"first": 2.5}},
        {"alpha_pattern": {"first": 0}},
        {"alpha_pattern": {"first": float("inf")}},
        {"alpha_pattern": {"nothing": 2}},
        {"alpha_pattern": ["first"]},
        {"modules_to_save": ["nothing"]},
        {"modules_to_save": "second"},
        {"use_rslora": "yes"},
    ],
)
def test_an_argument_that_makes_no_sense_is_named(arguments):
    model = encoder()
    before = state_of(model)
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=name.split("_pattern")[0]) as caught:
        enable_srlora(
            model, **{"rank": 2, "target_layer_names": ["first"], **arguments}
        )
    assert "Received" in str(caught.value)
    assert_unchanged(model, before)
    with collected_warnings():
        convert(model)


@pytest.mark.parametrize("function", ["save_adapter", "load_adapter", "add"])
def test_a_folder_in_place_of_a_file_is_named(function, tmp_path):
    """Not "No such device", nor the name of a file that nobody knows."""
    model = tuned_encoder()
    before = state_of(model)
    with pytest.raises(
        IsADirectoryError, match=f"{tmp_path.name}' is a folder"
    ):
        if function == "add":
            keras_srlora.add_adapter(model, "b", tmp_path)
        else:
            getattr(keras_srlora, function)(model, tmp_path)
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []


def test_directions_in_a_folder_are_named(tmp_path):
    model = encoder()
    before = state_of(model)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        convert(model, directions=tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("modules", [{"first": 5}, {1: "a"}, ["first"], "a"])
def test_modules_that_are_no_names_are_named(modules, tmp_path):
    with pytest.raises(ValueError, match="`modules` must be a dict"):
        keras_srlora.export_peft(tuned_encoder(), tmp_path, modules=modules)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_a_single_step_are_explained(rng):
    """A gradient reached the layer, whose second factor was zero before."""
    model = encoder()
    convert(model, recipe="lora_restarts")
    model.compile("adam", "mse")
    x = rng.standard_normal((32, WIDTH)).astype("float32")
    callback = keras_srlora.RecompositionCallback(interval=1)
    with collected_warnings() as messages:
        model.fit(x, x, batch_size=8, verbose=0, callbacks=[callback])
    assert any("a single step" in text for text in messages)
