"""Recipes that the package does not have, to find the one that it has.

A method of the laboratory that is named `x:life=300,stop=.7,slots=scaled`
restarts pairs as `Recipe(start="lora", scale="as_lora", selection="oldest")`
does, and changes one thing or another; `DEFAULTS` has the choices.
"""

import keras
import numpy as np
from keras import ops

import keras_srlora
from benchmarks.quality.methods import lora
from keras_srlora.layers import pairs
from keras_srlora.recipes.choices import as_lora
from keras_srlora.training import slots as slots_of
from keras_srlora.training.bias_correction import USUAL_BETAS
from keras_srlora.training.bias_correction import correction

DEFAULTS = {
    "life": 300.0,  # steps of a pair
    "first": 0.0,  # part of the run before the first recomposition
    "stop": 0.7,  # part of the run after which nothing is recomposed
    "gamma": 0.5,  # part of a layer's pairs that is fused at once
    "slots": "zero",  # or scaled, scaleda, scaledb, pace, mean
    "q": 0.25,  # of the second moments of the other pairs
    "qa": 0.0,  # the same for `a`, where `slots` is `pace`
    # 1: Adam's bias correction begins anew with each pair; 2: and that of the
    # run does not act on it.
    "clock": 0,
    "factor": 1.0,  # of a new pair's steps
    "stagger": 1,  # groups of layers, which are recomposed by turns
    "warm": 0.0,  # steps over which those of a new pair grow to their size
    "anneal": 0.0,  # part of a life over which a pair's steps fall to zero
    "long": 0.0,  # length of a new `a`, of the mean of the layer's; 0: LoRA's
}
DIRECTIONS = 60
NEVER = 1e9


def parse(method):
    """The choices of a method by its name."""
    choices = dict(DEFAULTS)
    for item in method.removeprefix("x:").split(","):
        name, value = item.split("=")
        default = DEFAULTS[name]
        choices[name] = type(default)(value)
    return choices


def adapt(method, model, task, rank, optimizer):
    """Converts the model; returns callbacks, as a method does."""
    lora(model, task.targets, rank, target_rank=max(rank, DIRECTIONS))
    keras_srlora.initialize_factors(model)
    return [Restarts(model, optimizer, task.steps, **parse(method))]


class PairAdamW(keras.optimizers.AdamW):
    """AdamW whose steps have a factor a pair: `{id(variable): function}`."""

    factors = None

    def update_step(self, gradient, variable, learning_rate):
        factor = (self.factors or {}).get(id(variable))
        if factor is not None:
            learning_rate = ops.cast(learning_rate, "float32") * factor()
        super().update_step(gradient, variable, learning_rate)


