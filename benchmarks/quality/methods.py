"""The methods: each adapts a model in place and returns callbacks for `fit`.

All of them are `(model, targets, rank) -> callbacks`, with `targets` the names
of the layers to adapt.
"""

import dataclasses

import keras
import numpy as np

import keras_srlora
from keras_srlora import Recipe
from keras_srlora.layers.pairs import row_mask
from keras_srlora.recipes.choices import zero_slots
from keras_srlora.recipes.definition import RECIPES
from keras_srlora.training import slots as slots_of


def full(model, targets, rank):
    """Every variable is trained."""
    return []


def lora(model, targets, rank, **arguments):
    """LoRA: pairs that start with `b` zero and are never recomposed.

    For a `Dense` layer that is what Keras's `enable_lora` computes; that of
    `EinsumDense` has more parameters at the same rank.
    """
    keras_srlora.enable_srlora(
        model,
        rank,
        target_layer_names=targets,
        recipe=Recipe(start="lora"),
        **arguments,
    )
    return []


def lora_2r(model, targets, rank):
    """LoRA of twice the rank."""
    return lora(model, targets, 2 * rank)


def lora_4r(model, targets, rank):
    """LoRA of four times the rank."""
    return lora(model, targets, 4 * rank)


def rslora(model, targets, rank):
    """LoRA of scale `16 / √r` (arXiv 2312.03732)."""
    return lora(model, targets, rank, lora_alpha=16 * rank**0.5)


def pissa(model, targets, rank):
    """LoRA that starts along the leading directions (arXiv 2404.02948)."""
    keras_srlora.enable_srlora(
        model, rank, target_layer_names=targets, recipe="paper"
    )
    return []


def adalora_like(model, targets, rank):
    """LoRA of `1.5 r`, of which `r` a layer are left, on the average.

    As AdaLoRA (arXiv 2303.10512) shares out its budget, and with its scores;
    unlike it a pair has no singular value of its own, no penalty keeps the
    pairs orthogonal, and what is pruned stays so. As many variables are trained
    as by LoRA of `1.5 r`; those of pruned pairs are zero.
    """
    lora(model, targets, -(-3 * rank // 2))
    return [Budget(rank)]


class Budget(keras.callbacks.Callback):
    """Prunes the least important pairs of all layers together.

    Their number falls along a cube between a tenth and half of the run
    (AdaLoRA, equation 12).
    """

    BEGIN, END, TIMES = 0.1, 0.5, 20
    events = ()

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def set_model(self, model):
        """Scores the pairs from the first step on."""
        super().set_model(model)
        model.optimizer = keras_srlora.SensitivityOptimizer(
            model.optimizer, model
        )
        self.layers = model.optimizer.sensitivity.layers
        self.alive = [np.ones(layer.rank, "bool") for layer in self.layers]
        self.pruned = 0

    def on_epoch_begin(self, epoch, logs=None):
        """Where the run is."""
        self.epoch_start = epoch * self.params["steps"]

    def on_train_batch_begin(self, batch, logs=None):
        """Prunes `TIMES` times."""
        total = self.params["epochs"] * self.params["steps"]
        done = (self.epoch_start + batch) / total
        part = (done - self.BEGIN) / (self.END - self.BEGIN)
        if self.pruned < self.TIMES and part * self.TIMES >= self.pruned + 1:
            self.pruned += 1
            self.prune(min(part, 1.0))

    def prune(self, part):
        """Leaves as many pairs as the budget has at this part of its way."""
        first = sum(map(len, self.alive))
        last = self.rank * len(self.layers)
        count = last + round((first - last) * (1 - part) ** 3)
        # On JAX this brings the variables up to date.
        optimizer = self.model.optimizer
        scores = np.concatenate(optimizer.sensitivity.importance())
        scores[~np.concatenate(self.alive)] = -1.0
        kept = np.zeros(first, "bool")
        kept[np.argsort(-scores, kind="stable")[:count]] = True
        ends = np.cumsum([layer.rank for layer in self.layers])[:-1]
        self.alive = np.split(kept, ends)
        inner = optimizer.unwrap()
        slots, _ = slots_of.find_slots(inner, self.model.trainable_variables)
        for layer, alive in zip(self.layers, self.alive):
            pruned = row_mask(layer.rank, list(np.flatnonzero(~alive)))
            # Both factors and their moments at zero: no gradient either.
            for factor in layer.factors:
                value = keras.ops.convert_to_tensor(factor)
                factor.assign(keras.ops.where(pruned, 0.0, value))
                slots_of.restart_slots(
                    slots[id(factor)], factor, pruned, zero_slots
                )


def srlora(recipe, directions=8):
    """Returns the method of a recipe, with `target_rank` `directions · r`."""

    def method(model, targets, rank):
        keras_srlora.enable_srlora(
            model,
            rank,
            target_rank=directions * rank,
            target_layer_names=targets,
            recipe=recipe,
        )
        return [keras_srlora.RecompositionCallback()]

    return method


# Nothing while the training loss falls.
FLAT_LOSS = dataclasses.replace(
    RECIPES["lora_restarts"], gate="flat_loss", stop=0.8
)

# The default with shorter lifetimes, in runs of any length.
ADAPTIVE_125 = dataclasses.replace(
    RECIPES["adaptive"],
    steps_per_pair=125,
    predictions_per_pair=125_000,
    lives_per_run=1,
)

# Evenly to the end of the run; the variants change one thing at a time.
RESTARTS = dataclasses.replace(
    RECIPES["lora_restarts"], stop=1.0, steps_per_pair=1
)


def changed(directions=8, **choices):
    """Returns the method of `RESTARTS` with other choices."""
    return srlora(dataclasses.replace(RESTARTS, **choices), directions)


METHODS = {
    "full": full,
    "lora": lora,
    "lora_2r": lora_2r,
    "lora_4r": lora_4r,
    "rslora": rslora,
    "adalora_like": adalora_like,
    "pissa": pissa,
    "paper": srlora(RECIPES["paper"]),
    "lora_restarts": srlora(RECIPES["lora_restarts"]),
    "adaptive": srlora(RECIPES["adaptive"]),
    "adaptive_125": srlora(ADAPTIVE_125),
    "adaptive_shared": srlora(
        dataclasses.replace(RECIPES["adaptive"], slots="shared")
    ),
    # In runs of any length, and on small data sets.
    "adaptive_any": srlora(
        dataclasses.replace(RECIPES["adaptive"], lives_per_run=1)
    ),
    # The same, however few predictions a pair learns from.
    "adaptive_steps": srlora(
        dataclasses.replace(
            RECIPES["adaptive"], lives_per_run=1, predictions_per_pair=1
        )
    ),
    "flat_loss": srlora(FLAT_LOSS),
    "restarts": changed(),
    "restarts_4r": changed(directions=4),
    "restarts_16r": changed(directions=16),
    "restarts_quarter": changed(fusion_ratio=0.25),
    "restarts_random": changed(order="random"),
    "restarts_least_important": changed(selection="least_important"),
    "restarts_second_moments_go_on": changed(slots="zero_first_moments"),
    "restarts_stop_0.8": changed(stop=0.8),
    "restarts_stop_0.3": changed(stop=0.3),
    "restarts_100": changed(steps_per_pair=100),
    "restarts_100_stop_0.5": changed(steps_per_pair=100, stop=0.5),
    "restarts_100_stop_0.3": changed(steps_per_pair=100, stop=0.3),
    "restarts_50_stop_0.3": changed(steps_per_pair=50, stop=0.3),
}
