"""SRLoRA in a custom training loop with JAX.

A `Recomposer` follows the recipe `"lora_restarts"`. `stateless_apply` of
`recomposer.optimizer` scores the pairs inside a `jax.jit` function that takes
all state and may reuse its memory (`donate_argnums`). A recomposition works on
the variables of the model and of the optimizer: the loop writes its state to
them before it and reads it again after it. The function is not compiled again.

A small network that was pretrained on the digits 0 to 4 is adapted to the
digits 5 to 9: `python custom_loop_jax.py`, a few seconds.
"""

import os

if os.environ.setdefault("KERAS_BACKEND", "jax") != "jax":
    raise SystemExit(
        "This loop is for JAX. Unset KERAS_BACKEND or run the script of its "
        f"backend. Received: KERAS_BACKEND={os.environ['KERAS_BACKEND']}"
    )

import functools

import _digits
import jax
import keras

import keras_srlora


def read(variables):
    """The values of lists of variables: the state of the loop."""
    return [[v.value for v in group] for group in variables]


def write(variables, state):
    """Gives the variables the values that the loop has reached."""
    for group, values in zip(variables, state):
        for variable, value in zip(group, values):
            variable.assign(value)


def train(model, recomposer, batches):
    """Returns the loss of each step; `recomposer.events` has the rest."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = recomposer.optimizer
    optimizer.build(model.trainable_variables)

    def loss_of(trainable, non_trainable, x, y):
        logits, non_trainable = model.stateless_call(
            trainable, non_trainable, x, training=True
        )
        return loss_fn(y, logits), non_trainable

    loss_and_gradients_of = jax.value_and_grad(loss_of, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, x, y):
        trainable, non_trainable, optimizer_variables = state
        (loss, non_trainable), gradients = loss_and_gradients_of(
            trainable, non_trainable, x, y
        )
        # Scores the pairs, then hands the gradients on to Adam. The running
        # averages are among the optimizer's variables.
        trainable, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        return loss, [trainable, non_trainable, optimizer_variables]

    variables = (
        model.trainable_variables,
        model.non_trainable_variables,  # the frozen kernels
        optimizer.variables,
    )
    # The step takes over the memory of the state, so that from here on the
    # variables hold nothing until they are written.
    state = read(variables)
    losses = []
    for step, (x, y) in enumerate(batches):
        is_due = recomposer.is_due(step)
        if is_due:
            write(variables, state)
        _digits.print_recompositions(recomposer.before_step(step))
        if is_due:
            state = read(variables)
        loss, state = train_step(state, x, y)
        losses.append(loss)
        recomposer.report_loss(loss)
        _digits.print_loss(step + 1, len(batches), losses)
    write(variables, state)
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
