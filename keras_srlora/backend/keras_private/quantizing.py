"""A check before Keras quantizes a layer or a model."""

import functools

import keras


def ask_before_quantizing(check):
    """Lets `check(layer)` raise before Keras quantizes a layer or a model.

    `Model.quantize` quantizes one layer after the other and has no hook: where
    one of them refuses, those before it are quantized already, and a model of
    Keras's own class has no override that could refuse first. So this replaces
    the check that every layer and model makes at the beginning. Private:
    `Layer._check_quantize_args`.
    """
    of_keras = keras.Layer._check_quantize_args

    @functools.wraps(of_keras)
    def check_quantize_args(self, *args, **kwargs):
        check(self)
        return of_keras(self, *args, **kwargs)

    keras.Layer._check_quantize_args = check_quantize_args


def set_dtype_policy(layer, policy):
    """Sets the policy of a layer whose class overrides the setter."""
    keras.Layer.dtype_policy.fset(layer, policy)
