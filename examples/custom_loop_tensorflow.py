"""SRLoRA in a custom training loop with TensorFlow.

A `Recomposer` follows the recipe `"lora_restarts"`. `recomposer.optimizer`
scores the pairs inside a `tf.function`, from the gradients of a
`tf.GradientTape`; `before_step` fuses and restarts pairs between two steps,
outside of the function, which is not traced again.

A small network that was pretrained on the digits 0 to 4 is adapted to the
digits 5 to 9: `python custom_loop_tensorflow.py`, a few seconds.
"""

import os

if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
    raise SystemExit(
        "This loop is for TensorFlow. Unset KERAS_BACKEND or run the script "
        f"of its backend. Received: KERAS_BACKEND={os.environ['KERAS_BACKEND']}"
    )

# Without a GPU, TensorFlow logs an error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import _digits
import keras
import tensorflow as tf

import keras_srlora


def train(model, recomposer, batches):
    """Returns the loss of each step; `recomposer.events` has the rest."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = model.trainable_variables
    optimizer = recomposer.optimizer
    optimizer.build(variables)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        gradients = tape.gradient(loss, variables)
        # Scores the pairs, then hands the gradients on to Adam.
        optimizer.apply(gradients, variables)
        return loss

    losses = []
    for step, (x, y) in enumerate(batches):
        _digits.print_recompositions(recomposer.before_step(step))
        losses.append(train_step(x, y))
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
    recomposer = keras_srlora.Recomposer(
        model,
        keras.optimizers.Adam(3e-3),
        recipe=args.recipe,
        total_steps=args.steps,
    )
    _digits.adapt(model, recomposer, train, args.steps)


if __name__ == "__main__":
    main()
