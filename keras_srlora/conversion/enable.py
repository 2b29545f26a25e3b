"""`enable_srlora`: plain layers to SRLoRA layers, in place."""

from __future__ import annotations

import warnings

import keras

from keras_srlora.backend import keras_private
from keras_srlora.backend.arguments import check_choice
from keras_srlora.backend.progress import check_verbose
from keras_srlora.conversion.containers import convert_layers
from keras_srlora.conversion.freezing import freeze_base
from keras_srlora.conversion.targets import find_biases
from keras_srlora.conversion.targets import find_ranks
from keras_srlora.conversion.targets import find_targets
from keras_srlora.conversion.targets import refuse_converted
from keras_srlora.files.directions import open_directions
from keras_srlora.functional.contraction import as_matrix
from keras_srlora.layers.find import decompose_kernels
from keras_srlora.layers.frozen import float_kernel
from keras_srlora.layers.kinds import ADAPTED
from keras_srlora.layers.placement import warn_of_whole_factors
from keras_srlora.layers.requirements import check_arguments
from keras_srlora.layers.requirements import check_finite_kernel
from keras_srlora.layers.requirements import check_quantization
from keras_srlora.layers.requirements import check_rank
from keras_srlora.recipes.definition import get_recipe

BIASES = ("none", "srlora_only", "all")


def enable_srlora(
    model: keras.Model,
    rank: int = 8,
    *,
    target_rank: int | None = None,
    lora_alpha: float | None = None,
    target_layer_names: list[str] | None = None,
    recipe="adaptive",
    decomposition: str = "auto",
    exclude_layer_names: list[str] | tuple = (),
    rank_pattern: dict[str, int] | None = None,
    bias: str = "none",
    directions=None,
    verbose="auto",
) -> list:
    """Converts the projections of a built model to SRLoRA layers, in place.

    The layers keep their names, paths and places; their kernels are decomposed
    now. Afterwards exactly the factors are trainable, the biases that `bias`
    says, and the head where there is one: of a KerasHub task, everything
    outside of its `backbone`; of a model of your own, the layers that make its
    outputs. `keras_srlora.print_trainable_parameters(model)` counts them.

    A model that was compiled before must be compiled again.

    Args:
        model: a built `keras.Model`, e.g. a KerasHub backbone or task.
        rank: int. Number of pairs a kernel. Defaults to `8`.
        target_rank: int, or `None` for `8 * rank`. How many singular directions
            a run may visit, capped by the smaller side of each kernel.
        lora_alpha: number, or `None` for `rank`. Scale `lora_alpha / rank`.
        target_layer_names: list of strings: names of layers, or regular
            expressions that match a whole path. `None`: all projections
            (`Dense`, `EinsumDense`) inside of composite layers, which in a
            transformer are those of attention and feed-forward; in a model that
            has none there, all `Dense` and `EinsumDense` layers but those that
            make its outputs. Kernels to a single number, such as the gate of a
            shared expert, and layers that the model never calls are left out.
        recipe: `"adaptive"` (LoRA that recomposes in long runs),
            `"lora_restarts"` (in short ones too), `"paper"` (SRLoRA as
            published) or a `Recipe`: how pairs start, which are fused, along
            what they restart, and when.
        decomposition: `"exact"`, `"randomized"` or `"auto"`.
        exclude_layer_names: list of strings, as in `target_layer_names`: layers
            that are left as they are. Defaults to none.
        rank_pattern: dict from names or expressions to ranks, for layers whose
            rank is not `rank`; the first that matches a layer holds, as in
            PEFT. Their `target_rank` and `lora_alpha`, where these are `None`,
            follow their own rank.
        bias: which biases of the pretrained part are trained, as in PEFT:
            `"none"`, `"srlora_only"` (of the converted layers) or `"all"`
            (normalization layers' `beta`, too; a `.keras` file of a functional
            model does not say which variables of a plain layer are frozen).
        directions: path of a file, such as `"bert.directions.safetensors"`,
            that keeps what was decomposed: what it holds of these kernels is
            read instead of decomposed, to the bit, and the rest is added. The
            package safetensors must be installed. Defaults to `None`.
        verbose: `"auto"`, 0 or 1: whether a progress bar is shown while kernels
            are decomposed; `"auto"`, on a terminal or in a notebook, where it
            takes longer than two seconds.

    Returns:
        List of the converted layers, ordered by their paths.

    Raises:
        ValueError: before anything is changed, if a name or expression matches
            nothing or a layer of another class, the model is not built, a layer
            was converted before or has Keras's LoRA, a rank is above the
            smaller side of a kernel, an equation is not one contraction, or a
            kernel has entries that are not finite. The message names the layer.
            Likewise if the file of `directions` is damaged or of another kind,
            or two of the layers have the same path there.

    Example:

    ```python
    backbone = keras_hub.models.BertBackbone.from_preset("bert_base_en")
    keras_srlora.enable_srlora(backbone, rank=8, target_rank=64)
    ```
    """
    check_arguments(rank, target_rank, lora_alpha, decomposition)
    check_choice("bias", bias, BIASES)
    check_verbose(verbose)
    layers = find_targets(model, target_layer_names, exclude_layer_names)
    ranks = find_ranks(model, layers, rank, rank_pattern)
    arguments = [
        {
            "rank": of_layer,
            "target_rank": target_rank,
            "lora_alpha": lora_alpha,
            "recipe": get_recipe(recipe),
            "decomposition": decomposition,
        }
        for of_layer in ranks
    ]
    for layer, of_layer in zip(layers, ranks):
        check_arguments(of_layer, target_rank, lora_alpha, decomposition)
        check_convertible(layer, of_layer)
    biases = find_biases(model, layers, bias)
    with open_directions(directions, layers) as file:
        convert_plain(model, layers, arguments, trained=biases)
        decompose_kernels(layers, file=file, verbose=verbose)
    return layers


