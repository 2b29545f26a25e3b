"""SRLoRA in a loop of your own with PyTorch, and an optimizer of PyTorch.

What it shows: `Sensitivity` scores the pairs from the gradients that
`loss.backward()` leaves; `recompose` fuses and restarts pairs between two
steps. It knows no `torch.optim` optimizer, so that the loop itself restarts
the moments of the restarted pairs.

A small network that was pretrained on the digits 0 to 4 is adapted to the
digits 5 to 9: `python custom_loop_torch.py`, a few seconds.
"""

import os

if os.environ.setdefault("KERAS_BACKEND", "torch") != "torch":
    raise SystemExit(
        "This loop is for PyTorch. Unset KERAS_BACKEND or run the script of "
        f"its backend. Received: KERAS_BACKEND={os.environ['KERAS_BACKEND']}"
    )

import functools

import _digits
import keras
import torch

import keras_srlora


def train(model, statistics, optimizer, batches, interval):
    """Returns the loss of each step and the record of recompositions."""
    variables = model.trainable_variables
    losses, record = [], []
    for step, (x, y) in enumerate(batches):
        # `step` steps are done. None before the first and after the last.
        if step > 0 and step % interval == 0:
            events = keras_srlora.recompose(statistics, step=step)
            restart_moments(optimizer, statistics.layers, events)
            _digits.print_recompositions(events)
            record.extend(events)
        x = keras.ops.convert_to_tensor(x)  # on Keras's device
        y = keras.ops.convert_to_tensor(y, "int64")
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x, training=True), y)
        loss.backward()
        # Before the step: a weight and its gradient belong together.
        statistics.update([v.value.grad for v in variables], variables)
        optimizer.step()
        losses.append(loss.detach())
        _digits.print_loss(step + 1, len(batches), losses)
    return [float(loss) for loss in losses], record


def restart_moments(optimizer, layers, events):
    """Zeroes the first moments of the restarted pairs; a pair is a row.

    They point where the fused pairs were going. The second moments go on: from
    zero, so late in a run, they would make the next steps far too large.
    """
    layers = {layer.path: layer for layer in layers}
    for event in events:
        for factor in layers[event.layer].factors:
            moments = optimizer.state[factor.value]
            moments["exp_avg"][list(event.slots)] = 0.0


def main():
    steps = _digits.parse_arguments(__doc__).steps
    keras.utils.set_random_seed(0)
    model = _digits.pretrained_model()

    # From here on the hidden kernels are frozen; factors and head are trained.
    layers = keras_srlora.enable_srlora(
        model, rank=_digits.RANK, target_rank=_digits.TARGET_RANK
    )
    statistics = keras_srlora.Sensitivity(layers)
    optimizer = torch.optim.AdamW(
        [v.value for v in model.trainable_variables], lr=3e-3
    )

    loop = functools.partial(train, model, statistics, optimizer)
    _digits.adapt(model, steps, loop)


if __name__ == "__main__":
    main()
