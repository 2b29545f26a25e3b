"""Checks before a run, and its recipe."""

from __future__ import annotations

import dataclasses
import warnings

from keras_srlora.backend.arguments import check_count
from keras_srlora.backend.arguments import check_fraction
from keras_srlora.backend.arguments import is_integer
from keras_srlora.backend.keras_private.nesting import inside
from keras_srlora.layers import pairs
from keras_srlora.layers.base import SRLoRALayer
from keras_srlora.layers.find import decompose_kernels
from keras_srlora.layers.find import match_records
from keras_srlora.layers.placement import check_same_start
from keras_srlora.layers.placement import warn_of_whole_factors
from keras_srlora.layers.requirements import check_initializable
from keras_srlora.layers.requirements import check_recipe
from keras_srlora.recipes.definition import Recipe
from keras_srlora.recipes.definition import get_recipe
from keras_srlora.training.optimizer import SensitivityOptimizer
from keras_srlora.training.optimizer import check_optimizer
from keras_srlora.training.optimizer import check_trains
from keras_srlora.training.optimizer import is_torch_optimizer


def choose_recipe(layers, recipe=None, fusion_ratio=None) -> Recipe:
    """The recipe of a run: the one that was passed, or that of the layers."""
    if fusion_ratio is not None:
        check_fraction("fusion_ratio", fusion_ratio, True, False)
    if recipe is not None:
        recipe = get_recipe(recipe)
    else:
        recipe = layers[0].recipe
        for layer in layers:
            if layer.recipe != recipe:
                raise ValueError(
                    "The SRLoRA layers have different recipes; pass the one to "
                    "follow: `RecompositionCallback(recipe=...)`. Received: "
                    f"{recipe} in layer {layers[0].path!r}, {layer.recipe} in "
                    f"layer {layer.path!r}"
                )
    if fusion_ratio is None:
        return recipe
    return dataclasses.replace(recipe, fusion_ratio=fusion_ratio)


def check_length(total_steps, interval):
    """Raises unless a run's length, or its interval, is a number of steps.

    A length of 0 is one that `fit` will say later.
    """
    check_count("interval", interval, "steps", True)
    if total_steps is None and interval is None:
        raise ValueError(
            "The length of the run is needed to spread recompositions over "
            "it: pass `total_steps`, or an `interval`. "
            f"Received: {total_steps=}, {interval=}"
        )
    if total_steps != 0:
        check_count("total_steps", total_steps, "steps", True)


def check_model(model, layers):
    """Raises where `fit` would not train the factors of these layers."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            f"Model {model.name!r} has no optimizer: compile it first, as "
            "in `model.compile('adamw', loss)`. Received: "
            f"optimizer={optimizer!r}"
        )
    trainable = {id(v) for v in model.trainable_variables}
    for layer in layers:
        if layer.built and not all(id(v) in trainable for v in layer.factors):
            raise ValueError(_frozen(layer))


def check_run(layers, recipe, optimizer):
    """Raises where a run cannot work, before anything is changed."""
    for layer in layers:
        check_initializable(layer)
        if not layer.trains_factors:
            raise ValueError(_frozen(layer))
        check_recipe(layer, recipe, layer.direction_count)
        _check_start(layer, recipe)
    if not is_torch_optimizer(optimizer):
        inner = optimizer
        if isinstance(optimizer, SensitivityOptimizer):
            inner = optimizer.unwrap()
        check_optimizer(inner)
        if inner.built:
            check_trains(inner, layers)
    match_records(layers)
    check_same_start(layers)


def _frozen(layer):
    return (
        f"The factors of layer {layer.path!r} are frozen: the run would wait "
        "for gradients that never come. Set `trainable = True` on it (the "
        "kernel stays frozen). "
        f"Received: layer.trainable={layer.trainable}"
    )


def _check_start(layer, recipe):
    if not layer.initialized or pairs.is_untrained(layer):
        return
    if layer.record.starts_as_lora != recipe.starts_as_lora:
        started = "LoRA's" if layer.record.starts_as_lora else "PiSSA's"
        raise ValueError(
            f"The pairs of layer {layer.path!r} were trained already, and "
            f"started as {started} do. Pass the recipe before training, "
            "`enable_srlora(model, recipe=...)` or "
            "`SRLoRADense(..., recipe=...)`, and none to the callback. "
            f"Received: a recipe that starts with {recipe.start!r}"
        )


def start_layers(layers, recipe):
    """Decomposes kernels for the first time, or for another start of the pairs.

    The pairs of the latter are untrained, so that they may start anew.
    """
    fresh = []
    for layer in layers:
        if layer.initialized and _starts_otherwise(layer, recipe):
            pairs.reset_pairs(layer)
        if not layer.initialized:
            fresh.append(layer)
    warn_of_whole_factors(fresh)
    decompose_kernels(fresh, recipe)


def _starts_otherwise(layer, recipe):
    if not pairs.is_untrained(layer):
        return False
    if recipe.starts_as_lora or layer.record.starts_as_lora:
        return recipe.starts_as_lora != layer.record.starts_as_lora
    return recipe.start != layer.recipe.start


def check_still_trained(layers, model=None):
    """Raises where a layer was frozen, merged or removed in a run."""
    present = inside(model) if model is not None else set(map(id, layers))
    gone = [
        x.path
        for x in layers
        if id(x) not in present or not isinstance(x, SRLoRALayer)
    ]
    if gone:
        raise RuntimeError(
            "SRLoRA layers were merged, or removed from the model, during the "
            "run, whose compiled step still has them: stop training first, "
            f"then compile and fit again. Received: {gone} are no longer "
            "SRLoRA layers of the run"
        )
    frozen = [x for x in layers if not x.trains_factors]
    for layer in frozen:
        # On JAX the state of the run is about to be written back.
        layer.trainable = True
    if frozen:
        raise RuntimeError(
            "SRLoRA layers were frozen during the run, whose compiled step "
            "still trains them: stop training first, then freeze, compile "
            "and fit again. They were thawed. Received: "
            f"trainable=False of {[layer.path for layer in frozen]}"
        )


def check_step(step) -> int:
    """Returns a number of steps done as an `int`."""
    if not is_integer(step) or step < 0:
        raise ValueError(
            "`step` must be the number of training steps done. "
            f"Received: {step=}"
        )
    return int(step)


def warn_of_exhausted(layers, total, step):
    """Warns of layers that have no directions left; `total`: all layers."""
    warnings.warn(
        f"{len(layers)} of {total} SRLoRA layers have used "
        f"all their directions at step {step} and train on as plain "
        f"LoRA: {[layer.path for layer in layers[:3]]}. A larger "
        "`target_rank` has more directions.",
        stacklevel=3,
    )
