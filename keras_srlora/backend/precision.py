"""Products in the precision of their numbers."""

import contextlib

import keras


@contextlib.contextmanager
def full_precision():
    """Multiplies matrices of float32 in float32, on GPUs and TPUs too.

    By default JAX and TensorFlow let a GPU round the factors to TF32, which has
    10 bits. That is enough for a step of training, not for a kernel that must
    stay the same when a pair is fused into it.

    It is used as a decorator, too.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        with jax.default_matmul_precision("float32"):
            yield
    elif backend == "tensorflow":
        from tensorflow import config

        before = config.experimental.tensor_float_32_execution_enabled()
        config.experimental.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            config.experimental.enable_tensor_float_32_execution(before)
    elif backend == "torch":
        with _full_precision_in_torch():
            yield
    else:
        yield


@contextlib.contextmanager
def _full_precision_in_torch():
    """PyTorch rounds only where the user allows it, in one of two ways."""
    import torch

    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The user has set `fp32_precision`, which this function cannot read.
        matmul = torch.backends.cuda.matmul
        chosen = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = chosen
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
