"""Several adapters on one model, by name, of which one is current."""

from __future__ import annotations

import math

import keras

from keras_srlora.adapters.combine import combined
from keras_srlora.adapters.moments import put_moments
from keras_srlora.adapters.others import warn_of_trained
from keras_srlora.adapters.save_load import clear
from keras_srlora.adapters.save_load import put_on
from keras_srlora.adapters.save_load import read_for
from keras_srlora.adapters.waiting import ARGUMENTS
from keras_srlora.adapters.waiting import find_adapters
from keras_srlora.backend.arguments import is_number
from keras_srlora.conversion.holders import Holders
from keras_srlora.layers import pairs
from keras_srlora.layers.find import require_records


def list_adapters(model: keras.Model) -> list[str]:
    """Lists a model's adapters, in the order in which they were added.

    Args:
        model: a `keras.Model` with SRLoRA layers.

    Returns:
        List of strings; `["default"]` if none was added.
    """
    return list(find_adapters(model).names)


def add_adapter(model: keras.Model, name: str, filepath=None) -> str:
    """Adds an adapter to a model and makes it current.

    The previous adapter is kept in host memory under its name (the first is
    `"default"`), with the values of the other trained variables (a head,
    biases, `modules_to_save`). `set_adapter` switches back to it. Training,
    saving, exporting and merging use the current adapter.

    A fresh adapter computes the same as the pretrained kernels. The other
    trained variables keep their values. Optimizers start anew at step 0: each
    adapter trains as if it had its own optimizer.

    Args:
        model: a `keras.Model` with SRLoRA layers.
        name: str. The name of the new adapter.
        filepath: path of a file that `save_adapter` wrote. It may have another
            rank than the layers: the update is the same, and each layer trains
            it with its own number of pairs. Defaults to `None`: a fresh
            adapter.

    Returns:
        The name of the previous adapter.

    Raises:
        ValueError: before anything changes, if there is no SRLoRA layer, the
            name is taken, the record of a layer is missing or belongs to other
            weights, inside of `adapter_disabled`, or if the file does not fit,
            as in `load_adapter`.

    Example:

    ```python
    keras_srlora.enable_srlora(model, rank=8)
    model.fit(reviews, callbacks=[keras_srlora.RecompositionCallback()])
    keras_srlora.add_adapter(model, "questions", "questions.safetensors")
    keras_srlora.set_adapter(model, "default")
    ```
    """
    adapters = find_adapters(model)
    _check_new(adapters, name)
    require_records(adapters.layers)
    checked = None
    if filepath is not None:
        checked = read_for(model, filepath, any_rank=True)
    kept = adapters.keep(model)
    if checked is None:
        warn_of_trained(
            model,
            adapters.layers,
            "go on from the values that they have in the new adapter",
        )
    with adapters.whole(model, kept):
        if checked is None:
            _start_anew(adapters.layers)
        else:
            put_on(model, *checked)
        return _make_current(adapters, model, name, kept)


def set_adapter(model: keras.Model, name: str) -> str:
    """Makes another adapter current, and keeps the previous one.

    Compiled functions stay, unless the scale of the factors (`lora_alpha`)
    differs. Training continues where it stopped: the optimizer gets the moments
    and the step that it had with this adapter. Its learning rate stays. An
    optimizer that never trained this adapter starts at step 0.

    Args:
        model: a `keras.Model` with SRLoRA layers.
        name: str. One of `list_adapters(model)`.

    Returns:
        The name of the previous adapter.

    Raises:
        ValueError: before anything changes, if there is no adapter of that
            name, the pretrained weights of a layer have changed since the
            adapters were added, or inside of `adapter_disabled`.
    """
    adapters = find_adapters(model)
    _check_known(adapters, name)
    require_records(adapters.layers)
    if name == adapters.current:
        return name
    adapter = adapters.waiting[name]
    adapters.check_kernels(adapter)
    kept = adapters.keep(model)
    holders = None
    if adapters.changes_scales(adapter):
        holders = Holders(model, adapters.layers)
    with adapters.whole(model, kept):
        adapters.put_on(adapter)
        if holders is not None:
            holders.follow()
        return _make_current(adapters, model, name, kept)


