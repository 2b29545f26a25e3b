"""Adding factors to a built layer, and taking them away."""

import functools

from keras import ops

from keras_srlora.backend.keras_private.kernels import kernel_regularizer
from keras_srlora.backend.keras_private.kernels import stored_kernel
from keras_srlora.backend.keras_private.kernels import stored_variables
from keras_srlora.backend.keras_private.nesting import remove_variable
from keras_srlora.backend.keras_private.nesting import set_variable_trainable
from keras_srlora.backend.keras_private.nesting import unlocked
from keras_srlora.layers import pairs
from keras_srlora.layers.frozen import freeze_kernel
from keras_srlora.layers.frozen import has_integers

ARGUMENTS = (
    "rank",
    "target_rank",
    "lora_alpha",
    "recipe",
    "decomposition",
    "train_bias",
    "use_rslora",
    "modules_to_save",
)
# Older files have none of these.
LATER_ARGUMENTS = {"use_rslora": False, "modules_to_save": ()}


def add_factors(layer):
    """Freezes the kernel of a built layer, and adds the factors."""
    # Once for each number of dimensions: eager torch asks in each call.
    layer.plan = functools.cache(functools.partial(layer.read_plan, layer))
    plan = layer.plan()
    stored = stored_kernel(layer)
    set_variable_trainable(layer, stored, trainable=False)
    bias = getattr(layer, "bias", None)
    if bias is not None and not layer.train_bias:
        set_variable_trainable(layer, bias, trainable=False)
    regularizer = kernel_regularizer(layer)
    sizes = plan.in_features, plan.out_features
    initializers = pairs.a_initializer(layer), "zeros"
    with unlocked(layer):
        for name, size, initializer in zip(
            layer.factor_names, sizes, initializers
        ):
            factor = layer.add_weight(
                name=name,
                shape=(layer.rank, size),
                initializer=initializer,
                regularizer=regularizer,
            )
            setattr(layer, name, factor)
        layer.frozen = freeze_kernel(layer)


def remove_factors(layer):
    """Undoes `set_arguments` and `add_factors`.

    The kernel, which the caller gave its final value, stays. The factors end at
    zero: a function that was compiled before and reads them adds nothing.
    """
    for name in layer.factor_names:
        factor = getattr(layer, name)
        factor.assign(ops.zeros(factor.shape, factor.dtype))
        remove_variable(layer, factor)
        # `delattr` of a variable collects garbage, 0.25 seconds.
        del vars(layer)[name]
    for name in (*ARGUMENTS, "record", "companions", "plan", "frozen"):
        delattr(layer, name)
    layer.lora_alpha = None  # Keras's own attribute
    for variable in stored_variables(layer):
        # Keras trains no kernel of integers, nor its scale.
        if variable is layer.bias or not has_integers(layer):
            set_variable_trainable(layer, variable, True)
