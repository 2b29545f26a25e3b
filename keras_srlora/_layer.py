"""What `SRLoRADense` and `SRLoRAEinsumDense` share: everything but the shape.

A thin Keras object over the pure functions: it owns the variables and the
state, and hands arrays to the functions below it.
"""

import keras
import numpy as np
from keras import ops

from keras_srlora import _contraction
from keras_srlora import _decomposition
from keras_srlora import _devices
from keras_srlora import _keras
from keras_srlora._checks import check_arguments
from keras_srlora._checks import check_finite_kernel
from keras_srlora._checks import check_quantization
from keras_srlora._checks import check_rank
from keras_srlora._quantized import INTEGER_MODES
from keras_srlora._quantized import float_kernel
from keras_srlora._quantized import is_quantized
from keras_srlora._quantized import rows_beside_kernel
from keras_srlora._recipes import get_recipe
from keras_srlora._recomposition import effective_kernel
from keras_srlora._recomposition import in_full
from keras_srlora._recomposition import recompose_pairs
from keras_srlora._recomposition import relative_change
from keras_srlora._slots import row_mask
from keras_srlora._state import HISTORY
from keras_srlora._state import AdapterState

FACTORS = ("lora_kernel_a", "lora_kernel_b")
# Beside a quantized kernel: what was fused, and what was subtracted.
FUSED = ("fused_kernel_a", "fused_kernel_b")
HALF_PRECISION = ("bfloat16", "float16")
ARGUMENTS = (
    "rank",
    "target_rank",
    "lora_alpha",
    "recipe",
    "decomposition",
    "train_bias",
)


