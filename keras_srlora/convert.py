"""`enable_srlora` and `merge_srlora`: plain layers to SRLoRA's and back."""

import difflib
import re
import warnings

import keras

from keras_srlora import _contraction
from keras_srlora import _devices
from keras_srlora import _keras
from keras_srlora._checks import check_arguments
from keras_srlora._checks import check_choice
from keras_srlora._checks import check_finite_kernel
from keras_srlora._checks import check_quantization
from keras_srlora._checks import check_rank
from keras_srlora._converted import ADAPTED
from keras_srlora._converted import PLAIN
from keras_srlora._converted import convert_layers
from keras_srlora._converted import inside
from keras_srlora._converted import merge_layers
from keras_srlora._directions_file import open_directions
from keras_srlora._layers import decompose_kernels
from keras_srlora._layers import srlora_layers
from keras_srlora._progress import check_verbose
from keras_srlora._quantized import float_kernel
from keras_srlora._recipes import get_recipe

BIASES = ("none", "srlora_only", "all")


def enable_srlora(
    model,
    rank=8,
    target_rank=None,
    lora_alpha=None,
    target_layer_names=None,
    recipe="adaptive",
    decomposition="auto",
    exclude_layer_names=(),
    rank_pattern=None,
    bias="none",
    directions=None,
    verbose="auto",
):
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
        recipe: `"adaptive"` (LoRA, recomposed where the loss is flat),
            `"lora_restarts"` (recomposed from early on), `"paper"` (SRLoRA as
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
    layers = _find_targets(model, target_layer_names, exclude_layer_names)
    ranks = _find_ranks(model, layers, rank, rank_pattern)
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
    biases = _find_biases(model, layers, bias)
    with open_directions(directions, layers) as file:
        convert_plain(model, layers, arguments, trained=biases)
        decompose_kernels(layers, file, verbose)
    return layers


def merge_srlora(model):
    """Turns every SRLoRA layer back into a plain one, in place.

    The kernel becomes the effective kernel, so that the outputs stay; factors,
    directions and record are dropped. Kernel and bias of these layers are
    trainable again; what else `enable_srlora` froze stays so until
    `model.trainable = True`. A compiled model gets its optimizer anew, at step
    0 and without moments.

    Args:
        model: a `keras.Model` with SRLoRA layers.

    Returns:
        List of the merged layers, plain `Dense` and `EinsumDense`.

    Raises:
        ValueError: if there is no SRLoRA layer, or one is not built.

    Example:

    ```python
    keras_srlora.merge_srlora(model)
    model.save("finetuned.keras")
    ```
    """
    layers = srlora_layers(model)
    for layer in layers:
        if not layer.built:
            layer.check_initializable()
    for layer in layers:
        layer.merge_factors()
    merge_layers(model, layers)
    _keras.drop_compiled_functions(model)
    _renew_optimizer(model)
    return layers


def _renew_optimizer(model):
    """The old one has slots of variables that are gone, and would save them."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        config = keras.saving.serialize_keras_object(optimizer)
        model.optimizer = keras.saving.deserialize_keras_object(config)
        model.optimizer.build(model.trainable_variables)


def load_plain_weights(model, filepath):
    """Loads the weights file of the plain model into one with SRLoRA layers.

    `model.load_weights` looks for the layers of a functional or sequential
    model under the names of their classes, so that it finds no `SRLoRADense` in
    a file that holds a `Dense`. The loaded kernels are the pretrained ones:
    factors start anew, and the kernels are decomposed when training starts.

    Args:
        model: a built `keras.Model` with SRLoRA layers, of the plain model's
            structure.
        filepath: path of a `.weights.h5` file of the plain model.

    Raises:
        ValueError: if there is no SRLoRA layer, or the file does not fit.

    Example:

    ```python
    plain_model.save_weights("pretrained.weights.h5")
    keras_srlora.load_plain_weights(model, "pretrained.weights.h5")
    ```
    """
    srlora_layers(model)
    names = {adapted: plain.__name__ for adapted, plain in PLAIN.items()}
    with _keras.classes_named_as(names):
        model.load_weights(filepath)


# Which layers.


def _find_targets(model, names, excluded=()):
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`model` must be a `keras.Model`. Received: {type(model)}"
        )
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so it has no kernels to "
            "decompose. Call it on a batch, or `model.build(input_shape)`."
        )
    everything = _keras.flatten_layers(model)
    if names is None:
        targets = _default_targets(model, everything)
        if not targets:
            _refuse_converted(everything)
            classes = sorted({type(layer).__name__ for layer in everything})
            raise ValueError(
                f"Model {model.name!r} has no `Dense` or `EinsumDense` layer "
                "to convert: there is none inside of a composite layer and "
                "none but those that make its outputs. Name the layers to "
                "convert in `target_layer_names`. Received: layers of the "
                f"classes {classes}"
            )
    else:
        targets = _named_targets(model, everything, names)
    _check_names("exclude_layer_names", excluded)
    left_out = set()
    for name in excluded:
        matched = _matched(everything, name)
        if not matched:
            _refuse_name("exclude_layer_names", model, everything, name)
        left_out.update(map(id, matched))
    kept = [layer for layer in targets if id(layer) not in left_out]
    if not kept:
        raise ValueError(
            f"`exclude_layer_names` leaves nothing of the {len(targets)} "
            f"layers to convert in model {model.name!r}. "
            f"Received: exclude_layer_names={excluded!r}"
        )
    _refuse_read_kernels(everything, kept)
    return sorted(kept, key=lambda layer: layer.path or layer.name)


def _default_targets(model, everything):
    projections = [
        x for x in everything if type(x) in ADAPTED and _is_matrix(x)
    ]
    first_level = {
        id(layer)
        for container in everything
        if isinstance(container, keras.Model)
        for layer in container.layers
    }
    deeper = [x for x in projections if id(x) not in first_level]
    if deeper:
        return deeper
    head = {id(layer) for layer in _keras.output_layers(model)}
    if not head:
        raise ValueError(
            f"Model {model.name!r} is a subclassed model, which does not say "
            "which of its layers make its outputs. Name the layers to convert "
            "in `target_layer_names`."
        )
    return [x for x in projections if id(x) not in head]


def _is_matrix(layer):
    """Whether a plain layer has a kernel whose rank can be lowered.

    One that the model never calls has none at all.
    """
    if not layer.built:
        return False
    shape = _keras.kernel_shape(layer)
    return not (type(layer) is keras.layers.Dense and 1 in shape)


def _refuse_read_kernels(everything, targets):
    """KerasHub's Gemma 4 multiplies by some kernels itself, not by a call."""
    names = ("gating_ffw", "gating_ffw_2", "ffw_linear", "dense")
    read = {
        id(getattr(container, name, None))
        for container in everything
        if ".gemma4." in type(container).__module__
        for name in names
    }
    found = sorted({x.name for x in targets if id(x) in read})
    if found:
        raise ValueError(
            "KerasHub's Gemma 4 multiplies by the kernels of some layers "
            "itself, where the factors would be left out. Pass "
            f"`exclude_layer_names={found}`."
        )


def _named_targets(model, everything, names):
    _check_names("target_layer_names", names)
    targets = {}
    for name in names:
        matched = _matched(everything, name)
        if not matched:
            _refuse_name("target_layer_names", model, everything, name)
        # An expression may match norms on its way; a name alone may not.
        projections = [x for x in matched if isinstance(x, tuple(ADAPTED))]
        targets.update((id(x), x) for x in projections or matched)
    return list(targets.values())


def _matched(layers, name):
    """The layers of a name, or whose whole path an expression matches."""
    return [
        layer
        for layer in layers
        if name == layer.name or re.fullmatch(name, layer.path or "")
    ]


def _check_names(argument, names):
    if isinstance(names, str) or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"`{argument}` must be a list of strings. "
            f"Received: {argument}={names!r}"
        )


