"""The package as a package: what it imports, what it exports, what it uses."""

import pathlib
import re
import subprocess
import sys

import keras
import pytest

import keras_srlora
from keras_srlora import _keras

ROOT = pathlib.Path(keras_srlora.__file__).parent


def test_import_brings_no_other_backend_and_no_extra():
    backend = keras.backend.backend()
    others = {"tensorflow", "jax", "torch"} - {backend}
    extras = {"keras_hub", "tensorflow_datasets", "matplotlib"}
    program = (
        "import sys, keras\n"
        "before = set(sys.modules)\n"
        "import keras_srlora\n"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})\n"
    )
    added = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()[-1]
    assert "keras_srlora" in added.split()
    assert not (others | extras) & set(added.split())


def test_everything_public_is_documented():
    for name in keras_srlora.__all__:
        assert getattr(keras_srlora, name).__doc__, name
    api = ROOT.parent / "docs" / "api.md"
    if not api.exists():
        pytest.skip("installed without the documentation")
    text = api.read_text()
    missing = [
        n for n in keras_srlora.__all__ if f"keras_srlora.{n}" not in text
    ]
    assert not missing


def test_private_keras_is_used_in_one_module_only():
    own = {"_keras.py"}
    pattern = re.compile(
        r"keras\.src|\._(tracker|kernel|flatten_layers|iterations|"
        r"trainable_variables|inbound_nodes|keras_history|momentums)\b"
    )
    found = [
        (path.name, match.group())
        for path in sorted(ROOT.glob("*.py"))
        if path.name not in own
        for match in pattern.finditer(path.read_text())
    ]
    assert not found


# These fail when Keras changes one of the private names in `_keras.py`.


@pytest.fixture
def layer():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    return layer


def test_flatten_layers_reaches_attributes_of_attributes():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    inputs = keras.Input((4,))
    model = keras.Model(inputs, inner(inputs))
    names = {type(x).__name__ for x in _keras.flatten_layers(model)}
    assert {"Functional", "Sequential", "Dense"} <= names


def test_weights_can_be_added_and_removed_when_unlocked(layer):
    with pytest.raises(ValueError):
        layer.extra = layer.add_weight(shape=(2,), name="extra")
    with _keras.unlocked(layer):
        layer.extra = layer.add_weight(shape=(2,), name="extra")
    assert [v.name for v in layer.trainable_variables][-1] == "extra"
    with pytest.raises(ValueError):
        layer.more = layer.add_weight(shape=(2,), name="more")
    _keras.remove_variable(layer, layer.extra)
    assert len(layer.variables) == 2


def test_a_frozen_variable_stays_frozen(layer):
    kernel = _keras.stored_kernel(layer)
    _keras.set_variable_trainable(layer, kernel, False)
    layer.trainable = True
    assert [v.name for v in layer.trainable_variables] == ["bias"]
    _keras.set_variable_trainable(layer, kernel, True)
    assert len(layer.trainable_variables) == 2


def test_a_model_knows_that_it_was_called():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    assert not _keras.is_part_of_another_model(model)
    keras.Model(inputs, model(inputs))
    assert _keras.is_part_of_another_model(model)


def test_output_layers():
    inputs = keras.Input((4,))
    head = keras.layers.Dense(3)
    model = keras.Model(inputs, head(keras.layers.Dense(4)(inputs)))
    assert _keras.output_layers(model) == [head]


def test_optimizer_internals(layer):
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    optimizer.build(layer.trainable_variables)
    variables = _keras.optimizer_trainable_variables(optimizer)
    assert [id(v) for v in variables] == [
        id(v) for v in layer.trainable_variables
    ]
    gradients = [keras.ops.ones(v.shape) for v in variables]
    optimizer.apply(gradients, variables)
    assert int(_keras.micro_batches_seen(optimizer)) == 1
    accumulated = _keras.accumulated_gradient(optimizer, variables[0])
    assert float(keras.ops.convert_to_numpy(accumulated).mean()) == 1.0
    assert _keras.is_stock_optimizer(optimizer)


def test_compiled_functions_are_the_three_attributes(layer):
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile("sgd", "mse")
    model.make_train_function()
    assert model.train_function is not None
    _keras.drop_compiled_functions(model)
    assert model.train_function is None and model.predict_function is None


def test_files_name_layers_after_their_classes(tmp_path):
    class Renamed(keras.layers.Dense):
        pass

    def model(cls):
        return keras.Sequential([keras.Input((4,)), cls(3)])

    path = str(tmp_path / "a.weights.h5")
    model(keras.layers.Dense).save_weights(path)
    with _keras.classes_named_as({Renamed: "Dense"}):
        model(Renamed).load_weights(path)
    assert Renamed.__name__ == "Renamed"


def test_unique_names():
    first = _keras.unique_name("SRLoRAEinsumDense")
    assert re.fullmatch(r"srlora_einsum_dense(_\d+)?", first)
    assert first != _keras.unique_name("SRLoRAEinsumDense")
