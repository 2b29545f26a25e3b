"""What `fit`, models and optimizers keep about a run."""

import contextlib


def loss_metric(model):
    """The mean of the training loss over the epoch so far, or `None`.

    A model lists it first among its metrics, but for one whose `train_step`
    makes its own. Private: `Trainer._loss_tracker`.
    """
    return getattr(model, "_loss_tracker", None)


def get_initial_epoch(model):
    """Epoch at which a restored `fit` begins, or `None`.

    `BackupAndRestore` sets it. Private: `Trainer._initial_epoch`.
    """
    return model._initial_epoch


def set_initial_epoch(model, epoch):
    """Sets what `get_initial_epoch` returns, before the first epoch begins."""
    model._initial_epoch = epoch


def micro_batches_seen(optimizer):
    """Number of gradients that the optimizer received, as a variable.

    `optimizer.iterations` divides by `gradient_accumulation_steps`, which
    loses the place inside an accumulation. Private: `Optimizer._iterations`.
    """
    return optimizer._iterations


def accumulated_gradient(optimizer, variable):
    """The sum of the gradients of `variable` in the current accumulation.

    Private: `Optimizer._accumulated_gradients`, `_get_variable_index`.
    """
    index = optimizer._get_variable_index(variable)
    return optimizer._accumulated_gradients[index]


def optimizer_trainable_variables(optimizer):
    """The variables that a built optimizer was built for, in order.

    Private: `Optimizer._trainable_variables`.
    """
    return list(optimizer._trainable_variables)


@contextlib.contextmanager
def around_update(optimizer, around):
    """Calls `around(update)` in place of `update()` in the optimizer's steps.

    `update()` moves the variables by the gradients. Weight decay comes before
    it, and the moving average of the weights after it. Private:
    `Optimizer._backend_update_step`.
    """
    name = "_backend_update_step"
    # Of the class: the replicas of a `tf.distribute` strategy are threads that
    # do this at the same time.
    update = getattr(type(optimizer), name)
    # Past `__setattr__`, which would track it.
    vars(optimizer)[name] = lambda *args: around(
        lambda: update(optimizer, *args)
    )
    try:
        yield
    finally:
        vars(optimizer).pop(name, None)


def is_stock_optimizer(optimizer):
    """Whether the class comes with Keras, and its slots are known here.

    There is no public marker; the module of the class is one.
    """
    return type(optimizer).__module__.startswith("keras.")


def exchange_train_function(model, function):
    """Gives a model another train function, and returns the one it had.

    `fit` makes one only where the attribute is `None`. Its name is public,
    setting it is not documented.
    """
    old = model.train_function
    model.train_function = function
    return old


def compile_config(model):
    """An object that `Model.compile` makes anew each time.

    There is no public way to tell that a model was compiled again. Private:
    `Trainer._compile_config`.
    """
    return getattr(model, "_compile_config", None)


def keep_training(model, kept):
    """Keeps a wrapper and its compiled function with a model, for its next fit.

    Past Keras's `__setattr__`: neither tracked nor saved.
    """
    vars(model)["_srlora_training"] = kept


def get_kept_training(model):
    """Returns the pair that `keep_training` kept, or `None`."""
    return vars(model).get("_srlora_training")
