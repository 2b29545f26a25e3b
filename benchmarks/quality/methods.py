"""The methods: each adapts a model in place and returns callbacks for `fit`.

All of them are `(model, targets, rank) -> callbacks`, with `targets` the names
of the layers to adapt.
"""

import dataclasses

import keras_srlora
from keras_srlora import Recipe
from keras_srlora._recipes import RECIPES


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
    "pissa": pissa,
    "paper": srlora(RECIPES["paper"]),
    "lora_restarts": srlora(RECIPES["lora_restarts"]),
    "adaptive": srlora(RECIPES["adaptive"]),
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