class Restarts(keras.callbacks.Callback):
    """Fuses the oldest pairs of each layer by a clock, and restarts them."""

    def __init__(self, model, optimizer, total, **choices):
        super().__init__()
        self.choices, self.total, self.events = choices, total, []
        self.layers = [
            layer
            for layer in model._flatten_layers()
            if hasattr(layer, "lora_kernel_a")
        ]
        rank = self.layers[0].rank
        self.count = max(1, int(choices["gamma"] * rank))
        interval = choices["life"] * self.count / rank
        first = choices["first"] * total or interval
        step = interval / choices["stagger"]
        stop = choices["stop"] * total
        self.times = [round(t) for t in np.arange(first, stop - 1e-6, step)]
        self.ages = [np.zeros(layer.rank) for layer in self.layers]
        self.turn = 0
        self.clocks = []
        scaled = choices["warm"] or choices["anneal"] or choices["clock"]
        if scaled or choices["factor"] != 1.0:
            self._scale_steps(optimizer)

    def _scale_steps(self, optimizer):
        optimizer.factors = {}
        for index, layer in enumerate(self.layers):
            clock = [
                keras.Variable(
                    np.full((layer.rank, 1), value, "float32"),
                    trainable=False,
                    name=f"{name}_{index}",
                )
                for name, value in (("began", -NEVER), ("ends", NEVER))
            ]
            for variable in clock:
                optimizer._track_variable(variable)
            self.clocks.append(clock)
            for factor in layer.factors:
                optimizer.factors[id(factor)] = lambda clock=clock: (
                    self._step_factor(optimizer.iterations, *clock)
                )

    def _step_factor(self, step, began, ends):
        step = ops.cast(step, "float32")
        factor = ops.ones(began.shape)
        warm = self.choices["warm"]
        span = self.choices["anneal"] * self.choices["life"]
        age = step - ops.convert_to_tensor(began) + 1
        if warm:
            factor *= ops.clip(age / warm, 0.0, 1.0)
        if self.choices["clock"] == 1:
            factor *= correction(age, *USUAL_BETAS)
        if self.choices["clock"] == 2:
            # First pairs began long before the run.
            age = ops.minimum(age, step + 1)
            factor *= correction(age, *USUAL_BETAS) / correction(
                step + 1, *USUAL_BETAS
            )
        if self.choices["factor"] != 1.0:
            began = ops.convert_to_tensor(began)
            factor *= ops.where(began > 0, self.choices["factor"], 1.0)
        if span:
            ends = ops.convert_to_tensor(ends)
            factor *= ops.clip((ends - step) / span, 0.0, 1.0)
        return factor

    def on_train_begin(self, logs=None):
        """Says when the first pairs end."""
        self._foresee()

    def _foresee(self):
        """When each pair will be fused, which annealing must know."""
        if not self.choices["anneal"]:
            return
        for ages, (_, ends) in zip(self.ages, self.clocks):
            values = np.full((len(ages), 1), NEVER, "float32")
            order = list(np.argsort(ages, kind="stable"))
            for time in self.times:
                for slot in order[: self.count]:
                    values[slot] = time
                order = order[self.count :]
            ends.assign(values)

    def on_epoch_begin(self, epoch, logs=None):
        """Where the run is."""
        self.start = epoch * self.params["steps"]

    def on_train_batch_begin(self, batch, logs=None):
        """Recomposes where it is time."""
        step = self.start + batch
        if self.times and step >= self.times[0]:
            self.times.pop(0)
            self._recompose(step)

    def _recompose(self, step):
        model = self.model  # on JAX this brings the variables up to date
        slots, _ = slots_of.find_slots(
            model.optimizer, model.trainable_variables
        )
        groups = int(self.choices["stagger"])
        for index, layer in enumerate(self.layers):
            unused = layer.record.unused[: self.count]
            if index % groups == self.turn % groups and len(unused):
                ages = self.ages[index]
                chosen = np.sort(np.argsort(ages, kind="stable")[: len(unused)])
                lengths = self._fuse(layer, chosen, unused, step)
                self._treat(layer, chosen, slots, lengths)
                ages[chosen] = step
                if self.clocks:
                    began = np.array(self.clocks[index][0])
                    began[chosen] = step
                    self.clocks[index][0].assign(began)
                self.events.append(step)
        self.turn += 1
        self._foresee()

    def _fuse(self, layer, chosen, directions, step):
        a, _ = pairs.factors_to_numpy(layer)
        lengths = np.linalg.norm(a, axis=1, keepdims=True)
        long = self.choices["long"] * lengths.mean()

        def scale(values, tolerance, scale):
            scale_a, scale_b = as_lora(values, tolerance, scale)
            return (long + 0.0 * scale_a if long else scale_a), scale_b

        pairs.fuse_and_restart(
            layer, chosen, directions, np.zeros(len(chosen)), scale, step
        )
        return lengths**2

    def _treat(self, layer, chosen, slots, lengths):
        for is_b, factor in enumerate(layer.factors):
            for kind, slot in slots[id(factor)]:
                values = np.array(slot.value)
                values[chosen] = 0.0
                if kind == slots_of.SECOND_MOMENT:
                    old = np.array(slot.value)
                    values[chosen] = self._second_moment(is_b, old, lengths)
                slot.assign(values)

    def _second_moment(self, is_b, values, lengths):
        """Of new pairs; the gradient of `b` is as long as `a`."""
        slots, q = self.choices["slots"], self.choices["q"]
        zero = {"zero": True, "scaleda": is_b, "scaledb": not is_b}
        if zero.get(slots, False):
            return 0.0
        if slots == "pace" and not is_b:
            return self.choices["qa"] * values.mean(axis=0)
        if is_b and slots != "mean":
            values = 2.0 * values / lengths
        return q * values.mean(axis=0)
