"""`keras_srlora.plots`: the numbers in the pictures are those of the run."""

import keras
import matplotlib
import numpy as np
import pytest
from support import regression_data

import keras_srlora
from keras_srlora import plots

matplotlib.use("Agg")

STEPS, INTERVAL = 24, 6


@pytest.fixture(autouse=True)
def _closed():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def trained(recipe):
    """A model, and the callback of its run of 24 steps."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, activation="tanh", name="first")(inputs)
    x = keras.layers.Dense(16, activation="tanh", name="second")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    keras_srlora.enable_srlora(
        model,
        2,
        target_layer_names=["first", "second"],
        recipe=recipe,
    )
    model.compile("adam", "mse")
    recipe = keras_srlora.Recipe(
        **{
            **model.get_layer("first").recipe.to_dict(),
            "stop": 1.0,
            "steps_per_pair": 1,
        }
    )
    callback = keras_srlora.RecompositionCallback(INTERVAL, recipe=recipe)
    model.fit(
        *regression_data(np.random.default_rng(0)),
        batch_size=8,
        epochs=3,
        verbose=0,
        callbacks=[callback],
    )
    return model, callback


@pytest.fixture(scope="module", params=["paper", "lora_restarts"])
def run(request, tmp_path_factory):
    """`(model, callback, path of an adapter file)`."""
    model, callback = trained(request.param)
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    keras_srlora.save_adapter(model, path, include_trainable=True)
    return model, callback, path


def test_each_slot_is_somewhere_at_each_step(run):
    model, callback, _ = run
    for of_layer in plots.layer_runs(callback):
        stays = of_layer.stays(STEPS)
        for slot in range(2):
            spans = sorted((b, e) for _, s, b, e in stays if s == slot)
            assert spans[0][0] == 0 and spans[-1][1] == STEPS
            assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
        # No direction twice, and each that was used once.
        directions = [d for d, *_ in stays if d >= 0]
        record = model.get_layer(of_layer.path).record
        assert sorted(directions) == list(np.flatnonzero(record.used))


@pytest.mark.parametrize("form", ["model", "layers", "callback", "recomposer"])
def test_a_run_in_any_form_is_the_run_in_the_file(form, run):
    model, callback, path = run
    forms = {
        "model": model,
        "layers": [model.get_layer(n) for n in ("first", "second")],
        "callback": callback,
        "recomposer": callback.recomposer,
    }
    for mine, saved in zip(
        plots.layer_runs(forms[form]), plots.layer_runs(path), strict=True
    ):
        assert mine.path == saved.path
        np.testing.assert_array_equal(mine.events, saved.events)
        assert mine.starts_as_lora == saved.starts_as_lora
        (a, b), (c, d) = mine.update(), saved.update()
        # The file leaves out what is zero.
        np.testing.assert_allclose(a.T @ b, c.T @ d, atol=1e-6)


def test_the_spectrum_is_that_of_the_update(run):
    model, *_ = run
    ax = plots.plot_spectrum(model, layer="second")
    layer = model.get_layer("second")
    with keras_srlora.adapter_disabled(model):
        before = keras.ops.convert_to_numpy(layer.effective_kernel())
    after = keras.ops.convert_to_numpy(layer.effective_kernel())
    expected = np.linalg.svd(after - before, compute_uv=False)
    shown = ax.lines[0].get_ydata()
    assert len(shown) > 2  # more than the rank
    np.testing.assert_allclose(shown, expected[: len(shown)], rtol=1e-3)


def test_directions_lifetimes_loss_and_importance_are_drawn(run):
    model, callback, path = run
    steps = sorted({event.step for event in callback.events})
    ax = plots.plot_active_directions(path, layer="first", total_steps=STEPS)
    assert len(ax.patches) == 2 + 2 * len(steps) // 2
    ax = plots.plot_lifetimes(callback)
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["first", "second"]
    # Each direction is counted once.
    counted = sum(int(text.get_text()) for text in ax.texts)
    stays = [s for x in plots.layer_runs(callback) for s in x.stays(STEPS)]
    assert counted == sum(direction >= 0 for direction, *_ in stays)
    ax = plots.plot_loss(np.arange(STEPS, 0, -1), callback, smooth=3)
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == steps
    np.testing.assert_allclose(ax.lines[0].get_ydata()[0], STEPS - 1)
    # Across the picture; many are drawn short.
    assert {line.get_ydata()[1] for line in ax.lines[1:]} == {1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "FEW_LINES", len(steps) - 1)
        ax = plots.plot_loss(np.arange(STEPS, 0, -1), callback)
    assert max(line.get_ydata()[1] for line in ax.lines[1:]) < 0.1
    ax = plots.plot_importance(callback, layer="first")
    first = [event for event in callback.events if event.layer == "first"]
    np.testing.assert_allclose(
        ax.lines[0].get_ydata(), [event.importance[0] for event in first]
    )


def test_what_cannot_be_shown_is_refused(run):
    model, callback, _ = run
    with pytest.raises(ValueError, match="path of one layer.*first"):
        plots.plot_active_directions(model, layer="nothing")
    with pytest.raises(ValueError, match="Received: 3"):
        plots.layer_runs(3)
    with pytest.raises(ValueError, match="Nothing was recomposed"):
        plots.plot_importance([])
    fresh = keras_srlora.SRLoRADense(4, rank=2)
    fresh.build((None, 5))
    with pytest.raises(ValueError, match="not decomposed yet"):
        plots.plot_spectrum(fresh)


def test_a_merged_run_is_told(tmp_path):
    model, callback = trained("lora_restarts")
    path = tmp_path / "run.safetensors"
    keras_srlora.save_adapter(model, path, include_trainable=True)
    keras_srlora.merge_srlora(model)
    for draw in (
        lambda run: plots.plot_loss([1.0, 2.0], run),
        plots.plot_active_directions,
        plots.plot_spectrum,
    ):
        with pytest.raises(ValueError, match="was merged.*Draw before merging"):
            draw(callback)
        draw(path)


@pytest.mark.parametrize("run", ["run.safetensors", None])
def test_importance_needs_events(run):
    with pytest.raises(ValueError, match="scores of all pairs are with"):
        plots.plot_importance(run)
