"""The optimizer's slots of restarted pairs.

A slot of a Keras variable is an optimizer variable whose path is
`<optimizer>/<path of the variable with _ for />_<name of the slot>`. A slot of
a `torch.optim` optimizer is an entry of `optimizer.state[parameter]`.
"""

import collections
import warnings

import keras
from keras import ops

from keras_srlora.backend.keras_private.fit_state import is_stock_optimizer

FIRST_MOMENT, SECOND_MOMENT = "first_moment", "second_moment"
WEIGHT_AVERAGE, GRADIENT_SUM = "weight_average", "gradient_sum"
KINDS = (FIRST_MOMENT, SECOND_MOMENT, WEIGHT_AVERAGE, GRADIENT_SUM)

# Names of the slots of Keras's own optimizers (keras 3.13 to 3.15).
KERAS_SLOTS = {
    "momentum": FIRST_MOMENT,
    "average_gradient": FIRST_MOMENT,
    "velocity": SECOND_MOMENT,
    "velocity_hat": SECOND_MOMENT,
    "norm": SECOND_MOMENT,
    "accumulator": SECOND_MOMENT,
    "accumulated_grad": SECOND_MOMENT,
    "accumulated_delta_var": SECOND_MOMENT,
    "average": WEIGHT_AVERAGE,
    "gradient_accumulator": GRADIENT_SUM,
}
# Those of `torch.optim` (torch 2.13).
TORCH_SLOTS = {
    "exp_avg": FIRST_MOMENT,
    "momentum_buffer": FIRST_MOMENT,
    "grad_avg": FIRST_MOMENT,
    "mu": FIRST_MOMENT,
    "exp_avg_sq": SECOND_MOMENT,
    "max_exp_avg_sq": SECOND_MOMENT,
    "exp_inf": SECOND_MOMENT,
    "square_avg": SECOND_MOMENT,
    "sum": SECOND_MOMENT,
    "acc_delta": SECOND_MOMENT,
    "ax": WEIGHT_AVERAGE,
}
# `{name of a class: {slot: kind}}`: where a class gives a name another meaning
# (the `momentum` of `ScheduleFreeAdamW` is a copy of the weights that the
# gradient moves), and the entries of `register_optimizer_slots`.
OF_CLASS = {"ScheduleFreeAdamW": {"momentum": WEIGHT_AVERAGE}}


def register_optimizer_slots(optimizer_class: type, slots: dict) -> None:
    """Registers the kinds of an optimizer's slots.

    When a pair restarts, the recipe treats its moments. A moving average of the
    weights starts from the new pair, and a gradient that is being accumulated
    starts from zero. Unknown slots stay unchanged, and a warning names them.

    Args:
        optimizer_class: a class of `keras.optimizers.Optimizer` or
            `torch.optim.Optimizer`. Its subclasses are registered, too.
        slots: dict from the name of a slot, as passed to
            `add_variable_from_reference` (or as in `optimizer.state[p]`), to
            its kind: `"first_moment"`, `"second_moment"`, `"weight_average"` or
            `"gradient_sum"`.

    Raises:
        ValueError: if a kind does not exist.

    Example:

    ```python
    keras_srlora.register_optimizer_slots(
        MyAdam, {"mean": "first_moment", "square": "second_moment"}
    )
    ```
    """
    wrong = {name: kind for name, kind in slots.items() if kind not in KINDS}
    if wrong or not isinstance(optimizer_class, type):
        raise ValueError(
            f"`slots` must be a dict from names to one of {KINDS}, for a "
            f"class of optimizers. Received: {optimizer_class!r}, {slots!r}"
        )
    OF_CLASS.setdefault(optimizer_class.__name__, {}).update(slots)


def slot_kinds(optimizer) -> dict:
    """`{name of a slot: kind}` of an optimizer."""
    keras_like = isinstance(optimizer, keras.optimizers.Optimizer)
    kinds = dict(KERAS_SLOTS if keras_like else TORCH_SLOTS)
    for cls in reversed(type(optimizer).__mro__):
        kinds.update(OF_CLASS.get(cls.__name__, {}))
    return kinds


