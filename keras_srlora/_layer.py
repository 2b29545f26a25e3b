"""What `SRLoRADense` and `SRLoRAEinsumDense` share: everything but the shape.

A thin Keras object over the pure functions: it owns the variables and the
state, and hands arrays to the functions below it.
"""

import keras
import numpy as np
from keras import ops

from keras_srlora import _contraction
from keras_srlora import _decomposition
from keras_srlora import _keras
from keras_srlora._checks import check_arguments
from keras_srlora._checks import check_finite_kernel
from keras_srlora._checks import check_rank
from keras_srlora._recipes import get_recipe
from keras_srlora._recomposition import effective_kernel
from keras_srlora._recomposition import in_full
from keras_srlora._recomposition import recompose_pairs
from keras_srlora._slots import row_mask
from keras_srlora._state import HISTORY
from keras_srlora._state import AdapterState

FACTORS = ("lora_kernel_a", "lora_kernel_b")
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

    def _a_initializer(self):
        # Keras's own LoRA starts with `he_uniform`, whose fan is that of
        # (in, rank); stored transposed, its limit is given by hand.
        limit = (6.0 / self._plan().in_features) ** 0.5
        return keras.initializers.RandomUniform(-limit, limit)

    def _remove_factors(self):
        """The inverse of `_set_arguments` and `_add_factors`, for merging."""
        for name in FACTORS:
            _keras.remove_variable(self, getattr(self, name))
        for name in FACTORS:
            # `delattr` of a variable collects garbage, a quarter of a second.
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

    def _project(self, inputs):
        """`x @ W + s · (x @ aᵀ) @ b`, in two dimensions throughout."""
        plan = self._plan(len(inputs.shape))
        x = inputs
        if not _contraction.is_identity(plan.input_axes):
            x = ops.transpose(x, plan.input_axes)
        shape = ops.shape(x)
        batch_shape = shape[: len(shape) - len(plan.in_shape)]
        if len(shape) != 2:
            x = ops.reshape(x, (-1, plan.in_features))
        hidden = ops.matmul(x, ops.transpose(self.lora_kernel_a))
        if self.scale != 1.0:
            hidden = ops.multiply(hidden, self.scale)
        low_rank = ops.matmul(hidden, self.lora_kernel_b)

        def arrange(y):
            if len(batch_shape) != 1 or len(plan.out_shape) != 1:
                y = ops.reshape(y, (*batch_shape, *plan.out_shape))
            if not _contraction.is_identity(plan.output_axes):
                y = ops.transpose(y, plan.output_axes)
            return y

        kernel = _keras.stored_kernel(self)
        if plan.kernel_is_a_matrix:
            size = (plan.in_features, plan.out_features)
            if tuple(kernel.shape) != size:
                kernel = ops.reshape(kernel, size)
            return arrange(ops.add(ops.matmul(x, kernel), low_rank))
        # Permuting the kernel in each step would copy it.
        y = ops.einsum(plan.equation, inputs, kernel)
        return ops.add(y, arrange(low_rank))

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

    # The kernel as a matrix.

    def _plan(self, input_ndim=None):
        raise NotImplementedError

    def _kernel_matrix(self):
        return _contraction.as_matrix(_keras.stored_kernel(self), self._plan())

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
        kernel = ops.convert_to_tensor(_keras.stored_kernel(self))
        check_finite_kernel(kernel, self.path)

    def initialize_factors(self):
        """Decomposes the kernel that the layer has now, and starts the pairs.

        Where the recipe starts as PiSSA does, the first `rank` directions go
        into the factors and out of the kernel (arXiv 2404.02948); where it
        starts as LoRA, the factors stay as built (`a` random, `b` zero). The
        layer's function does not change.

        Raises:
            ValueError: if the layer is not built or its kernel has an entry
                that is not finite. Nothing is changed then.
        """
        self.check_initializable()
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
        return ops.add(self._matrix_in_full(), self._taken_out(self._adapter))

    def _taken_out(self, state):
        """What a record says is missing in the frozen kernel."""
        if not state.initialized:
            return 0.0
        found = state.directions
        subtracted = state.anchors[:, None] * found.left
        return ops.subtract(
            ops.matmul(subtracted.T, found.right),
            ops.matmul(self.scale * state.fused_a.T, state.fused_b),
        )

    def update_factors(self):
        """The whole update since the pretrained kernel, as two factors.

        Returns:
            float32 arrays `a` of shape `(k, in)` and `b` of shape `(k, out)`:
            the update is `aᵀ @ b`. The fused pairs, those being trained, and
            the directions that were subtracted; at most `2 · target_rank`.
        """
        a, b = self.factors_to_numpy()
        if not self.initialized:
            return self.scale * a, b
        state, found = self._adapter, self._adapter.directions
        anchored = state.anchors != 0
        subtracted = state.anchors[anchored, None] * found.left[anchored]
        return (
            np.concatenate(
                [self.scale * state.fused_a, self.scale * a, -subtracted]
            ),
            np.concatenate([state.fused_b, b, found.right[anchored]]),
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
        self._assign_matrix(self.pretrained_matrix())
        for factor in self.factors:
            factor.assign(ops.zeros(factor.shape, dtype=factor.dtype))

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
        self._assign_matrix(ops.subtract(pretrained, self._taken_out(state)))
        self.lora_kernel_a.assign(a)
        self.lora_kernel_b.assign(b)

    def _assign_matrix(self, matrix):
        """Stores a kernel that is given in full, and what rounding cuts off."""
        kernel = _keras.stored_kernel(self)
        rounded = ops.cast(matrix, kernel.dtype)
        kernel.assign(self.shape_as_kernel(rounded))
        self._adapter.remainder = None
        if keras.backend.standardize_dtype(kernel.dtype) in HALF_PRECISION:
            cut_off = ops.subtract(matrix, in_full(rounded))
            self._adapter.remainder = np.array(ops.convert_to_numpy(cut_off))

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
        left = ops.convert_to_tensor(state.directions.left)
        kernel = ops.cast(self._kernel_matrix(), "float32")
        image = ops.convert_to_numpy(ops.matmul(left, kernel))
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
        fused_a, fused_b = self.factors_to_numpy()
        drift = self._restart(slots, directions, scale)
        state.slot_started[slots] = step
        state.fused_a = np.concatenate([state.fused_a, fused_a[slots]])
        state.fused_b = np.concatenate([state.fused_b, fused_b[slots]])
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
            np.array(ops.convert_to_numpy(ops.cast(value, "float32")))
            for value in self._factor_values()
        )

    def _restart(self, slots, indices, scale):
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
        kernel, a, b, drift = recompose_pairs(
            self._kernel_matrix(),
            *self._factor_values(),
            ops.convert_to_tensor(restarted),
            ops.convert_to_tensor(fresh_a),
            ops.convert_to_tensor(fresh_b),
            self.scale,
            state.remainder,
        )
        self._assign_matrix(kernel)
        self.lora_kernel_a.assign(a)
        self.lora_kernel_b.assign(b)
        state.anchors[indices] = self.scale * scale_a * scale_b
        state.used[indices] = True
        state.slot_direction[slots] = indices
        return float(ops.convert_to_numpy(drift))

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
        self._adapter = AdapterState().with_variables_of(self._adapter)

    def _plain_variables(self):
        kernel = _keras.stored_kernel(self)
        return [kernel] if self.bias is None else [kernel, self.bias]

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
        loaded = AdapterState.from_arrays({key: store[key] for key in keys})
        self._adapter = loaded.with_variables_of(self._adapter)
