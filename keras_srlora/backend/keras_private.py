"""The one module that touches private Keras API.

Each function names the private API that it needs, and why.
`tests/backend/test_keras_private.py` fails when Keras changes one of them.
"""

import contextlib
import re

import keras
from keras import ops


def flatten_layers(layer):
    """Returns `layer` and every layer inside it, each once.

    `Model.layers` lists only the first level of a model; the projections of a
    KerasHub backbone are attributes of attributes. Private:
    `Layer._flatten_layers`.
    """
    return layer._flatten_layers(include_self=True, recursive=True)


def inside(layer):
    """The ids of a layer and of all layers inside of it."""
    return set(map(id, flatten_layers(layer)))


def unique_name(class_name):
    """`"SRLoRADense"` → `"srlora_dense"`, `"srlora_dense_1"`, ...

    As Keras names layers, from an acronym. `keras.backend.get_uid` is public;
    it is here because its count starts at 1.
    """
    prefix = "srlora" + re.sub("([A-Z])", r"_\1", class_name[6:]).lower()
    count = keras.backend.get_uid(prefix)
    return prefix if count == 1 else f"{prefix}_{count - 1}"


def automatic_name(layer):
    """The name that Keras gives a layer without one, or `None`.

    For example `"bert_backbone"` for a layer `"bert_backbone_2"`.
    Keras's own function, `keras.src.utils.naming.to_snake_case`, is private.
    """
    name = re.sub(r"\W+", "", type(layer).__name__)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    name = re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
    return name if re.fullmatch(rf"{name}(_\d+)?", layer.name) else None


def config_lists_layers(layer):
    """Whether the config of a layer has those of all layers inside of it.

    That of a functional or sequential model has, unless a subclass overrides
    it. Keras exports no class for functional models.
    """
    own = type(layer).get_config
    return own is keras.Sequential.get_config or (
        own.__module__ == "keras.src.models.functional"
    )


def variables_held(layer):
    """The variables that a layer itself holds, without its sublayers'.

    Private: `Layer._trainable_variables`, `Layer._non_trainable_variables`.
    """
    return layer._trainable_variables + layer._non_trainable_variables


@contextlib.contextmanager
def classes_named_as(names):
    """For a moment, gives classes other names: `{class: name}`.

    Keras names the groups of a weights file after the classes of the layers of
    a functional or sequential model (`saving_lib._load_container_state`), and
    has no argument for other names.
    """
    own = {cls: cls.__name__ for cls in names}
    try:
        for cls, name in names.items():
            cls.__name__ = name
        yield
    finally:
        for cls, name in own.items():
            cls.__name__ = name


class unlocked:
    """Lets weights be added to a layer that is already built.

    `Layer.enable_lora` does the same inside Keras. Private: `Layer._tracker`.
    """

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        self.was_locked = self.layer._tracker.locked
        self.layer._tracker.unlock()

    def __exit__(self, *exception):
        if self.was_locked:
            self.layer._tracker.lock()


def set_variable_trainable(layer, variable, trainable):
    """Moves a variable of a layer between its two lists of variables.

    `variable.trainable = False` alone does not last: `layer.trainable = True`
    sets the flag of every variable that was *tracked* as trainable, so that a
    frozen kernel would thaw. Private: `Layer._untrack_variable`,
    `Layer._track_variable`.
    """
    with unlocked(layer):
        layer._untrack_variable(variable)
        variable.trainable = trainable
        layer._track_variable(variable)


def remove_variable(layer, variable):
    """Takes a variable out of a built layer. Private: `_untrack_variable`."""
    with unlocked(layer):
        layer._untrack_variable(variable)


def stored_kernel(layer):
    """The variable of a kernel, or of an embedding table.

    `layer.kernel` is a property that computes a tensor for a quantized layer
    or one with low-rank factors. Private: `Dense._kernel`,
    `Embedding._embeddings`.
    """
    if isinstance(layer, keras.layers.Embedding):
        return layer._embeddings
    return layer._kernel


def unpacked_kernel(layer):
    """The stored kernel, whose int4 entries lie two in a byte, unpacked.

    By the property of the plain class: that of an SRLoRA layer is the effective
    kernel. Private: no name, but the property is Keras's own.
    """
    for plain in (keras.layers.Dense, keras.layers.EinsumDense):
        if isinstance(layer, plain):
            return plain.kernel.fget(layer)
    return stored_kernel(layer)


def kernel_shape(layer):
    """Shape of the kernel, which int4 stores flat, two entries a byte.

    Private: `Dense._orig_input_dim`, `Dense._orig_output_dim`; that of an
    `EinsumDense` has no underscore.
    """
    if layer.quantization_mode != "int4":
        return tuple(stored_kernel(layer).shape)
    if isinstance(layer, keras.layers.EinsumDense):
        return tuple(layer.original_kernel_shape)
    return layer._orig_input_dim, layer._orig_output_dim


def kernel_scale(layer):
    """The scale of an int8 kernel, in the kernel's axes.

    That of an `EinsumDense` is stored in the axes of the output. Private:
    `EinsumDense._adjust_scale_for_dequant`.
    """
    scale = ops.convert_to_tensor(layer.kernel_scale)
    if isinstance(layer, keras.layers.EinsumDense):
        scale = layer._adjust_scale_for_dequant(scale)
    return scale


def kernel_constraint(layer):
    """The constraint of a kernel or of an embedding table; public names."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.embeddings_constraint
    return layer.kernel_constraint


def kernel_regularizer(layer):
    """The regularizer of a kernel or of an embedding table; public names."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.embeddings_regularizer
    return layer.kernel_regularizer


