"""`enable_srlora`: plain layers to SRLoRA layers, in place."""

from __future__ import annotations

import keras

from keras_srlora.backend.arguments import check_choice
from keras_srlora.backend.interrupts import held_interrupts
from keras_srlora.backend.keras_private.kernels import kernel_constraint
from keras_srlora.backend.progress import check_verbose
from keras_srlora.conversion.containers import convert_layers
from keras_srlora.conversion.freezing import freeze_base
from keras_srlora.conversion.holders import Holders
from keras_srlora.conversion.targets import bias_of
from keras_srlora.conversion.targets import check_model
from keras_srlora.conversion.targets import find_biases
from keras_srlora.conversion.targets import find_by_pattern
from keras_srlora.conversion.targets import find_modules
from keras_srlora.conversion.targets import find_targets
from keras_srlora.conversion.targets import refuse_converted
from keras_srlora.files.directions import open_directions
from keras_srlora.functional.contraction import as_matrix
from keras_srlora.layers.find import decompose_kernels
from keras_srlora.layers.frozen import float_kernel
from keras_srlora.layers.kinds import ADAPTED
from keras_srlora.layers.kinds import plain_class
from keras_srlora.layers.paths import LayerPath
from keras_srlora.layers.paths import layer_paths
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
    alpha_pattern: dict[str, float] | None = None,
    use_rslora: bool = False,
    bias: str = "none",
    modules_to_save: list[str] | tuple | None = None,
    directions=None,
    verbose="auto",
) -> list:
    """Converts the projections of a built model to SRLoRA layers, in place.

    The layers keep their names, paths and places, and their kernels are
    decomposed. Afterwards only these are trainable:

    - the factors, even of layers that were frozen before;
    - the biases that `bias` selects, and the layers in `modules_to_save`;
    - the head, if there is one and it was not frozen.

    The head of a KerasHub task is everything outside of its `backbone`. In
    another model the head is all layers after the last block with projections;
    in a model without blocks it is the last layer with a kernel. In a
    subclassed model the order of the attributes counts as the order of the
    layers, and a warning names trainable and frozen layers.
    `print_trainable_parameters` shows the numbers.

    Frozen variables stay frozen if you set `model.trainable` to `False` and to
    `True` again, and in a model that is loaded from a `.keras` file. Frozen
    batch normalization keeps its moving averages. To train a whole pretrained
    layer, name it in `modules_to_save`. `merge_srlora` and `unload_srlora` make
    all variables trainable that were trainable before.

    Other models that hold one of the layers use the converted layers, too.
    Their compiled functions are traced again, as is every `tf.function` that
    reads the layers and, on JAX, every `jax.jit` function. Their optimizers, if
    built, start anew at step 0. A frozen model around this one trains the
    factors. Functions that are compiled for good keep the plain layers: a
    concrete function, an exported model, the result of
    `jax.jit(...).lower(...).compile()`.

    Args:
        model: a built `keras.Model`, e.g. a KerasHub backbone or task.
        rank: int. Number of pairs in each kernel. Defaults to `8`.
        target_rank: int, or `None` for `8 * rank`. How many singular directions
            a run may visit, at most the smaller side of each kernel.
        lora_alpha: number, or `None` for `rank`. The update is scaled by
            `lora_alpha / rank`.
        target_layer_names: list of strings. Names of layers, or regular
            expressions that match a whole path. Defaults to `None`: all
            projections (`Dense`, `EinsumDense`) of attention and feed-forward,
            inside of composite layers and next to attention layers; in a model
            without any of these, all `Dense` and `EinsumDense` layers except
            the head. Kernels with a single output, such as the gate of a
            shared expert, and layers that the model never calls are left out.
        recipe: `"adaptive"` (LoRA that recomposes in long runs),
            `"lora_restarts"` (recomposes in short runs, too), `"paper"` (SRLoRA
            as published) or a `Recipe`. Defaults to `"adaptive"`.
        decomposition: `"exact"`, `"randomized"` or `"auto"`. How singular
            directions are computed. Defaults to `"auto"`: exact for small
            kernels, randomized for large ones.
        exclude_layer_names: list of strings, as in `target_layer_names`. Layers
            that are not converted. Defaults to none.
        rank_pattern: dict from names or regular expressions to ranks, for
            layers with another rank. The first that matches a layer is used, as
            in PEFT. `target_rank` and `lora_alpha`, if `None`, follow the
            layer's own rank.
        alpha_pattern: dict from names or regular expressions to numbers, for
            layers with another `lora_alpha`.
        use_rslora: bool. Whether the scale is `lora_alpha / sqrt(rank)`, as in
            rank-stabilized LoRA (arXiv 2312.03732). Defaults to `False`.
        bias: `"none"`, `"srlora_only"` (of the converted layers) or `"all"`
            (also `beta` of normalization layers). Which pretrained biases
            train, as in PEFT. Defaults to `"none"`.
        modules_to_save: list of strings, as in `target_layer_names`. Layers
            that train whole, for example a new embedding, and that
            `save_adapter` always saves. Defaults to none.
        directions: path of a file that stores singular directions, such as
            `"bert.directions.safetensors"`. Directions in the file are read,
            bit-equal; missing ones are computed and added. The package
            safetensors must be installed. Defaults to `None`.
        verbose: `"auto"`, 0 or 1. Whether a progress bar is shown while kernels
            are decomposed. Defaults to `"auto"`: on a terminal or in a
            notebook, after two seconds.

    Returns:
        List of the converted layers, in the order of the model.

    Raises:
        ValueError: before anything changes, if a name or expression matches
            nothing or a layer of another class, the model is not built, a layer
            was converted before or has Keras's LoRA, a rank is above the
            smaller side of a kernel, an equation is not one contraction, a
            kernel has entries that are not finite, another layer of any model
            holds the same kernel variable, the file of `directions` is damaged
            or of another kind, or two of the layers have the same path there.
            The message names the layer.

    Example:

    ```python
    backbone = keras_hub.models.BertBackbone.from_preset("bert_base_en")
    keras_srlora.enable_srlora(backbone, rank=8, target_rank=64)
    ```
    """
    check_arguments(rank, target_rank, lora_alpha, decomposition, use_rslora)
    check_choice("bias", bias, BIASES)
    check_verbose(verbose)
    check_model(model)
    modules = find_modules(
        model, () if modules_to_save is None else modules_to_save
    )
    layers = find_targets(
        model, target_layer_names, exclude_layer_names, modules
    )
    patterns = {
        "rank": find_by_pattern(
            model, layers, "rank_pattern", rank_pattern, rank
        ),
        "lora_alpha": find_by_pattern(
            model, layers, "alpha_pattern", alpha_pattern, lora_alpha
        ),
    }
    paths = layer_paths(model)
    shared = {
        "target_rank": target_rank,
        "recipe": get_recipe(recipe),
        "decomposition": decomposition,
        "use_rslora": use_rslora,
        "modules_to_save": tuple(
            LayerPath(paths[id(layer)], layer) for layer in modules
        ),
    }
    arguments = [
        {**shared, **dict(zip(patterns, values))}
        for values in zip(*patterns.values())
    ]
    for layer, of_layer in zip(layers, arguments):
        check_arguments(
            of_layer["rank"], target_rank, of_layer["lora_alpha"], decomposition
        )
        check_convertible(layer, of_layer["rank"])
    biases = find_biases(model, layers, bias)
    with open_directions(directions, layers, paths) as file:
        convert_plain(model, layers, arguments, biases, modules)
        decompose_kernels(layers, file=file, verbose=verbose)
    return layers