def _refuse_name(argument, model, everything, name):
    known = {x.name: x.path for x in everything if type(x) in ADAPTED}
    near = difflib.get_close_matches(name, known) or sorted(known)
    raise ValueError(
        f"`{argument}` matches nothing in model {model.name!r}. There "
        f"are layers of {len(known)} names that could be converted, such as "
        f"{[(x, known[x]) for x in near[:3]]} (name, path). Received: {name!r}"
    )


def _find_ranks(model, layers, rank, pattern):
    """The rank of each layer, by the first name or expression that matches."""
    if pattern is None:
        return [rank] * len(layers)
    if not isinstance(pattern, dict):
        raise ValueError(
            "`rank_pattern` must be a dict from names to ranks. "
            f"Received: rank_pattern={pattern!r}"
        )
    _check_names("rank_pattern", pattern)
    ranks = {}
    for name, of_name in pattern.items():
        matched = _matched(layers, name)
        if not matched:
            _refuse_name("rank_pattern", model, layers, name)
        for layer in matched:
            ranks.setdefault(id(layer), of_name)
    return [ranks.get(id(layer), rank) for layer in layers]


def _find_biases(model, layers, bias):
    """The variables that `bias` names."""
    if bias == "none":
        return []
    if bias == "srlora_only":
        return [layer.bias for layer in layers if layer.bias is not None]
    return [v for v in model.variables if is_bias(v)]