def stored_variables(layer):
    """A plain layer's variables, in the order of its weights file.

    `Dense.variable_serialization_spec`, without an underscore but not
    documented; where there is none, no quantization is supported.
    """
    mode = layer.quantization_mode
    if mode is None:
        names = ["kernel", "bias"]
    else:
        names = layer.variable_serialization_spec[mode]
    variables = [
        stored_kernel(layer)
        if name in ("kernel", "embeddings")
        else getattr(layer, name, None)
        for name in names
    ]
    return [v for v in variables if v is not None]


def call_quantized(layer, inputs, training, activation):
    """Calls a quantized layer as Keras does, with another activation.

    Private: `Dense._int8_call` and its like.
    """
    method = getattr(type(layer), f"_{layer.quantization_mode}_call")
    return method(_WithActivation(layer, activation), inputs, training)


class _WithActivation:
    def __init__(self, layer, activation):
        self._layer = layer
        self.activation = activation

    def __getattr__(self, name):
        return getattr(self._layer, name)


def replace_quantized_kernel(layer, kernel):
    """Makes a layer with an int8 or int4 kernel a plain one.

    Keras has no inverse of `Layer.quantize`. Private: `Dense._kernel`,
    `Layer._is_quantized`.
    """
    shape = kernel_shape(layer)
    for variable in stored_variables(layer):
        if variable is not layer.bias:
            remove_variable(layer, variable)
    for name in ("_kernel", "kernel_scale", "kernel_zero", "g_idx"):
        vars(layer).pop(name, None)
    layer._is_quantized = False
    layer.quantization_config = None
    # "int8_from_float32" → "float32"
    layer.dtype_policy = layer.dtype_policy.get_config()["source_name"]
    with unlocked(layer):
        layer._kernel = layer.add_weight(
            name="kernel", shape=shape, regularizer=layer.kernel_regularizer
        )
    layer._kernel.assign(kernel)


def seed_states(model):
    """The states of all seed generators inside a model, in order.

    `Layer.variables` has them, among all others. Private:
    `Layer._seed_generators`.
    """
    return [
        generator.state
        for layer in flatten_layers(model)
        for generator in layer._seed_generators
    ]


def loss_metric(model):
    """The mean of the training loss over the epoch so far, or `None`.

    A model lists it first among its metrics, but for one whose `train_step`
    makes its own. Private: `Trainer._loss_tracker`.
    """
    return getattr(model, "_loss_tracker", None)


def get_initial_epoch(model):
    """Epoch at which a restored `fit` begins, or `None`.

    `BackupAndRestore` sets it. Private: `Trainer._initial_epoch`.
    """
    return model._initial_epoch


def set_initial_epoch(model, epoch):
    """Sets what `get_initial_epoch` returns, before the first epoch begins."""
    model._initial_epoch = epoch


def micro_batches_seen(optimizer):
    """Number of gradients that the optimizer received, as a variable.

    `optimizer.iterations` divides by `gradient_accumulation_steps`, which
    loses the place inside an accumulation. Private: `Optimizer._iterations`.
    """
    return optimizer._iterations


def accumulated_gradient(optimizer, variable):
    """The sum of the gradients of `variable` in the current accumulation.

    Private: `Optimizer._accumulated_gradients`, `_get_variable_index`.
    """
    index = optimizer._get_variable_index(variable)
    return optimizer._accumulated_gradients[index]


def optimizer_trainable_variables(optimizer):
    """The variables that a built optimizer was built for, in order.

    Private: `Optimizer._trainable_variables`.
    """
    return list(optimizer._trainable_variables)


def is_stock_optimizer(optimizer):
    """Whether the class comes with Keras, and its slots are known here.

    There is no public marker; the module of the class is one.
    """
    return type(optimizer).__module__.startswith("keras.")


def exchange_train_function(model, function):
    """Gives a model another train function, and returns the one it had.

    `fit` makes one only where the attribute is `None`. Its name is public,
    setting it is not documented.
    """
    old = model.train_function
    model.train_function = function
    return old


def compile_config(model):
    """An object that `Model.compile` makes anew each time.

    There is no public way to tell that a model was compiled again. Private:
    `Trainer._compile_config`.
    """
    return getattr(model, "_compile_config", None)


def keep_training(model, kept):
    """Keeps a wrapper and its compiled function with a model, for its next fit.

    Past Keras's `__setattr__`: neither tracked nor saved.
    """
    vars(model)["_srlora_training"] = kept


def get_kept_training(model):
    """Returns the pair that `keep_training` kept, or `None`."""
    return vars(model).get("_srlora_training")


def refresh_torch_parameters(model):
    """Makes `model.parameters()` list the variables that the layers have now.

    On torch, Keras lists them once, when a layer is built. Private:
    `TorchLayer._track_variables`.
    """
    if keras.backend.backend() != "torch":
        return
    for layer in flatten_layers(model):
        layer._track_variables()


def builds_when_called(layer):
    """Whether a layer has no `build` that makes its sublayers.

    Keras then builds it by a symbolic call. A model is built from its config.
    Private: the mark that `keras.src.utils.python_utils.default` leaves.
    """
    default = getattr(layer.build, "_is_default", False)
    return default and not isinstance(layer, keras.Model)


def in_symbolic_call():
    """Whether the code runs in the symbolic call of a layer.

    Variables that are made in there have no values until it ends. Keras exports
    the scope, `keras.StatelessScope`, but not the question.
    """
    from keras.src.backend.common import stateless_scope

    return stateless_scope.in_stateless_scope()