def check_convertible(layer, rank):
    """Raises where a layer cannot become an SRLoRA layer."""
    refuse_converted([layer])
    path = layer.path or layer.name
    if plain_class(layer) not in ADAPTED:
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
    constraint = kernel_constraint(layer)
    if constraint is not None:
        raise ValueError(
            f"Layer {path!r} has a kernel constraint, which needs the kernel "
            "that SRLoRA never materialises. "
            f"Received: kernel_constraint={constraint}"
        )
    check_rank(ADAPTED[plain_class(layer)].read_plan(layer), rank, path)
    check_finite_kernel(float_kernel(layer), path)


def plain_matrix(layer):
    """The kernel of a plain layer as a matrix of shape `(in, out)`."""
    plan = ADAPTED[plain_class(layer)].read_plan(layer)
    return as_matrix(float_kernel(layer), plan)


def convert_plain(model, layers, arguments, trained=(), modules=()):
    """Converts checked plain layers, with a dict of arguments for each.

    Their kernels are not decomposed yet. Everything else that is pretrained is
    frozen, but for the variables in `trained` and the layers in `modules`.
    """
    if not layers and not trained:
        return
    holders = Holders(model, layers)
    holders.refuse_shared_kernels()
    with held_interrupts():
        freeze_base(model, layers, trained, modules, holders.containers())
        trained = {id(variable) for variable in trained}
        arguments = [
            {**of_layer, "train_bias": id(bias_of(layer)) in trained}
            for layer, of_layer in zip(layers, arguments)
        ]
        convert_layers(holders.containers(), layers, arguments)
        warn_of_whole_factors(layers)
        holders.follow()