def delete_adapter(model: keras.Model, name: str) -> None:
    """Deletes an adapter that is not current.

    Args:
        model: a `keras.Model` with SRLoRA layers.
        name: str. One of `list_adapters(model)`.

    Raises:
        ValueError: if there is no adapter of that name, or it is current.
    """
    adapters = find_adapters(model)
    _check_known(adapters, name)
    if name == adapters.current:
        raise ValueError(
            f"Adapter {name!r} is current: call `set_adapter(model, ...)` with "
            "another one first, or `unload_srlora(model)` to drop all. "
            f"Received: name={name!r} of {adapters.names}"
        )
    del adapters.waiting[name]
    adapters.names.remove(name)


def combine_adapters(
    model: keras.Model, weights: dict[str, float], name: str = "combined"
) -> str:
    """Adds the weighted sum of adapters as a new adapter, and makes it current.

    Each kernel gets the exact weighted sum of the whole updates, fused pairs
    included. The largest pairs become the factors. The others are fused into
    the frozen kernel: any number, or at most `target_rank` if it is quantized
    or the recipe uses each direction once. The other trained variables keep
    their values.

    Args:
        model: a `keras.Model` with SRLoRA layers.
        weights: dict from names of adapters to numbers.
        name: str. The name of the new adapter. Defaults to `"combined"`.

    Returns:
        The name of the previous adapter.

    Raises:
        ValueError: before anything changes, if a name does not exist or the new
            one is taken, a weight is not a finite number, a sum is not finite
            or has no room, and as in `set_adapter`.

    Example:

    ```python
    keras_srlora.combine_adapters(model, {"reviews": 0.7, "questions": 0.3})
    ```
    """
    adapters = find_adapters(model)
    _check_new(adapters, name)
    _check_weights(adapters, weights)
    require_records(adapters.layers)
    kept = adapters.keep(model)
    known = {**adapters.waiting, adapters.current: kept}
    for part in weights:
        adapters.check_kernels(known[part])
    sums = [
        combined(layer, *_of_layer(layer, known, weights))
        for layer in adapters.layers
    ]
    with adapters.whole(model, kept):
        for layer, of_layer in zip(adapters.layers, sums):
            if of_layer is None:
                clear(layer)
            else:
                a, b, record = of_layer
                arguments = {x: getattr(layer, x) for x in ARGUMENTS}
                pairs.restore_adapter(layer, a, b, arguments, record)
        put_moments(adapters.layers, [])
        return _make_current(adapters, model, name, kept)


def _start_anew(layers):
    """Makes the adapter of some layers a fresh one."""
    for layer in layers:
        clear(layer)
        pairs.draw_factors(layer)
    put_moments(layers, [])


def _of_layer(layer, known, weights):
    """Those adapters that have a part in a layer, and their weights."""
    states = [known[name].state_of(layer) for name in weights]
    found = [
        (state.part(), float(weight))
        for state, weight in zip(states, weights.values())
        if state is not None
    ]
    return [part for part, _ in found], [weight for _, weight in found]


def _make_current(adapters, model, name, kept):
    """Notes that the layers hold another adapter; returns the former name."""
    before = adapters.current
    adapters.waiting.pop(name, None)
    adapters.waiting[before] = kept
    adapters.current = name
    if name not in adapters.names:
        adapters.names.append(name)
    adapters.attach(model)
    return before


def _check_new(adapters, name):
    if not isinstance(name, str) or not name:
        raise ValueError(
            "The name of an adapter must be a string that is not empty. "
            f"Received: name={name!r}"
        )
    if name in adapters.names:
        raise ValueError(
            f"The model has an adapter {name!r} already: choose another name, "
            f"or delete it first. Received: name={name!r}, and there are "
            f"{adapters.names}"
        )


def _check_known(adapters, name):
    if name not in adapters.names:
        raise ValueError(
            "The model has no adapter of that name. Received: "
            f"name={name!r}; there are {adapters.names}"
        )


def _check_weights(adapters, weights):
    if not isinstance(weights, dict) or not weights:
        raise ValueError(
            "`weights` must be a dict from names of adapters to numbers, as in "
            f'`{{"reviews": 0.7}}`. Received: weights={weights!r}'
        )
    for name, weight in weights.items():
        _check_known(adapters, name)
        if not is_number(weight) or not math.isfinite(weight):
            raise ValueError(
                "The weight of an adapter must be a finite number. "
                f"Received: {weight!r} for {name!r}"
            )
