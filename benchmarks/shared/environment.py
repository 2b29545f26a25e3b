"""What a figure was measured on."""

import importlib.metadata
import os
import platform

import keras

PACKAGES = (
    "keras",
    "keras-hub",
    "tensorflow",
    "jax",
    "torch",
    "peft",
    "transformers",
    "scikit-learn",
    "numpy",
)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def accelerator():
    """Name of the first GPU that the backend sees, or `None`."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        seen = torch.cuda.is_available()
        return torch.cuda.get_device_name() if seen else None
    if backend == "jax":
        import jax

        device = jax.devices()[0]
        return None if device.platform == "cpu" else device.device_kind
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        return None
    return tf.config.experimental.get_device_details(devices[0])["device_name"]


def describe():
    """Hardware, threads and versions, for JSON."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "accelerator": accelerator(),
        "threads": {k: os.environ[k] for k in THREADS if k in os.environ},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "backend": keras.backend.backend(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def processor():
    """Name of the processor; Python alone does not know it on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def version(name):
    """Version of a package, or `None` where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
