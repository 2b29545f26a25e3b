"""Compiled functions that were made before a change compute what is new."""

import keras
import numpy as np
import pytest
from pieces import NAMES
from pieces import WIDTH
from pieces import assert_close
from pieces import batch
from pieces import called
from pieces import collected_warnings
from pieces import convert
from pieces import differ
from pieces import encoder
from pieces import nudge
from pieces import predicted
from pieces import tuned_encoder
from support import bert_outputs
from support import tiny_bert
from support import to_numpy

import keras_srlora

BACKEND = keras.backend.backend()
tensorflow_only = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="`tf.function` is TensorFlow's"
)


# Models that hold the layers of another one.


class Holder(keras.Model):
    """A subclassed model that holds another one, in several ways."""

    def __init__(self, held, way):
        super().__init__()
        self.way = way
        if way == "attribute":
            self.held = held
        elif way == "list":
            self.parts = [held]
        elif way == "layers":
            self.one, self.two = (held.get_layer(name) for name in NAMES)
        self.head = keras.layers.Dense(3, name="head")

    def call(self, inputs):
        if self.way == "attribute":
            x = self.held(inputs)
        elif self.way == "list":
            x = self.parts[0](inputs)
        else:
            x = self.two(self.one(inputs))
        return self.head(x)


@keras.saving.register_keras_serializable("silent")
class InsideOfALayer(keras.layers.Layer):
    """A layer that is no model, and holds one."""

    def __init__(self, held, **kwargs):
        super().__init__(**kwargs)
        self.held = held

    def build(self, input_shape):
        self.built = True

    def call(self, inputs):
        return self.held(inputs)


def functional(inner):
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, keras.layers.Dense(3)(inner(inputs)))


def nested_twice(inner):
    inputs = keras.Input((WIDTH,))
    middle = functional(inner)
    return keras.Model(inputs, keras.layers.Dense(2)(middle(inputs)))


def sequential(inner):
    model = keras.Sequential([inner, keras.layers.Dense(3)])
    model.build((None, WIDTH))
    return model


def sequential_twice(inner):
    model = keras.Sequential([sequential(inner), keras.layers.Dense(3)])
    model.build((None, WIDTH))
    return model


def subclassed(way):
    def make(inner):
        model = Holder(inner, way)
        model(np.zeros((1, WIDTH), "float32"))
        return model

    return make


def on_the_same_tensors(inner):
    """Neither has the other inside: they share layers."""
    return keras.Model(inner.input, keras.layers.Dense(3)(inner.output))


def feature_extractor(inner):
    return keras.Model(inner.input, inner.get_layer("first").output)


def two_outputs(inner):
    first = inner.get_layer("first").output
    head = keras.layers.Dense(3)(inner.output)
    return keras.Model(inner.input, {"features": first, "head": head})


def in_a_layer(inner):
    inputs = keras.Input((WIDTH,))
    outputs = keras.layers.Dense(3)(InsideOfALayer(inner)(inputs))
    return keras.Model(inputs, outputs)


def outer_of_an_outer_layer(inner):
    """Subclassed, around a functional model around the inner one."""
    model = Holder(functional(inner), "attribute")
    model(np.zeros((1, WIDTH), "float32"))
    return model


HOLDERS = {
    "functional": functional,
    "nested_twice": nested_twice,
    "sequential": sequential,
    "sequential_twice": sequential_twice,
    "subclass_attribute": subclassed("attribute"),
    "subclass_list": subclassed("list"),
    "subclass_layers": subclassed("layers"),
    "same_tensors": on_the_same_tensors,
    "feature_extractor": feature_extractor,
    "two_outputs": two_outputs,
    "inside_of_a_layer": in_a_layer,
    "subclass_of_functional": outer_of_an_outer_layer,
}


# What changes the layers of the inner model, used before by another one.


class Change:
    """`before(inner)` happens before the outer model is used."""

    def before(self, inner, folder):
        pass

    def change(self, inner, folder):
        raise NotImplementedError


class Enable(Change):
    def change(self, inner, folder):
        convert(inner)


class EnableAndTrain(Change):
    """The default recipe starts without changing anything; training does."""

    def change(self, inner, folder):
        nudge(convert(inner, "adaptive"))


