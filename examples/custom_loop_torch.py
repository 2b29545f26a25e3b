"""SRLoRA in a custom training loop with PyTorch, and an optimizer of PyTorch.

A `Recomposer` follows the recipe `"lora_restarts"`. Whenever the optimizer
steps, the gradients that `loss.backward()` left are scored; `before_step` fuses
and restarts pairs between two steps, and treats the optimizer's moments of the
restarted pairs by the recipe.

A small network that was pretrained on the digits 0 to 4 is adapted to the
digits 5 to 9: `python custom_loop_torch.py`, a few seconds.
"""

import os

if os.environ.setdefault("KERAS_BACKEND", "torch") != "torch":
    raise SystemExit(
        "This loop is for PyTorch. Unset KERAS_BACKEND or run the script of "
        f"its backend. Received: KERAS_BACKEND={os.environ['KERAS_BACKEND']}"
    )

import _digits
import keras
import torch

import keras_srlora


def train(model, recomposer, batches):
    """Returns the loss of each step; `recomposer.events` has the rest."""
    optimizer = recomposer.optimizer
    losses = []
    for step, (x, y) in enumerate(batches):
        _digits.print_recompositions(recomposer.before_step(step))
        x = keras.ops.convert_to_tensor(x)  # on Keras's device
        y = keras.ops.convert_to_tensor(y, "int64")
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x, training=True), y)
        loss.backward()
        optimizer.step()  # scores the pairs before it moves them
        losses.append(loss.detach())
        recomposer.report_loss(losses[-1])
        _digits.print_loss(step + 1, len(batches), losses)
    return [float(loss) for loss in losses]


def main():
    args = _digits.parse_arguments(__doc__)
    keras.utils.set_random_seed(0)
    model = _digits.pretrained_model()

    # From here on the hidden kernels are frozen; factors and head are trained.
    keras_srlora.enable_srlora(
        model, rank=_digits.RANK, target_rank=_digits.TARGET_RANK
    )
    optimizer = torch.optim.AdamW(
        [v.value for v in model.trainable_variables], lr=3e-3
    )
    recomposer = keras_srlora.Recomposer(
        model, optimizer, recipe=args.recipe, total_steps=args.steps
    )
    _digits.adapt(model, recomposer, train, args.steps)


if __name__ == "__main__":
    main()