def find_slots(optimizer, variables):
    """Finds the optimizer's slots of its trainable variables.

    Args:
        optimizer: a built `keras.optimizers.Optimizer`.
        variables: its trainable variables, in order.

    Returns:
        `(slots, unknown)`: a dict from `id(variable)` to a list of
        `(kind, slot)`, and the list of optimizer variables of more than one
        entry that belong to no variable or have a name that is not known.
    """
    kinds = slot_kinds(optimizer)
    by_key = collections.defaultdict(list)
    for variable in variables:
        by_key[variable.path.replace("/", "_")].append(variable)
    slots: collections.defaultdict = collections.defaultdict(list)
    unknown = []
    seen: collections.Counter = collections.Counter()
    for slot in optimizer.variables:
        name = slot.path.split("/")[-1]
        # The longest key: `kernel` is the beginning of `kernel_b`.
        keys = [key for key in by_key if name.startswith(key + "_")]
        key = max(keys, key=len, default=None)
        slot_name = None if key is None else name[len(key) + 1 :]
        if slot_name in kinds:
            # Layers of equal names have equal paths; an optimizer makes its
            # slots in the order of the variables.
            owner = by_key[key][seen[name] % len(by_key[key])]
            seen[name] += 1
            slots[id(owner)].append((kinds[slot_name], slot))
        elif len(slot.shape) > 0:
            unknown.append(slot)
    return slots, unknown


def find_torch_slots(optimizer, variables):
    """As `find_slots`, of a `torch.optim.Optimizer` and Keras variables."""
    kinds = slot_kinds(optimizer)
    slots, unknown = collections.defaultdict(list), []
    for variable in variables:
        for name, tensor in optimizer.state.get(variable.value, {}).items():
            if getattr(tensor, "shape", None) != variable.value.shape:
                # A count of steps, for example.
                continue
            slot = _TorchSlot(f"{variable.path}/{name}", tensor)
            if name in kinds:
                slots[id(variable)].append((kinds[name], slot))
            else:
                unknown.append(slot)
    return slots, unknown


class _TorchSlot:
    """A tensor of an optimizer's state, with the verbs of a variable."""

    def __init__(self, path, tensor):
        self.path = path
        self.tensor = tensor

    @property
    def value(self):
        return self.tensor

    def assign(self, value):
        self.tensor.copy_(value)


def restart_slots(slots, factor, restarted, treatment):
    """Treats the slots of a factor's restarted pairs; leaves the others alone.

    The recipe treats moments. A moving average of the weights
    (`use_ema`) starts from the new pair, a gradient that is being accumulated
    from zero.

    Args:
        slots: list of `(kind, slot)` of this factor.
        factor: the variable, after the restart, of shape `(rank, ...)`.
        restarted: bool array of shape `(rank, 1)`.
        treatment: function `(kind, values) -> values`.
    """
    for kind, slot in slots:
        old = ops.convert_to_tensor(slot.value)
        if kind == WEIGHT_AVERAGE:
            new = ops.stop_gradient(ops.convert_to_tensor(factor))
        elif kind == GRADIENT_SUM:
            new = ops.zeros_like(old)
        else:
            new = treatment(kind, old)
        slot.assign(ops.where(restarted, new, old))


def warn_of_unknown(optimizer, unknown):
    """Warns of slots that stay as they are because their kind is not known."""
    if is_stock_optimizer(optimizer):
        # Adafactor's factored second moments, one for a row and one for a
        # column of a variable, carry no path: they go on.
        return
    if unknown:
        names = sorted({slot.path for slot in unknown})
        name = getattr(optimizer, "name", type(optimizer).__name__)
        warnings.warn(
            f"Optimizer {name!r} ({type(optimizer).__name__}) keeps "
            f"state that SRLoRA does not know: {names[:4]} "
            f"({len(names)} in all). It is left as it is when a pair restarts. "
            "Register its kind with `keras_srlora.register_optimizer_slots`.",
            stacklevel=2,
        )