class Merge(Change):
    def before(self, inner, folder):
        nudge(convert(inner))

    def change(self, inner, folder):
        keras_srlora.merge_srlora(inner)


class EnableAndMerge(Change):
    """Used as a plain model, next when it is a plain one again."""

    def change(self, inner, folder):
        nudge(convert(inner))
        keras_srlora.merge_srlora(inner)


class Unload(Change):
    def before(self, inner, folder):
        nudge(convert(inner))

    def change(self, inner, folder):
        keras_srlora.unload_srlora(inner)


class Load(Change):
    """An adapter onto plain layers."""

    def before(self, inner, folder):
        keras_srlora.save_adapter(tuned_encoder(), folder / "a.safetensors")

    def change(self, inner, folder):
        keras_srlora.load_adapter(inner, folder / "a.safetensors")


class LoadAnotherScale(Change):
    """Onto SRLoRA layers: of the same shapes, with another `lora_alpha`."""

    def before(self, inner, folder):
        keras_srlora.save_adapter(
            tuned_encoder(lora_alpha=8.0), folder / "a.safetensors"
        )
        nudge(convert(inner, lora_alpha=2.0))

    def change(self, inner, folder):
        keras_srlora.load_adapter(inner, folder / "a.safetensors")


class ConvertAgainWithAnotherScale(Change):
    """Merged and converted in between: as many variables, of equal shapes."""

    def before(self, inner, folder):
        nudge(convert(inner, lora_alpha=2.0))

    def change(self, inner, folder):
        keras_srlora.merge_srlora(inner)
        nudge(convert(inner, lora_alpha=10.0))


class ConvertAnotherLayer(Change):
    """As many variables, of equal shapes, of another layer."""

    def before(self, inner, folder):
        nudge(convert(inner, names=["first"]))

    def change(self, inner, folder):
        keras_srlora.merge_srlora(inner)
        nudge(convert(inner, names=["second"]))


class SwitchAdapter(Change):
    """To one of another rank and scale, and back."""

    def before(self, inner, folder):
        keras_srlora.save_adapter(
            tuned_encoder(rank=3, lora_alpha=9.0), folder / "a.safetensors"
        )
        nudge(convert(inner))
        keras_srlora.add_adapter(inner, "other", folder / "a.safetensors")
        keras_srlora.set_adapter(inner, "default")

    def change(self, inner, folder):
        keras_srlora.set_adapter(inner, "other")


CHANGES = {
    "enable": Enable(),
    "enable_and_train": EnableAndTrain(),
    "merge": Merge(),
    "enable_and_merge": EnableAndMerge(),
    "unload": Unload(),
    "load": Load(),
    "load_another_scale": LoadAnotherScale(),
    "convert_again_with_another_scale": ConvertAgainWithAnotherScale(),
    "convert_another_layer": ConvertAnotherLayer(),
    "switch_adapter": SwitchAdapter(),
}


# Every holder with some changes, every change with some holders.
PAIRS = [
    (holder, change)
    for holder in HOLDERS
    for change in CHANGES
    if holder in ("functional", "feature_extractor")
    or change in ("enable", "merge", "load")
]


@pytest.mark.parametrize("holder, change", PAIRS)
def test_every_model_that_holds_a_changed_layer_predicts_anew(
    holder, change, rng, tmp_path
):
    if BACKEND == "torch" and holder != "functional":
        pytest.skip("PyTorch compiles nothing here")
    x, inner = batch(rng), encoder()
    with collected_warnings():
        CHANGES[change].before(inner, tmp_path)
        outer = HOLDERS[holder](inner)
        used_before = predicted(outer, x)
        assert_close(used_before, called(outer, x))
        CHANGES[change].change(inner, tmp_path)
    assert_close(predicted(outer, x), called(outer, x))


@pytest.mark.parametrize("change", ["enable_and_train", "merge", "unload"])
def test_a_change_of_an_outer_model_reaches_a_model_inside_of_it(
    change, rng, tmp_path
):
    """The other way round: the inner model was used, the outer is changed."""
    x, inner = batch(rng), encoder()
    outer = functional(inner)
    with collected_warnings():
        CHANGES[change].before(outer, tmp_path)
        extractor = feature_extractor(inner)
        predicted(inner, x)
        predicted(extractor, x)
        CHANGES[change].change(outer, tmp_path)
    for model in (inner, extractor):
        assert_close(predicted(model, x), called(model, x))


