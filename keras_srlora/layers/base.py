"""`SRLoRALayer`: the base of the SRLoRA layers.

A thin Keras object: arguments, variables, the step path, config and weights.
Adding and removing factors is in `factors.py`; how a frozen kernel is stored in
`frozen.py`; starting, fusing and restarting pairs in `pairs.py`; a layer's
memory in `record.py`.
"""

from keras import ops

from keras_srlora.backend.arguments import as_python_number
from keras_srlora.backend.keras_private.kernels import call_quantized
from keras_srlora.backend.keras_private.kernels import kernel_constraint
from keras_srlora.backend.keras_private.kernels import stored_variables
from keras_srlora.backend.keras_private.nesting import unique_name
from keras_srlora.functional import contraction
from keras_srlora.layers import pairs
from keras_srlora.layers import weights_file
from keras_srlora.layers.companions import Companions
from keras_srlora.layers.factors import ARGUMENTS
from keras_srlora.layers.factors import LATER_ARGUMENTS
from keras_srlora.layers.factors import add_factors
from keras_srlora.layers.finite import check_finite_factors
from keras_srlora.layers.quantization import RefusesQuantization
from keras_srlora.layers.record import Record
from keras_srlora.layers.requirements import check_arguments
from keras_srlora.layers.requirements import check_built
from keras_srlora.layers.requirements import check_initializable
from keras_srlora.layers.requirements import check_nothing_beside
from keras_srlora.layers.requirements import check_quantization
from keras_srlora.layers.requirements import check_rank
from keras_srlora.recipes.definition import get_recipe


