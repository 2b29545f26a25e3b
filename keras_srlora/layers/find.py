"""Finding the SRLoRA layers of a model, and decomposing their kernels."""

import warnings

import keras

from keras_srlora.backend.keras_private.nesting import flatten_layers
from keras_srlora.backend.progress import Progress
from keras_srlora.backend.progress import check_verbose
from keras_srlora.files.directions import open_directions
from keras_srlora.layers import pairs
from keras_srlora.layers import placement
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.finite import check_finite_factors
from keras_srlora.layers.matching import check_record
from keras_srlora.layers.matching import find_record
from keras_srlora.layers.matching import take_back_record
from keras_srlora.layers.matching import warn_of_trained_factors
from keras_srlora.layers.paths import layer_paths
from keras_srlora.layers.requirements import check_initializable
from keras_srlora.layers.switched_off import check_switched_on


def srlora_layers(model) -> list:
    """The SRLoRA layers anywhere inside a model, in the order of the model.

    Not by paths: those of a model that was loaded from a file, or built again,
    may be others.

    Raises:
        ValueError: if there is none, or `model` is no model.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`model` must be a `keras.Model`. Received: {model!r}"
        )
    layers = [
        layer
        for layer in flatten_layers(model)
        if isinstance(layer, SRLoRALayer)
    ]
    if not layers:
        raise ValueError(
            f"Model {model.name!r} has no SRLoRA layer. Convert it with "
            "`keras_srlora.enable_srlora(model)` or build it with "
            "`keras_srlora.SRLoRADense`."
        )
    return layers


def match_records(layers):
    """Takes the layers' records back to the kernels that they have.

    Weights that come back without their record, as `EarlyStopping(
    restore_best_weights=True)` and `model.set_weights` bring them, are those of
    an earlier step. The record of later steps is dropped, with a warning.

    Raises:
        ValueError: before anything is changed, if a kernel is none that its
            layer ever had, or an adapter is switched off.
    """
    check_switched_on(layers)
    counts = {
        layer: find_record(layer) for layer in layers if layer.initialized
    }
    late = [x for x, n in counts.items() if n < len(x.record.events)]
    for layer in late:
        take_back_record(layer, counts[layer])
    if late:
        warnings.warn(
            f"{len(late)} SRLoRA layers have the weights of an earlier step, "
            "as `EarlyStopping(restore_best_weights=True)` restores them, "
            f"such as {[layer.path for layer in late[:3]]}. Their records were "
            "taken back to it.",
            stacklevel=3,
        )


def require_records(layers):
    """As `match_records`, for callers that need the pretrained kernels.

    Raises:
        ValueError: likewise, and if a layer is not built, or has trained
            factors and no record.
    """
    for layer in layers:
        if not layer.built:
            check_initializable(layer)
    match_records(layers)
    for layer in layers:
        check_record(layer)


def initialize_factors(model, directions=None, verbose="auto") -> list:
    """Decomposes the kernels of the SRLoRA layers that are not decomposed yet.

    `RecompositionCallback` and `Recomposer` do this when training starts. Call
    it yourself to do it earlier, after the pretrained weights are loaded.

    Args:
        model: a built `keras.Model` with SRLoRA layers.
        directions: path of a file that stores the directions for the next run,
            as in `enable_srlora`. Defaults to `None`.
        verbose: `"auto"`, 0 or 1, as in `enable_srlora`.

    Returns:
        List of the SRLoRA layers, in the order of the model.

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
        check_initializable(layer)
    fresh = [layer for layer in layers if not layer.initialized]
    check_finite_factors(fresh)
    placement.warn_of_whole_factors(fresh)
    paths = layer_paths(model)
    with open_directions(directions, fresh, paths) as file:
        decompose_kernels(fresh, file=file, verbose=verbose)
    return layers


def decompose_kernels(layers, recipe=None, file=None, verbose="auto"):
    """Decomposes the kernels of checked layers, one after the other.

    Args:
        layers: list of built SRLoRA layers.
        recipe: the `Recipe` by which their pairs start; `None`: their own.
        file: an open `DirectionsFile`, or `None`.
        verbose: as in `enable_srlora`.
    """
    warn_of_trained_factors(layers)
    progress = Progress(len(layers), verbose)
    for done, layer in enumerate(layers, 1):
        pairs.start_pairs(layer, recipe or layer.recipe, file)
        progress.update(done)