# Other compiled functions of a Keras model.


def compiled(inner):
    outer = functional(inner)
    outer.compile("sgd", "mse", metrics=["mae"])
    return outer


FUNCTIONS = {
    "evaluate": lambda model, x, y: model.evaluate(x, y, verbose=0)[0],
    "test_on_batch": lambda model, x, y: model.test_on_batch(x, y)[0],
    "predict_on_batch": lambda model, x, y: np.mean(
        (model.predict_on_batch(x) - y) ** 2
    ),
    # The loss before the step.
    "train_on_batch": lambda model, x, y: model.train_on_batch(x, y)[0],
    "fit": lambda model, x, y: model.fit(
        x, y, batch_size=len(x), verbose=0
    ).history["loss"][0],
}

# The optimizer may need other variables: then a warning is enough.
TRAIN = ("fit", "train_on_batch")


@pytest.mark.parametrize("change", ["merge", "unload", "load", "enable"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_of_an_outer_model_computes_anew(
    function, change, rng, tmp_path
):
    x, y, inner = batch(rng), batch(rng, width=3), encoder()
    CHANGES[change].before(inner, tmp_path)
    outer = compiled(inner)
    FUNCTIONS[function](outer, x, y)
    with collected_warnings() as messages:
        CHANGES[change].change(inner, tmp_path)
    if function in TRAIN and any("compile" in text for text in messages):
        outer.compile("sgd", "mse", metrics=["mae"])
    outer.reset_metrics()
    expected = np.mean((called(outer, x) - y) ** 2)
    assert_close(FUNCTIONS[function](outer, x, y), expected)


# An outer model whose layers were merged trains, and its file loads.


def tuned_outer(rng):
    x, y, inner = batch(rng, 16), batch(rng, 16, 3), encoder()
    with collected_warnings():
        nudge(convert(inner))
        outer = functional(inner)
        outer.compile("adam", "mse")
        outer.fit(x, y, batch_size=8, verbose=0)
    return outer, inner, x, y


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_an_outer_model_trains_on_after_its_inner_model_was_merged(back, rng):
    outer, inner, x, y = tuned_outer(rng)
    with collected_warnings():
        getattr(keras_srlora, back)(inner)
    before = to_numpy(inner.get_layer("first").kernel)
    outer.fit(x, y, batch_size=8, verbose=0)
    # The kernel is trainable again, and is trained.
    assert differ(inner.get_layer("first").kernel, before, 1e-4)


@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_an_outer_model_saves_a_file_that_loads_after_merging(
    back, rng, tmp_path
):
    outer, inner, x, _ = tuned_outer(rng)
    with collected_warnings():
        getattr(keras_srlora, back)(inner)
    expected = called(outer, x)
    outer.save(tmp_path / "outer.keras")
    # A warning that a state was not loaded would be an error.
    loaded = keras.models.load_model(tmp_path / "outer.keras")
    assert_close(predicted(loaded, x), expected)


def test_an_outer_model_trains_on_after_its_inner_model_was_converted(rng):
    """Its optimizer was built for the kernels: renewed, or it is told."""
    x, y, inner = batch(rng, 16), batch(rng, 16, 3), encoder()
    outer = functional(inner)
    outer.compile("adam", "mse")
    outer.fit(x, y, batch_size=8, verbose=0)
    with collected_warnings() as messages:
        layers = convert(inner)
    if any("compile" in message for message in messages):
        outer.compile("adam", "mse")
    before = to_numpy(layers[0].lora_kernel_b)
    outer.fit(x, y, batch_size=8, verbose=0)
    assert differ(layers[0].lora_kernel_b, before, 1e-4)


# Functions that belong to no model: right, or there was a warning.


def held_predict_function(model):
    model.predict(np.zeros((1, WIDTH), "float32"), verbose=0)
    function = model.make_predict_function()

    return lambda x: function([(x,)])


def function_of_the_user(model):
    import tensorflow as tf

    @tf.function
    def function(x):
        return model(x, training=False)

    return function


class WithAFunction(keras.Model):
    """Its own compiled method, as hand-written samplers have it."""

    def __init__(self, held):
        super().__init__()
        import tensorflow as tf

        self.held = held
        self.serve = tf.function(lambda x: self.held(x, training=False))

    def call(self, inputs):
        return self.held(inputs)


def function_of_a_subclass(model):
    return WithAFunction(model).serve


LOOSE = {
    "held_predict_function": held_predict_function,
    "function_of_the_user": function_of_the_user,
    "function_of_a_subclass": function_of_a_subclass,
}


@tensorflow_only
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loose", LOOSE)
def test_a_function_out_of_reach_is_right_or_warned_of(
    loose, change, rng, tmp_path
):
    x, inner = batch(rng), encoder()
    CHANGES[change].before(inner, tmp_path)
    outer = functional(inner)
    function = LOOSE[loose](outer)
    assert_close(function(x), called(outer, x))
    with collected_warnings() as messages:
        CHANGES[change].change(inner, tmp_path)
    if not any("function" in message for message in messages):
        assert_close(function(x), called(outer, x))


@tensorflow_only
@pytest.mark.parametrize("back", ["merge_srlora", "unload_srlora"])
def test_a_function_of_the_user_is_right_after_merging(back, rng):
    """Factors that are left at zero add nothing to what was traced."""
    x, inner = batch(rng), tuned_encoder()
    function = function_of_the_user(inner)
    function(x)
    with collected_warnings():
        getattr(keras_srlora, back)(inner)
    assert_close(function(x), called(inner, x))


def test_a_switched_off_adapter_reaches_other_models(rng):
    x, inner = batch(rng), encoder()
    pretrained = called(inner, x)
    extractor = keras.Model(inner.input, inner.output)
    predicted(extractor, x)
    with collected_warnings():
        nudge(convert(inner))
    tuned = called(inner, x)
    assert differ(tuned, pretrained)
    with keras_srlora.adapter_disabled(inner):
        assert_close(predicted(extractor, x), pretrained)
    assert_close(predicted(extractor, x), tuned)


def test_a_model_that_was_first_used_with_the_adapter_off_sees_it_on(rng):
    x, inner = batch(rng), tuned_encoder()
    tuned, outer = called(inner, x), keras.Model(inner.input, inner.output)
    with keras_srlora.adapter_disabled(inner):
        predicted(outer, x)
    assert_close(predicted(outer, x), tuned)


# KerasHub's `generate`, and tasks.


def language_model():
    hub = pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(7)
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=40,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=10,
        dropout=0.0,
    )
    # So that tokens differ from each other by more than rounding.
    rng = np.random.default_rng(1)
    for variable in backbone.trainable_variables:
        if len(variable.shape) > 1:
            change = 0.5 * rng.standard_normal(variable.shape)
            variable.assign_add(change.astype("float32"))
    task = hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    task.compile(sampler="greedy")
    return task


def generated(task):
    prompt = np.zeros((3, 10), "int32")
    prompt[:, 0] = [3, 17, 29]
    mask = np.zeros((3, 10), "int32")
    mask[:, :1] = 1
    inputs = {"token_ids": prompt, "padding_mask": mask}
    out = task.generate(inputs, stop_token_ids=None)
    return to_numpy(out["token_ids"])


def generated_anew(task):
    """What `generate` says after everything compiled was dropped."""
    task.generate_function = None
    return generated(task)


def nudged(model, **arguments):
    arguments = {"rank": 2, "target_rank": 6, "recipe": "paper", **arguments}
    with collected_warnings():
        layers = keras_srlora.enable_srlora(model, **arguments)
    nudge(layers, size=1.0)
    return layers


@pytest.mark.parametrize(
    "change, part",
    [
        ("enable", "task"),
        ("enable", "backbone"),
        ("load", "task"),
        ("merge", "task"),
        ("merge", "backbone"),
        ("unload", "task"),
        ("another_scale", "task"),
    ],
)
def test_generate_follows_a_change(change, part, tmp_path):
    task, path = language_model(), tmp_path / "a.safetensors"
    target = task if part == "task" else task.backbone
    if change == "load":
        other = language_model()
        nudged(other)
        keras_srlora.save_adapter(other, path)
    elif change == "another_scale":
        other = language_model()
        nudged(other, lora_alpha=8.0)
        keras_srlora.save_adapter(other, path)
        nudged(target, lora_alpha=1.0)
    elif change != "enable":
        nudged(target)
    generated(task)
    with collected_warnings():
        if change == "enable":
            nudged(target)
        elif change == "merge":
            keras_srlora.merge_srlora(target)
        elif change == "unload":
            keras_srlora.unload_srlora(target)
        else:
            keras_srlora.load_adapter(target, path)
    text = generated(task)
    np.testing.assert_array_equal(text, generated_anew(task))


@pytest.mark.parametrize("used", ["before_converting", "after_converting"])
def test_generate_follows_an_adapter_that_is_switched_off(used):
    task, other = language_model(), language_model()
    pretrained = generated(other)
    if used == "before_converting":
        generated(task)
    nudged(task)
    other = language_model()
    nudged(other)
    tuned = generated(other)
    assert not np.array_equal(tuned, pretrained)
    with keras_srlora.adapter_disabled(task):
        np.testing.assert_array_equal(generated(task), pretrained)
    np.testing.assert_array_equal(generated(task), tuned)


class Generates(keras.callbacks.Callback):
    """Texts of a model that is trained: by `generate`, and compiled anew."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def on_epoch_end(self, epoch, logs=None):
        with keras_srlora.adapter_disabled(self.model):
            generated(self.model)
        text = generated(self.model)
        self.texts.append((text, generated_anew(self.model)))


def test_generate_in_a_callback_follows_the_run_and_changes_it_not(rng):
    tokens = rng.integers(0, 40, (8, 10))
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    trained = []
    for callbacks in ([], [Generates()]):
        task = language_model()
        keras.utils.set_random_seed(5)
        with collected_warnings():
            keras_srlora.enable_srlora(task, 2, recipe="lora_restarts")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        task.compile(keras.optimizers.Adam(0.1), loss, sampler="greedy")
        callback = keras_srlora.RecompositionCallback(interval=2)
        with collected_warnings():
            task.fit(
                x,
                tokens,
                batch_size=2,
                epochs=3,
                shuffle=False,
                verbose=0,
                callbacks=[callback, *callbacks],
            )
        assert callback.events
        trained.append([to_numpy(v) for v in task.trainable_variables])
    texts = callbacks[0].texts
    for text, anew in texts:
        np.testing.assert_array_equal(text, anew)
    assert not np.array_equal(texts[0][0], texts[-1][0])
    assert_close(*trained)
    np.testing.assert_array_equal(generated(task), generated_anew(task))


def test_generate_follows_a_change_of_a_second_task_on_the_backbone():
    hub = pytest.importorskip("keras_hub")
    task = language_model()
    generated(task)
    second = hub.models.GPT2CausalLM(backbone=task.backbone, preprocessor=None)
    nudged(second)
    text = generated(task)
    np.testing.assert_array_equal(text, generated_anew(task))


@pytest.mark.parametrize("change", ["enable", "merge", "load"])
def test_a_task_predicts_anew_after_a_change_of_its_backbone(
    change, rng, tmp_path
):
    hub = pytest.importorskip("keras_hub")
    bert = tiny_bert(dropout=0.0)
    task = hub.models.BertTextClassifier(backbone=bert, num_classes=3)
    tokens = rng.integers(0, 50, (2, 6))
    x = {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones_like(tokens),
    }
    path = tmp_path / "a.safetensors"
    if change == "merge":
        nudged(bert)
    elif change == "load":
        other = tiny_bert(dropout=0.0)
        nudged(other)
        keras_srlora.save_adapter(other, path)
    task.predict(x, verbose=0)
    with collected_warnings():
        if change == "enable":
            nudged(bert)
        elif change == "merge":
            keras_srlora.merge_srlora(bert)
        else:
            keras_srlora.load_adapter(bert, path)
    assert_close(task.predict(x, verbose=0), called(task, x), 1e-4)
    assert np.isfinite(bert_outputs(bert)).all()


# What was compiled and is unchanged is kept: nobody waits for nothing.


@tensorflow_only
def test_a_model_that_holds_no_changed_layer_keeps_its_functions(rng):
    x, other, inner = batch(rng), encoder(), encoder()
    predicted(other, x)
    function = other.predict_function
    convert(inner)
    assert other.predict_function is function