class SRLoRALayer(RefusesQuantization):
    """Mixin before a Keras layer whose kernel is to be frozen and adapted.

    The layer's variables: the kernel (frozen), two factors of shapes `(rank,
    in)` and `(rank, out)` (trainable), and the other variables of the plain
    layer. The first factor is the transpose of Keras's `(in, rank)`: a pair is
    a row of either factor, and the backward product `hᵀ @ x` that gives it is
    several times faster on a CPU than `xᵀ @ h`.

    A subclass defines how its kernel is a matrix (`read_plan`), and its forward
    pass where that is not `x @ kernel`.

    Attributes:
        record: `Record`, the layer's memory on the host.
        frozen: `FloatKernel` or `QuantizedKernel`, how the kernel is stored.
        companions: `Companions`, which train and are saved with the layer.
    """

    factor_names = "lora_kernel_a", "lora_kernel_b"
    # Whether `enable_srlora` converts such layers without being asked.
    converted_by_default = True
    modules_to_save: tuple

    def __init__(
        self,
        *args,
        rank=8,
        target_rank=None,
        lora_alpha=None,
        recipe="adaptive",
        decomposition="auto",
        train_bias=True,
        use_rslora=False,
        modules_to_save=(),
        **kwargs,
    ):
        if kwargs.get("lora_rank") is not None:
            raise ValueError(
                f"`{type(self).__name__}` takes `rank`, not Keras's "
                f"`lora_rank`. Received: lora_rank={kwargs['lora_rank']}"
            )
        check_arguments(
            rank, target_rank, lora_alpha, decomposition, use_rslora
        )
        recipe = get_recipe(recipe)
        if kwargs.get("name") is None:
            # Keras would make "sr_lo_ra_dense" of the class's name.
            kwargs["name"] = unique_name(type(self).__name__)
        super().__init__(*args, **kwargs)
        constraint = kernel_constraint(self)
        if constraint is not None:
            raise ValueError(
                "A kernel that is never materialised cannot be constrained "
                "(nor can one with Keras's own LoRA). Remove the argument. "
                f"Received: kernel_constraint={constraint} in "
                f"layer {self.name!r}."
            )
        self.set_arguments(
            rank=rank,
            target_rank=target_rank,
            lora_alpha=lora_alpha,
            recipe=recipe,
            decomposition=decomposition,
            train_bias=train_bias,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
        )

    def set_arguments(self, **arguments):
        """Takes checked arguments, when built or when converted.

        Those of `LATER_ARGUMENTS` may be left out.
        """
        arguments = {**LATER_ARGUMENTS, **arguments}
        for name in ARGUMENTS:
            # As Python's numbers, which a config in JSON can hold.
            setattr(self, name, as_python_number(arguments[name]))
        self.modules_to_save = tuple(self.modules_to_save)
        self.record = Record()
        self.companions = Companions()

    @staticmethod
    def read_plan(layer, input_ndim=None):
        """How the kernel of a plain or an SRLoRA layer is a matrix.

        Returns:
            A `Contraction`, for inputs of so many dimensions.
        """
        raise NotImplementedError

    # Building and converting.

    def build(self, input_shape):
        super().build(input_shape)
        try:
            check_quantization(self)
            check_rank(self.read_plan(self), self.rank, self.path)
        except ValueError:
            self.built = False
            raise
        add_factors(self)

    def enable_lora(self, *args, **kwargs):
        """Not available: the layer has its own factors."""
        raise ValueError(
            f"Layer {self.path or self.name!r} is an SRLoRA layer, which has "
            "factors of its own or will have them when it is built; Keras's "
            "LoRA cannot be enabled beside them. Use a plain layer, or call "
            "`keras_srlora.merge_srlora(model)` first."
        )

    # The step path.

    def call(self, inputs, training=None):
        y = self._project(inputs)
        if self.bias is not None:
            y = ops.add(y, self.bias)
        if self.activation is not None:
            y = self.activation(y)
        return y

    def quantized_call(self, inputs, training=None):
        """Keras calls it where the layer is quantized."""
        rows, arrange = contraction.as_rows(
            inputs, self.plan(len(inputs.shape))
        )
        low_rank = arrange(self._low_rank(rows))

        def activation(y):
            y = ops.add(y, low_rank)
            return y if self.activation is None else self.activation(y)

        return call_quantized(self, inputs, training, activation)

    def _project(self, inputs):
        """`x @ W + s · (x @ aᵀ) @ b`, in two dimensions throughout."""
        plan = self.plan(len(inputs.shape))
        rows, arrange = contraction.as_rows(inputs, plan)
        low_rank = self._low_rank(rows)
        kernel = self.frozen.variable
        if plan.kernel_is_a_matrix:
            size = (plan.in_features, plan.out_features)
            if tuple(kernel.shape) != size:
                kernel = ops.reshape(kernel, size)
            return arrange(ops.add(contraction.matmul(rows, kernel), low_rank))
        # Permuting the kernel in each step would copy it.
        y = ops.einsum(plan.equation, inputs, kernel)
        return ops.add(y, arrange(low_rank))

    def _low_rank(self, rows):
        """The term that is added to the product with the stored kernel."""
        a, b = self.factors
        hidden = contraction.matmul(rows, ops.transpose(a))
        if self.scale != 1.0:
            hidden = ops.multiply(hidden, self.scale)
        return self.frozen.add_fused(rows, contraction.matmul(hidden, b))

    # Properties for users.

    @property
    def scale(self) -> float:
        """`s = lora_alpha / rank`; 1 by default, as in the paper.

        With `use_rslora`, `lora_alpha / sqrt(rank)`.
        """
        alpha = self.rank if self.lora_alpha is None else self.lora_alpha
        return alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def factors(self) -> tuple:
        """The two trained variables `(a, b)`, one pair a row."""
        check_built(self)
        name_a, name_b = self.factor_names
        return getattr(self, name_a), getattr(self, name_b)

    @property
    def trains_factors(self) -> bool:
        """Whether neither the layer nor a factor is frozen."""
        return self.trainable and all(v.trainable for v in self.factors)

    @property
    def direction_count(self) -> int:
        """How many singular directions a run may visit: `target_rank` (8 ·
        rank by default), capped by the smaller side of the kernel.
        """
        plan = self.plan()
        wanted = self.target_rank or 8 * self.rank
        return min(wanted, plan.in_features, plan.out_features)

    @property
    def initialized(self) -> bool:
        """Whether the kernel was decomposed."""
        return self.record.initialized

    def effective_kernel(self):
        """The kernel of the plain layer that computes the same function.

        Returns:
            tensor of the kernel's shape, in float32 (float64 where the kernel
            is), not rounded to its dtype.
        """
        check_built(self)
        matrix = pairs.effective_matrix(self)
        return contraction.as_kernel(matrix, self.plan())

    def initialize_factors(self):
        """Decomposes the kernel that the layer has now, and starts the pairs.

        They start by the recipe: as LoRA's, or with a part of the kernel
        (PiSSA, arXiv 2404.02948). The layer's function does not change.

        Raises:
            ValueError: if the layer is not built, its kernel has an entry that
                is not finite, or pairs were fused beside a quantized kernel.
                Nothing is changed then.
        """
        check_initializable(self)
        check_finite_factors([self])
        check_nothing_beside(self)
        pairs.start_pairs(self, self.recipe)

    # Config and weights.

    def get_config(self):
        config = super().get_config()
        config.pop("lora_rank", None)
        return {**config, **self.get_arguments()}

    def get_arguments(self):
        """Arguments beside those of the plain layer, for JSON."""
        arguments = {name: getattr(self, name) for name in ARGUMENTS}
        arguments["modules_to_save"] = list(map(str, self.modules_to_save))
        # Its choices, not its name, whose meaning may change.
        return {**arguments, "recipe": self.recipe.to_dict()}

    def set_weights(self, weights):
        """As in Keras; takes the plain layer's list too (kernel and bias).

        The kernel is decomposed when training starts.
        """
        if len(weights) == len(stored_variables(self)):
            weights_file.load_plain(self, weights)
        else:
            super().set_weights(weights)

    def save_own_variables(self, store):
        weights_file.save(self, store)

    def load_own_variables(self, store):
        weights_file.load(self, store)
