"""The one place that touches private Keras API.

Each function names the private API that it needs, and why there is no public
way. The tests of `tests/backend/test_keras_*.py` fail when Keras changes one of
them.

| module | what it reaches |
|---|---|
| `nesting` | layers inside of layers, their variables and names |
| `kernels` | where a layer stores its kernel, a quantized one too |
| `pinned` | variables that stay frozen when their layer is thawed |
| `graph` | the order in which a functional model calls its layers |
| `fit_state` | what `fit`, models and optimizers keep about a run |
| `rebuilding` | an optimizer that is built a second time |
| `compiled` | functions that were compiled before a layer changed |
| `quantizing` | a check before Keras quantizes |
| `presets` | whether KerasHub is writing a preset |
"""