class SRLoRALayer:
    """Mixin before `keras.layers.Dense` or `keras.layers.EinsumDense`.

    The layer's variables: `kernel` (frozen), `lora_kernel_a` of shape
    `(rank, in)` and `lora_kernel_b` of shape `(rank, out)` (trainable), `bias`.
    The first factor is the transpose of Keras's `(in, rank)`: a pair is a row
    of either factor, and the backward product `hᵀ @ x` that gives it is several
    times faster on a CPU than `xᵀ @ h`.
    """

    def __init__(
        self,
        *args,
        rank=8,
        target_rank=None,
        lora_alpha=None,
        recipe="adaptive",
        decomposition="auto",
        train_bias=True,
        **kwargs,
    ):
        if kwargs.get("lora_rank") is not None:
            raise ValueError(
                f"`{type(self).__name__}` takes `rank`, not Keras's "
                f"`lora_rank`. Received: lora_rank={kwargs['lora_rank']}"
            )
        check_arguments(rank, target_rank, lora_alpha, decomposition)
        recipe = get_recipe(recipe)
        if kwargs.get("name") is None:
            # Keras would make "sr_lo_ra_dense" of the class's name.
            kwargs["name"] = _keras.unique_name(type(self).__name__)
        super().__init__(*args, **kwargs)
        if self.kernel_constraint is not None:
            raise ValueError(
                "A kernel that is never materialised cannot be constrained "
                "(nor can one with Keras's own LoRA). Remove the argument. "
                f"Received: kernel_constraint={self.kernel_constraint} in "
                f"layer {self.name!r}."
            )
        self._set_arguments(
            rank, target_rank, lora_alpha, recipe, decomposition, train_bias
        )

    def _set_arguments(
        self, rank, target_rank, lora_alpha, recipe, decomposition, train_bias
    ):
        self.rank = rank
        self.target_rank = target_rank
        self.lora_alpha = lora_alpha
        self.recipe = recipe
        self.decomposition = decomposition
        self.train_bias = train_bias
        self._adapter = AdapterState()

    # Building and converting.

    def build(self, input_shape):
        super().build(input_shape)
        try:
            check_quantization(self)
            check_rank(self._plan(), self.rank, self.path)
        except ValueError:
            self.built = False
            raise
        self._add_factors()

    def _add_factors(self):
        plan = self._plan()
        _keras.set_variable_trainable(
            self, _keras.stored_kernel(self), trainable=False
        )
        if self.bias is not None and not self.train_bias:
            _keras.set_variable_trainable(self, self.bias, trainable=False)
        with _keras.unlocked(self):
            self.lora_kernel_a = self.add_weight(
                name="lora_kernel_a",
                shape=(self.rank, plan.in_features),
                initializer=self._a_initializer(),
                regularizer=self.kernel_regularizer,
            )
            self.lora_kernel_b = self.add_weight(
                name="lora_kernel_b",
                shape=(self.rank, plan.out_features),
                initializer="zeros",
                regularizer=self.kernel_regularizer,
            )
            if is_quantized(self):
                rows = rows_beside_kernel(self.direction_count, self.recipe)
                sizes = plan.in_features, plan.out_features
                for name, size in zip(FUSED, sizes):
                    variable = self.add_weight(
                        name=name,
                        shape=(rows, size),
                        initializer="zeros",
                        trainable=False,
                    )
                    setattr(self, name, variable)

    def _a_initializer(self):
        # Keras's own LoRA starts with `he_uniform`, whose fan is that of
        # (in, rank); stored transposed, its limit is given by hand.
        limit = (6.0 / self._plan().in_features) ** 0.5
        return keras.initializers.RandomUniform(-limit, limit)

    def _remove_factors(self):
        """The inverse of `_set_arguments` and `_add_factors`, for merging."""
        for name in (*FACTORS, *FUSED):
            if name in vars(self):
                _keras.remove_variable(self, getattr(self, name))
                # `delattr` of a variable collects garbage, 0.25 seconds.
                del vars(self)[name]
        for name in (*ARGUMENTS, "_adapter"):
            delattr(self, name)
        self.lora_alpha = None  # Keras's own attribute
        for variable in self._plain_variables():
            _keras.set_variable_trainable(self, variable, trainable=True)

    def enable_lora(self, *args, **kwargs):
        """Not available: the layer has its own factors."""
        raise ValueError(
            f"Layer {self.path!r} already has SRLoRA factors; Keras's LoRA "
            "cannot be enabled beside them. Call "
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
        """What Keras calls where the layer is quantized."""
        rows, arrange = self._as_rows(inputs)
        low_rank = arrange(self._low_rank(rows))

        def activation(y):
            y = ops.add(y, low_rank)
            return y if self.activation is None else self.activation(y)

        return _keras.call_quantized(self, inputs, training, activation)

    def _project(self, inputs):
        """`x @ W + s · (x @ aᵀ) @ b`, in two dimensions throughout."""
        rows, arrange = self._as_rows(inputs)
        low_rank = self._low_rank(rows)
        plan = self._plan(len(inputs.shape))
        kernel = _keras.stored_kernel(self)
        if plan.kernel_is_a_matrix:
            size = (plan.in_features, plan.out_features)
            if tuple(kernel.shape) != size:
                kernel = ops.reshape(kernel, size)
            return arrange(ops.add(ops.matmul(rows, kernel), low_rank))
        # Permuting the kernel in each step would copy it.
        y = ops.einsum(plan.equation, inputs, kernel)
        return ops.add(y, arrange(low_rank))

    def _as_rows(self, inputs):
        return _contraction.as_rows(inputs, self._plan(len(inputs.shape)))

    def _low_rank(self, rows):
        """What is added to the product with the stored kernel."""
        hidden = ops.matmul(rows, ops.transpose(self.lora_kernel_a))
        if self.scale != 1.0:
            hidden = ops.multiply(hidden, self.scale)
        low_rank = ops.matmul(hidden, self.lora_kernel_b)
        if is_quantized(self):
            hidden = ops.matmul(rows, ops.transpose(self.fused_kernel_a))
            fused = ops.matmul(hidden, self.fused_kernel_b)
            low_rank = ops.add(low_rank, fused)
        return low_rank

    @property
    def scale(self):
        """`s = lora_alpha / rank`; 1 by default, as in the paper."""
        if self.lora_alpha is None:
            return 1.0
        return self.lora_alpha / self.rank

    @property
    def factors(self):
        """`(lora_kernel_a, lora_kernel_b)`, one pair a row."""
        return self.lora_kernel_a, self.lora_kernel_b

    @property
    def trains_factors(self):
        """Whether neither the layer nor a factor is frozen."""
        return self.trainable and all(v.trainable for v in self.factors)

    @property
    def adapter_state(self):
        """`AdapterState`: what the layer remembers on the host."""
        return self._adapter

    def merge_factors(self):
        """Makes the kernel the effective one; one of integers becomes float."""
        kernel = self.effective_kernel()
        if self.quantization_mode in INTEGER_MODES:
            _keras.replace_quantized_kernel(self, kernel)
        else:
            stored = _keras.stored_kernel(self)
            stored.assign(ops.cast(kernel, stored.dtype))

    # The kernel as a matrix.

    def _plan(self, input_ndim=None):
        raise NotImplementedError

    def _kernel_matrix(self):
        """The frozen kernel, with what is fused beside it."""
        matrix = _contraction.as_matrix(float_kernel(self), self._plan())
        if is_quantized(self):
            a, b = (ops.convert_to_tensor(getattr(self, x)) for x in FUSED)
            matrix = effective_kernel(matrix, a, b, 1.0)
        return matrix

    def shape_as_kernel(self, matrix):
        """From `(in, out)` to the shape of the stored kernel."""
        plan = self._plan()
        matrix = ops.reshape(matrix, plan.in_shape + plan.out_shape)
        return ops.transpose(matrix, np.argsort(plan.kernel_axes).tolist())

    def effective_kernel(self):
        """The kernel of the plain layer that computes the same function.

        Returns:
            tensor of the kernel's shape, in float32 (float64 where the kernel
            is): frozen kernel, before it was rounded to its dtype, plus scaled
            product of the factors.
        """
        return self.shape_as_kernel(self._effective_matrix())

    def _effective_matrix(self):
        a, b = self._factor_values()
        return effective_kernel(self._matrix_in_full(), a, b, self.scale)

    def _matrix_in_full(self):
        return in_full(self._kernel_matrix(), self._adapter.remainder)

    def _factor_values(self):
        """The factors as tensors that no gradient flows through."""
        return tuple(
            ops.stop_gradient(ops.convert_to_tensor(v)) for v in self.factors
        )

    def sharded_axes(self, axes):
        """Over which axes of a device mesh the two factors should be sharded.

        Args:
            axes: tuple of the names of axes that the kernel is sharded over, or
                `None`: those of its `keras.distribution.TensorLayout`.

        Returns:
            Name or `None`, for the last dimension of either factor. Of several
            dimensions of the kernel that make one of its sides the first one
            counts.
        """
        plan = self._plan()
        axes = (*axes, *[None] * len(plan.kernel_axes))
        axes = [axes[i] for i in plan.kernel_axes]
        return axes[0], axes[len(plan.in_shape)]

    # Initialisation and recomposition.

    @property
    def direction_count(self):
        """How many singular directions a run may visit: `target_rank` (8 ·
        rank by default), capped by the smaller side of the kernel.
        """
        plan = self._plan()
        wanted = self.target_rank or 8 * self.rank
        return min(wanted, plan.in_features, plan.out_features)

    @property
    def initialized(self):
        """Whether the kernel was decomposed."""
        return self._adapter.initialized

    def check_initializable(self):
        """Raises `ValueError` where `initialize_factors` cannot work."""
        if not self.built:
            raise ValueError(
                f"Layer {self.name!r} is not built, so there is no kernel to "
                "decompose. Build the model first: call it on a batch, or "
                "`model.build(input_shape)`, or start it with `keras.Input`."
            )
        check_finite_kernel(float_kernel(self), self.path)

    def initialize_factors(self):
        """Decomposes the kernel that the layer has now, and starts the pairs.

        Where the recipe starts as PiSSA does, the first `rank` directions go
        into the factors and out of the kernel (arXiv 2404.02948); where it
        starts as LoRA, the factors stay as built (`a` random, `b` zero). The
        layer's function does not change.

        Raises:
            ValueError: if the layer is not built, its kernel has an entry that
                is not finite, or pairs were fused beside a quantized kernel.
                Nothing is changed then.
        """
        self.check_initializable()
        if is_quantized(self) and len(self._fused_rows(self._adapter)[0]):
            raise ValueError(
                f"The kernel of layer {self.path!r} is quantized and cannot "
                "take up the pairs that were fused beside it, so that it "
                "cannot be decomposed with them. Call "
                "`keras_srlora.merge_srlora(model)`, which makes it a float "
                "one, `model.quantize` and `enable_srlora` again. Received: "
                f"quantization_mode={self.quantization_mode!r}"
            )
        self.start_pairs()

    def start_pairs(self, file=None):
        """`initialize_factors` of a layer that was checked.

        Args:
            file: an open `DirectionsFile` that may have the directions, or
                `None`.
        """
        directions = self._decompose(file)
        fresh = AdapterState.start(directions, self.rank)
        self._adapter = fresh.with_variables_of(self._adapter)
        scale = self.recipe["start"]
        if scale is not None:
            leading = np.arange(self.rank)
            self._restart(leading, leading, scale)

    def _decompose(self, file):
        if ops.any(ops.not_equal(self.lora_kernel_b, 0)):
            matrix = self._effective_matrix()
        else:
            # A product of zeros, and its sum, would be two more kernels.
            matrix = self._matrix_in_full()
        arguments = matrix, self.direction_count, self.decomposition
        if file is None:
            return _decomposition.decompose(*arguments)
        return file.decompose(self.path, *arguments)

    def pretrained_matrix(self):
        """The kernel before SRLoRA, from the frozen one and the record.

        Returns:
            tensor of shape `(in, out)`, float32 or float64; equal to rounding.
        """
        fused = self._fused_rows(self._adapter)
        return effective_kernel(self._matrix_in_full(), *fused, -1.0)

    def _fused_rows(self, state):
        """What a record says is in the frozen kernel, as two factors."""
        if not state.initialized:
            plan = self._plan()
            return (
                np.zeros((0, plan.in_features), "float32"),
                np.zeros((0, plan.out_features), "float32"),
            )
        found, anchored = state.directions, state.anchors != 0
        subtracted = state.anchors[anchored, None] * found.left[anchored]
        return (
            np.concatenate([self.scale * state.fused_a, -subtracted]),
            np.concatenate([state.fused_b, found.right[anchored]]),
        )

    def update_factors(self):
        """The whole update since the pretrained kernel, as two factors.

        Returns:
            float32 arrays `a` of shape `(k, in)` and `b` of shape `(k, out)`:
            the update is `aᵀ @ b`. The fused pairs, the directions that were
            subtracted, and the pairs being trained; at most `2 · target_rank`.
        """
        a, b = self.factors_to_numpy()
        fused_a, fused_b = self._fused_rows(self._adapter)
        return (
            np.concatenate([fused_a, self.scale * a]),
            np.concatenate([fused_b, b]),
        )

    @property
    def keeps_last_axis_apart(self):
        """Whether the kernel's last axis alone is the matrix's `out`."""
        plan = self._plan()
        return plan.kernel_is_a_matrix and len(plan.out_shape) == 1

    def disable_adapter(self):
        """Back to the pretrained kernel, with both factors zero.

        Both: a factor that is not finite would make zero times NaN.
        """
        self._assign_matrix(self.pretrained_matrix(), AdapterState())
        for factor in self.factors:
            factor.assign(ops.zeros(factor.shape, dtype=factor.dtype))

    @property
    def adapted_variables(self):
        """Those that a recomposition changes."""
        if is_quantized(self):
            kernel = [getattr(self, name) for name in FUSED]
        else:
            kernel = [_keras.stored_kernel(self)]
        return [*kernel, *self.factors]

    def restore_adapter(self, a, b, lora_alpha, state):
        """Takes over the factors and the record of another run.

        Args:
            a: array of shape `(rank, in)`.
            b: array of shape `(rank, out)`.
            lora_alpha: as in the constructor.
            state: an `AdapterState` of the same pretrained kernel.
        """
        pretrained = self.pretrained_matrix()
        self.lora_alpha = lora_alpha
        self._adapter = state.with_variables_of(self._adapter)
        kernel = effective_kernel(pretrained, *self._fused_rows(state), 1.0)
        self._assign_matrix(kernel, state)
        self.lora_kernel_a.assign(a)
        self.lora_kernel_b.assign(b)

    def check_recipe(self, recipe, direction_count):
        """Raises `ValueError` where a recipe fuses more than there is room for.

        Beside a quantized kernel there is room for that of the recipe that the
        layer was made with.
        """
        if not is_quantized(self):
            return
        rows = rows_beside_kernel(direction_count, recipe)
        if rows > self.fused_kernel_a.shape[0]:
            raise ValueError(
                f"Beside the quantized kernel of layer {self.path!r} there is "
                f"room for {self.fused_kernel_a.shape[0]} fused and subtracted "
                f"pairs, and this run may need {rows}. Pass its recipe and "
                "`target_rank` to `enable_srlora`. Received: "
                f"{direction_count} directions, {recipe}"
            )

    def _assign_matrix(self, matrix, state):
        """Stores the frozen kernel of a record.

        It is given in full; what rounding cuts off is stored as well. Beside a
        quantized kernel it is stored what the record fused.
        """
        if is_quantized(self):
            for name, rows in zip(FUSED, self._fused_rows(state)):
                variable = getattr(self, name)
                padding = variable.shape[0] - len(rows)
                variable.assign(np.pad(rows, ((0, padding), (0, 0))))
            return
        kernel = _keras.stored_kernel(self)
        rounded = ops.cast(matrix, kernel.dtype)
        kernel.assign(self.shape_as_kernel(rounded))
        self._adapter.remainder = None
        if keras.backend.standardize_dtype(kernel.dtype) in HALF_PRECISION:
            cut_off = ops.subtract(matrix, in_full(rounded))
            self._adapter.remainder = np.array(_devices.to_numpy(cut_off))

    def find_record(self):
        """How much of the record belongs to the kernel that the layer has.

        `u Wᵀ` of each direction is known from the record: its singular value
        and vector, less what was subtracted, plus what was fused. Weights of an
        earlier step (`EarlyStopping(restore_best_weights=True)`) are those of
        the beginning of the record.

        Returns:
            int. The number of fused pairs.

        Raises:
            ValueError: if it is the kernel of no part of the record: other
                weights were assigned after it was decomposed.
        """
        state = self._adapter
        kernel = ops.cast(self._kernel_matrix(), "float32")
        left = ops.convert_to_tensor(
            _devices.along_kernel(kernel, state.directions.left, 0)
        )
        image = _devices.to_numpy(ops.matmul(left, kernel))
        size = max(
            np.max(np.abs(image)), np.max(state.directions.singular_values)
        )
        errors = {
            count: np.max(np.abs(image - expected))
            for count, expected in state.images(self.scale)
        }
        # Far above rounding, a bfloat16 kernel's too, and far below a change.
        least = min(errors.values())
        if not least <= 1e-2 * size:
            raise ValueError(
                f"The kernel of layer {self.path!r} is not the one whose "
                "directions and record the layer holds: other weights were "
                "assigned after it was decomposed. Call "
                "`layer.initialize_factors()` to decompose what the layer "
                f"computes now. Received: a difference of {least:.3g} where at "
                f"most {1e-2 * size:.3g} is rounding."
            )
        # The latest of those that rounding does not tell apart.
        bound = 2 * least + 1e-6 * size
        return max(c for c, error in errors.items() if error <= bound)

    def take_back_record(self, count):
        """Forgets what came after the first `count` fused pairs."""
        running = self._adapter
        self._adapter = running.taken_back(count).with_variables_of(running)

    def fuse_and_restart(self, slots, directions, scores, scale, step):
        """Fuses the pairs in `slots` and restarts them along `directions`.

        Args:
            slots: int array of shape `(n,)`.
            directions: int array of shape `(n,)`; indices of unused directions.
            scores: float array of shape `(n,)`; importance of the fused pairs.
            scale: a scale function of `_recipes`.
            step: int. For the record.

        Returns:
            The drift: largest change of an entry of the effective kernel as a
            part of its largest entry.
        """
        state = self._adapter
        drift = self._restart(slots, directions, scale, fuse=True)
        state.slot_started[slots] = step
        rows = {
            "step": np.full(len(slots), step),
            "slot": slots,
            "score": scores,
            "direction": directions,
            "drift": np.full(len(slots), drift),
        }
        rows = np.stack([rows[name] for name in HISTORY], axis=1)
        state.history = np.concatenate([state.history, rows])
        return drift

    def factors_to_numpy(self):
        """Both factors as float32 arrays, `(rank, in)` and `(rank, out)`."""
        return tuple(
            np.array(_devices.to_numpy(ops.cast(value, "float32")))
            for value in self._factor_values()
        )

    def _restart(self, slots, indices, scale, fuse=False):
        state = self._adapter
        found = state.directions
        scale_a, scale_b = scale(
            found.singular_values[indices], found.tolerance, self.scale
        )
        restarted = row_mask(self.rank, slots)
        fresh_a = np.zeros(self.lora_kernel_a.shape, "float32")
        fresh_b = np.zeros(self.lora_kernel_b.shape, "float32")
        fresh_a[slots] = scale_a[:, None] * found.left[indices]
        fresh_b[slots] = scale_b[:, None] * found.right[indices]
        stored = self._kernel_matrix()
        before = self._computed_matrix(stored)
        kernel, a, b = recompose_pairs(
            stored,
            *self._factor_values(),
            ops.convert_to_tensor(restarted),
            ops.convert_to_tensor(fresh_a),
            ops.convert_to_tensor(fresh_b),
            self.scale,
            state.remainder,
        )
        if fuse:
            fused_a, fused_b = self.factors_to_numpy()
            state.fused_a = np.concatenate([state.fused_a, fused_a[slots]])
            state.fused_b = np.concatenate([state.fused_b, fused_b[slots]])
        state.anchors[indices] = self.scale * scale_a * scale_b
        state.used[indices] = True
        state.slot_direction[slots] = indices
        self._assign_matrix(kernel, state)
        self.lora_kernel_a.assign(a)
        self.lora_kernel_b.assign(b)
        after = self._computed_matrix(self._kernel_matrix())
        return relative_change(before, after)

    def _computed_matrix(self, stored):
        """The effective kernel with the kernel as it is stored, rounded."""
        factors = self._factor_values()
        return effective_kernel(in_full(stored), *factors, self.scale)

    # Saving.

    def get_config(self):
        config = super().get_config()
        config.pop("lora_rank", None)
        return {**config, **self.get_arguments()}

    def get_arguments(self):
        """What SRLoRA adds to the arguments of the plain layer, for JSON."""
        arguments = {name: getattr(self, name) for name in ARGUMENTS}
        # Its choices, not its name: what a name stands for may change.
        return {**arguments, "recipe": self.recipe.to_dict()}

    def set_weights(self, weights):
        """As in Keras; takes the plain layer's list too (kernel and bias).

        The kernel is decomposed when training starts.
        """
        plain = self._plain_variables()
        if len(weights) == len(plain):
            self._load_plain(weights)
        else:
            super().set_weights(weights)

    def _load_plain(self, weights):
        for variable, value in zip(self._plain_variables(), weights):
            variable.assign(value)
        a, b = self.factors
        a.assign(self._a_initializer()(a.shape, dtype=a.dtype))
        b.assign(ops.zeros(b.shape, dtype=b.dtype))
        self._adopt(AdapterState())

    def _adopt(self, state):
        """Takes over a record with whose kernel the layer was loaded."""
        self._adapter = state.with_variables_of(self._adapter)
        if is_quantized(self):
            self._assign_matrix(None, state)

    def _plain_variables(self):
        return _keras.stored_variables(self)

    def save_own_variables(self, store):
        """Writes the variables, the directions, the statistics, the record.

        Kernel and bias have the keys of the plain layer, everything else has a
        name.
        """
        if not self.built:
            return
        for index, variable in enumerate(self._plain_variables()):
            store[str(index)] = variable
        for name in FACTORS:
            store[name] = getattr(self, name)
        for name, array in self._adapter.to_arrays().items():
            store[name] = array

    def load_own_variables(self, store):
        """Reads what `save_own_variables` wrote, or a plain layer's weights.

        Weights of the plain layer (a pretrained model) replace the kernel; the
        factors start anew and the kernel is decomposed when training starts.
        """
        if not self.built:
            return
        plain = self._plain_variables()
        keys = set(store.keys())
        expected = {str(index) for index in range(len(plain))}
        if not expected <= keys or (keys - expected and FACTORS[0] not in keys):
            raise ValueError(
                f"Layer {self.path!r} cannot load these weights: expected "
                f"{sorted(expected)} of a plain layer, or those with the "
                f"factors {FACTORS}. A file of the plain model is read by "
                "`keras_srlora.load_plain_weights(model, filepath)`. "
                f"Received: {sorted(keys)}"
            )
        adapted = FACTORS[0] in keys
        for name in FACTORS if adapted else ():
            if tuple(store[name].shape) != tuple(getattr(self, name).shape):
                raise ValueError(
                    f"Layer {self.path!r} has rank {self.rank}, the saved "
                    f"weights have another: `{name}` is "
                    f"{tuple(getattr(self, name).shape)} here. "
                    f"Received: shape {tuple(store[name].shape)}. Build the "
                    "model with the same `rank`."
                )
        weights = [store[str(index)] for index in range(len(plain))]
        if not adapted:
            self._load_plain(weights)
            return
        for variable, value in zip(plain, weights):
            variable.assign(value)
        for name in FACTORS:
            getattr(self, name).assign(store[name])
        self._adopt(AdapterState.from_arrays({key: store[key] for key in keys}))
