"""SRLoRA for Keras 3: low-rank adaptation in a moving subspace.

Source: "SRLoRA: Subspace Recomposition in Low-Rank Adaptation via
Importance-Based Fusion and Reinitialization", arXiv 2505.12433.
"""

from keras_srlora._layers import initialize_factors
from keras_srlora._recipes import Recipe
from keras_srlora.adapter import adapter_disabled
from keras_srlora.adapter import load_adapter
from keras_srlora.adapter import save_adapter
from keras_srlora.callback import RecompositionCallback
from keras_srlora.convert import enable_srlora
from keras_srlora.convert import load_plain_weights
from keras_srlora.convert import merge_srlora
from keras_srlora.dense import SRLoRADense
from keras_srlora.einsum_dense import SRLoRAEinsumDense
from keras_srlora.export import export_lora
from keras_srlora.export import export_peft
from keras_srlora.optimizer import SensitivityOptimizer
from keras_srlora.parameters import print_trainable_parameters
from keras_srlora.recomposition import Recomposition
from keras_srlora.recomposition import recompose
from keras_srlora.sensitivity import Sensitivity

__version__ = "0.1.0"

__all__ = [
    "Recipe",
    "Recomposition",
    "RecompositionCallback",
    "SRLoRADense",
    "SRLoRAEinsumDense",
    "Sensitivity",
    "SensitivityOptimizer",
    "adapter_disabled",
    "enable_srlora",
    "export_lora",
    "export_peft",
    "initialize_factors",
    "load_adapter",
    "load_plain_weights",
    "merge_srlora",
    "print_trainable_parameters",
    "recompose",
    "save_adapter",
]