def is_bias(variable):
    """Whether it is what PyTorch calls a bias, that of a norm included."""
    return variable.name.endswith("bias") or variable.name == "beta"


# Checks, all of them before the first change.


def _refuse_converted(layers):
    for layer in layers:
        if type(layer) in PLAIN:
            raise ValueError(
                f"Layer {layer.path!r} was already converted by "
                "`enable_srlora` (or is an SRLoRA layer). Call "
                "`keras_srlora.merge_srlora(model)` first to start anew."
            )


def check_convertible(layer, rank):
    """Raises where a layer cannot become an SRLoRA layer."""
    _refuse_converted([layer])
    path = layer.path or layer.name
    if type(layer) not in ADAPTED:
        raise ValueError(
            f"Layer {path!r} cannot be converted: only `keras.layers.Dense` "
            "and `keras.layers.EinsumDense` themselves can, not other layers "
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
    if layer.kernel_constraint is not None:
        raise ValueError(
            f"Layer {path!r} has a kernel constraint, which needs the kernel "
            "that SRLoRA never materialises. "
            f"Received: kernel_constraint={layer.kernel_constraint}"
        )
    # `_plan` looks only at what the plain layer has as well.
    check_rank(ADAPTED[type(layer)]._plan(layer), rank, path)
    check_finite_kernel(float_kernel(layer), path)


def _warn_of_outer_model(model):
    if _keras.is_part_of_another_model(model):
        warnings.warn(
            f"Model {model.name!r} is already a part of another model, whose "
            "compiled functions cannot be reached from here. If that model was "
            "used before (predict, evaluate, fit), call its `compile` again, "
            "or convert it instead: `enable_srlora(outer_model)`.",
            stacklevel=3,
        )


# The conversion.


def _freeze_base(model, targets, trained):
    """Freezes the pretrained part, all but the targets and some variables.

    `model.trainable = True` brings it back, but for what `convert_layers` moves
    out of its reach.
    """
    targets = {id(layer) for layer in targets}
    trained = {id(variable) for variable in trained}
    for part in _base_parts(model, targets):
        for layer in _keras.flatten_layers(part):
            kept = any(id(v) in trained for v in layer.variables)
            if not kept and not inside(layer) & targets:
                layer.trainable = False
            elif id(layer) not in targets:
                # Weights of its own, beside those of the layers inside.
                for variable in _keras.own_variables(layer):
                    variable.trainable = id(variable) in trained


def _base_parts(model, targets):
    base = getattr(model, "backbone", None)
    if isinstance(base, keras.Model):
        return [base]
    if _is_backbone(model):
        return [model]
    holding = [layer for layer in model.layers if inside(layer) & targets]
    if all(isinstance(layer, keras.Model) for layer in holding):
        return holding
    head = {id(layer) for layer in _keras.output_layers(model)}
    if not head:
        # A subclassed model does not say which of its layers are its head.
        return holding
    return [layer for layer in model.layers if id(layer) not in head]


def _is_backbone(model):
    # By name, so that keras_hub need not be imported.
    return any(
        cls.__name__ == "Backbone" and cls.__module__.startswith("keras_hub")
        for cls in type(model).__mro__
    )


def plain_matrix(layer):
    """The kernel of a plain layer as a matrix of shape `(in, out)`."""
    plan = ADAPTED[type(layer)]._plan(layer)
    return _contraction.as_matrix(float_kernel(layer), plan)


def convert_plain(model, layers, arguments, trained=()):
    """Converts checked plain layers, with a dict of arguments for each.

    Their kernels are not decomposed yet. Everything else that is pretrained is
    frozen, but for the variables in `trained`.
    """
    _warn_of_outer_model(model)
    _freeze_base(model, layers, trained)
    trained = {id(variable) for variable in trained}
    arguments = [
        {**of_layer, "train_bias": id(layer.bias) in trained}
        for layer, of_layer in zip(layers, arguments)
    ]
    convert_layers(model, layers, arguments)
    _devices.warn_of_whole_factors(layers)
    _keras.drop_compiled_functions(model)
