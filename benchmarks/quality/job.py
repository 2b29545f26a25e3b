"""One run: a task, a method, a rank, a learning rate, a seed -> a record."""

import functools
import time

import keras
import numpy as np

from benchmarks.quality import methods
from benchmarks.quality import prototype
from benchmarks.quality.records import KEY
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.task import count
from benchmarks.quality.tasks.task import part

POINTS = 40  # of the curve of training losses that a record keeps


@functools.cache
def load(name):
    """A task, loaded once in a process."""
    return TASKS[name]()


def run(key):
    """Trains once; returns a dict of plain Python."""
    name, method, rank, rate, seed = key
    task = load(name)
    start = time.time()
    keras.utils.set_random_seed(seed)
    model = task.build(seed)
    schedule = keras.optimizers.schedules.PolynomialDecay(
        rate, task.steps, end_learning_rate=0.0
    )
    if method.startswith("x:"):
        optimizer = prototype.PairAdamW(schedule, weight_decay=0.01)
        callbacks = prototype.adapt(method, model, task, rank, optimizer)
    else:
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01)
        callbacks = methods.METHODS[method](model, task.targets, rank)
    model.compile(optimizer, task.loss, metrics=task.metrics)
    losses = StepLosses()
    model.fit(
        ShuffledBatches(task, seed),
        epochs=task.epochs,
        verbose=0,
        callbacks=[losses, *callbacks],
    )
    curve = [float(p.mean()) for p in np.array_split(losses.values, POINTS)]
    record = {
        **dict(zip(KEY, key)),
        **evaluate(model, task, "validation"),
        **evaluate(model, task, "test"),
        # Of the last tenth of the run.
        "train_loss": float(np.mean(curve[-POINTS // 10 :])),
        "curve": [rounded(value, 4) for value in curve],
        "parameters": sum(
            int(np.prod(v.shape)) for v in model.trainable_variables
        ),
        "recompositions": sum(len(callback.events) for callback in callbacks),
        "seconds": round(time.time() - start, 2),
        "keras": f"{keras.__version__} {keras.backend.backend()}",
    }
    keras.backend.clear_session(free_memory=False)
    return {
        name: rounded(value, 6) if isinstance(value, float) else value
        for name, value in record.items()
    }


def evaluate(model, task, part):
    """`{"test_loss": ...}` and the metrics likewise."""
    x, y = task.splits[part]
    values = model.evaluate(x, y, batch_size=256, verbose=0, return_dict=True)
    return {f"{part}_{name}": float(value) for name, value in values.items()}


def rounded(value, digits):
    """A number that JSON can hold; a run that diverged has a huge loss."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else 1e9


class ShuffledBatches(keras.utils.PyDataset):
    """The same batches for every method, in an order of the seed alone."""

    def __init__(self, task, seed):
        super().__init__()
        self.task = task
        self.random = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return self.task.steps // self.task.epochs

    def __getitem__(self, index):
        x, y = self.task.splits["train"]
        size = self.task.batch_size
        chosen = self.order[index * size : (index + 1) * size]
        return part(x, chosen), y[chosen]

    def on_epoch_end(self):
        """Draws the order of the next epoch."""
        x, _ = self.task.splits["train"]
        self.order = self.random.permutation(count(x))


class StepLosses(keras.callbacks.Callback):
    """Keeps the loss of each batch; `logs` has its mean over the epoch."""

    # On JAX the calls come from other threads, in any order.
    async_safe = True

    def __init__(self):
        super().__init__()
        self.values = []

    def on_epoch_begin(self, epoch, logs=None):
        """Forgets the sums of the last epoch."""
        self.sums = {}

    def on_train_batch_end(self, batch, logs=None):
        """Keeps the sum of the epoch's losses so far."""
        self.sums[batch] = float(logs["loss"]) * (batch + 1)

    def on_epoch_end(self, epoch, logs=None):
        """Takes the sums apart."""
        ordered = [self.sums[batch] for batch in sorted(self.sums)]
        self.values.extend(np.diff(ordered, prepend=0.0))