def check_convertible(layer, rank):
    """Raises where a layer cannot become an SRLoRA layer."""
    refuse_converted([layer])
    path = layer.path or layer.name
    if type(layer) not in ADAPTED:
        raise ValueError(
            f"Layer {path!r} cannot be converted: only `keras.layers.Dense`, "
            "`EinsumDense` and `Embedding` themselves can, not other layers "
            f"or subclasses. Received: {type(layer).__name__}"
        )
    if not layer.built:
        raise ValueError(
            f"Layer {path!r} is not built: there is no kernel to decompose. "
            "Call the model on a batch first."
        )
    if layer.lora_enabled:
        raise ValueError(
            f"Layer {path!r} has Keras's LoRA enabled (rank "
            f"{layer.lora_rank}). Load the plain model and convert that."
        )
    check_quantization(layer)
    constraint = keras_private.kernel_constraint(layer)
    if constraint is not None:
        raise ValueError(
            f"Layer {path!r} has a kernel constraint, which needs the kernel "
            "that SRLoRA never materialises. "
            f"Received: kernel_constraint={constraint}"
        )
    check_rank(ADAPTED[type(layer)].read_plan(layer), rank, path)
    check_finite_kernel(float_kernel(layer), path)


def _warn_of_outer_model(model):
    if keras_private.is_part_of_another_model(model):
        warnings.warn(
            f"Model {model.name!r} is already a part of another model, whose "
            "compiled functions cannot be reached from here. If that model was "
            "used before (predict, evaluate, fit), call its `compile` again, "
            "or convert it instead: `enable_srlora(outer_model)`.",
            stacklevel=3,
        )


def plain_matrix(layer):
    """The kernel of a plain layer as a matrix of shape `(in, out)`."""
    plan = ADAPTED[type(layer)].read_plan(layer)
    return as_matrix(float_kernel(layer), plan)


def convert_plain(model, layers, arguments, trained=()):
    """Converts checked plain layers, with a dict of arguments for each.

    Their kernels are not decomposed yet. Everything else that is pretrained is
    frozen, but for the variables in `trained`.
    """
    _warn_of_outer_model(model)
    freeze_base(model, layers, trained)
    trained = {id(variable) for variable in trained}
    arguments = [
        {**of_layer, "train_bias": id(layer.bias) in trained}
        for layer, of_layer in zip(layers, arguments)
    ]
    convert_layers(model, layers, arguments)
    warn_of_whole_factors(layers)
    keras_private.drop_compiled_functions(model)
