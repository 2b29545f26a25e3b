"""Tries an installed keras_srlora without its checkout: a fit and a merge."""

import importlib.metadata
import pathlib
import sys

import keras
import numpy as np

import keras_srlora

folder = pathlib.Path(keras_srlora.__file__).parent
assert folder.parent.name == "site-packages", folder
assert (folder / "py.typed").exists()
assert keras_srlora.__version__ == importlib.metadata.version("keras-srlora")

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [keras.Input((8,)), keras_srlora.SRLoRADense(8, rank=2, name="adapted")]
)
model.compile("adam", "mse")
x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
callback = keras_srlora.RecompositionCallback(interval=4)
model.fit(x, x[:, ::-1], epochs=4, verbose=0, callbacks=[callback])
before = model.predict(x, verbose=0)
keras_srlora.merge_srlora(model)
assert type(model.get_layer("adapted")) is keras.layers.Dense
np.testing.assert_allclose(model.predict(x, verbose=0), before, atol=1e-5)

# The core needs Keras, NumPy and one backend.
extras = {"keras_hub", "matplotlib", "safetensors", "tensorflow_datasets"}
assert not extras & set(sys.modules)
print(
    f"keras_srlora {keras_srlora.__version__} on {keras.backend.backend()}: "
    f"{len(callback.events)} pairs restarted, merged"
)
