"""A moving subspace reaches what no subspace of its rank can hold."""

import keras
import numpy as np
import pytest
from support import effective

import keras_srlora

WIDTH, UPDATE_RANK, RANK, BATCH, STEPS = 128, 48, 8, 256, 4000


@pytest.fixture(scope="module")
def teacher():
    """A kernel, and an update of rank 48 whose best rank 8 leaves 0.708."""
    rng = np.random.default_rng(0)
    pretrained = rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    left, _ = np.linalg.qr(rng.standard_normal((WIDTH, UPDATE_RANK)))
    right, _ = np.linalg.qr(rng.standard_normal((WIDTH, UPDATE_RANK)))
    spectrum = 0.9587944339 ** np.arange(UPDATE_RANK)
    update = (left * spectrum) @ right.T
    update *= 0.1 * np.sqrt(WIDTH) / np.linalg.norm(update)
    x = rng.standard_normal((250 * BATCH, WIDTH)).astype("float32")
    y = (x @ (pretrained + update)).astype("float32")
    return pretrained.astype("float32"), update, x, y


def error_left(teacher, recipe, learning_rate, callbacks, steps=STEPS):
    pretrained, update, x, y = teacher
    keras.utils.set_random_seed(0)
    layer = keras_srlora.SRLoRADense(
        WIDTH, use_bias=False, rank=RANK, target_rank=WIDTH, recipe=recipe
    )
    inputs = keras.Input((WIDTH,))
    model = keras.Model(inputs, layer(inputs))
    layer.set_weights([pretrained])
    model.compile(keras.optimizers.Adam(learning_rate), "mse")
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=steps // 250,
        verbose=0,
        callbacks=callbacks,
    )
    left = effective(layer) - pretrained - update
    return np.linalg.norm(left) / np.linalg.norm(update)


def test_the_best_update_of_rank_8_leaves_0_708(teacher):
    s = np.linalg.svd(teacher[1], compute_uv=False)
    best = np.sqrt(np.sum(s[RANK:] ** 2) / np.sum(s**2))
    np.testing.assert_allclose(best, 0.708, atol=1e-3)


def test_lora_stays_at_the_best_of_its_rank(teacher):
    # Long enough to be there: more steps leave it where it is.
    error = error_left(teacher, "lora_restarts", 3e-3, [], steps=1000)
    assert 0.70 < error < 0.72


def test_srlora_goes_below(teacher):
    # (128 - 8) / 4 = 30 recompositions, and a stretch after the last.
    callback = keras_srlora.RecompositionCallback(interval=STEPS // 30 - 3)
    error = error_left(teacher, "paper", 3e-4, [callback])
    assert len(callback.events) == 30
    assert error < 0.05
