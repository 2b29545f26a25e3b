"""Finding the SRLoRA layers of a model."""

import warnings

from keras_srlora import _devices
from keras_srlora import _keras
from keras_srlora._directions_file import open_directions
from keras_srlora._layer import SRLoRALayer
from keras_srlora._progress import Progress
from keras_srlora._progress import check_verbose


def srlora_layers(model):
    """The SRLoRA layers anywhere inside a model, ordered by their paths.

    Raises:
        ValueError: if there is none.
    """
    layers = [
        layer
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, SRLoRALayer)
    ]
    if not layers:
        raise ValueError(
            f"Model {model.name!r} has no SRLoRA layer. Convert it with "
            "`keras_srlora.enable_srlora(model)` or build it with "
            "`keras_srlora.SRLoRADense`."
        )
    # An unbuilt layer has no path yet. The sort keeps the order of equals.
    return sorted(layers, key=lambda layer: layer.path or layer.name)


def match_records(layers):
    """Sees to it that the layers' records are those of their kernels.

    Weights that come back without their record, as `EarlyStopping(
    restore_best_weights=True)` and `model.set_weights` bring them, are those of
    an earlier step: what was recorded after it is forgotten, with a warning.

    Raises:
        ValueError: before anything is changed, if a kernel is none that its
            layer ever had.
    """
    counts = {
        layer: layer.find_record() for layer in layers if layer.initialized
    }
    late = [x for x, n in counts.items() if n < len(x.adapter_state.history)]
    for layer in late:
        layer.take_back_record(counts[layer])
    if late:
        warnings.warn(
            f"{len(late)} SRLoRA layers have the weights of an earlier step, "
            "as `EarlyStopping(restore_best_weights=True)` restores them: "
            f"{[layer.path for layer in late[:3]]}. Their records were taken "
            "back to it.",
            stacklevel=3,
        )


def initialize_factors(model, directions=None, verbose="auto"):
    """Decomposes the kernels of the SRLoRA layers that are not decomposed yet.

    `RecompositionCallback` does it when `fit` starts. A loop of your own calls
    it once the pretrained weights are in place.

    Args:
        model: a built `keras.Model` with SRLoRA layers.
        directions: path of a file, as in `enable_srlora`, that keeps what was
            decomposed for the next time. Defaults to `None`.
        verbose: `"auto"`, 0 or 1, as in `enable_srlora`.

    Returns:
        List of the SRLoRA layers, ordered by their paths.

    Raises:
        ValueError: before anything is changed, if there is no SRLoRA layer, one
            is not built, a kernel has entries that are not finite, or the file
            cannot be used.

    Example:

    ```python
    model.load_weights("pretrained.weights.h5")
    keras_srlora.initialize_factors(model)
    ```
    """
    check_verbose(verbose)
    layers = srlora_layers(model)
    for layer in layers:
        layer.check_initializable()
    fresh = [layer for layer in layers if not layer.initialized]
    _devices.warn_of_whole_factors(fresh)
    with open_directions(directions, fresh) as file:
        decompose_kernels(fresh, file, verbose)
    return layers


def decompose_kernels(layers, file=None, verbose="auto"):
    """Decomposes the kernels of checked layers, one after the other.

    `file`: an open `DirectionsFile`, or `None`.
    """
    progress = Progress(len(layers), verbose)
    for done, layer in enumerate(layers, 1):
        layer.start_pairs(file)
        progress.update(done)
