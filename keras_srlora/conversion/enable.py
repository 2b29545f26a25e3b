"""`enable_srlora`: plain layers to SRLoRA layers, in place."""

from __future__ import annotations

import keras

from keras_srlora.backend.arguments import check_choice
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
from keras_srlora.conversion.targets import refuse_shared_kernels
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

    The layers keep their names, paths and places; their kernels are decomposed
    now. Afterwards exactly these are trainable:

    - the factors, even of layers that were frozen before;
    - the biases that `bias` names, and the layers in `modules_to_save`;
    - the head where there is one, unless it was frozen.

    The head of a KerasHub task is everything outside of its `backbone`. In
    another model it is the layers behind the last block with projections that
    are no blocks themselves; without blocks, the last layer with a kernel. A
    subclassed model is read by the order of its attributes, with a warning that
    names trainable and frozen layers. `print_trainable_parameters` counts.

    Variables that are frozen here stay frozen when `model.trainable` is set to
    `False` and to `True` again, and in a model that is loaded from a `.keras`
    file. Frozen batch normalization keeps its moving averages. To train a
    pretrained layer whole, name it in `modules_to_save`. `merge_srlora` and
    `unload_srlora` thaw all that was trainable before.

    Every model that holds one of the layers computes and trains the converted
    ones: its compiled functions are traced again, with TensorFlow every
    `tf.function` that reads the layers and with JAX every `jax.jit` function,
    too, and its optimizer, where it was built, starts anew, at step 0. A model
    around this one that was frozen whole trains the factors. Out of reach are
    functions that are compiled for good: a concrete function, an exported
    model, the result of `jax.jit(...).lower(...).compile()`.

    Args:
        model: a built `keras.Model`, e.g. a KerasHub backbone or task.
        rank: int. Number of pairs a kernel. Defaults to `8`.
        target_rank: int, or `None` for `8 * rank`. How many singular directions
            a run may visit, capped by the smaller side of each kernel.
        lora_alpha: number, or `None` for `rank`. Scale `lora_alpha / rank`.
        target_layer_names: list of strings: names of layers, or regular
            expressions that match a whole path. `None`: all projections
            (`Dense`, `EinsumDense`) of attention and feed-forward: those inside
            of composite layers, and those beside attention layers; in a model
            that has none of these, all `Dense` and `EinsumDense` layers but the
            head. Kernels to a single number, such as the gate of a shared
            expert, and layers that the model never calls are left out.
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
        alpha_pattern: dict from names or expressions to numbers, likewise for
            layers whose `lora_alpha` is another one.
        use_rslora: bool. Whether the scale is `lora_alpha / sqrt(rank)`, as
            rank-stabilized LoRA (arXiv 2312.03732) has it. Defaults to `False`.
        bias: which biases of the pretrained part are trained, as in PEFT:
            `"none"`, `"srlora_only"` (of the converted layers) or `"all"`
            (normalization layers' `beta`, too).
        modules_to_save: list of strings, as in `target_layer_names`: layers
            that are trained whole, a new embedding for example, and that
            `save_adapter` always saves. Defaults to none.
        directions: path of a file, such as `"bert.directions.safetensors"`,
            that keeps the directions: those of these kernels are read from it,
            bit-equal, and those that it lacks are computed and added. The
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
            smaller side of a kernel, an equation is not one contraction, a
            kernel has entries that are not finite, or another layer, of this
            model or any other, holds the same kernel variable. The message
            names the layer.
            Likewise if the file of `directions` is damaged or of another kind,
            or two of the layers have the same path there.

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
    refuse_shared_kernels(layers)
    holders = Holders(model, layers)
    freeze_base(model, layers, trained, modules, holders.containers())
    trained = {id(variable) for variable in trained}
    arguments = [
        {**of_layer, "train_bias": id(bias_of(layer)) in trained}
        for layer, of_layer in zip(layers, arguments)
    ]
    convert_layers(holders.containers(), layers, arguments)
    warn_of_whole_factors(layers)
    holders.follow()
