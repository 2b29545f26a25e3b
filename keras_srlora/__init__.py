"""SRLoRA for Keras 3: low-rank adaptation in a moving subspace.

Source: "SRLoRA: Subspace Recomposition in Low-Rank Adaptation via
Importance-Based Fusion and Reinitialization", arXiv 2505.12433.
"""

from keras_srlora.adapters.disabled import adapter_disabled
from keras_srlora.adapters.export import export_lora
from keras_srlora.adapters.export import export_peft
from keras_srlora.adapters.named import add_adapter
from keras_srlora.adapters.named import combine_adapters
from keras_srlora.adapters.named import delete_adapter
from keras_srlora.adapters.named import list_adapters
from keras_srlora.adapters.named import set_adapter
from keras_srlora.adapters.save_load import load_adapter
from keras_srlora.adapters.save_load import save_adapter
from keras_srlora.conversion.enable import enable_srlora
from keras_srlora.conversion.merge import merge_srlora
from keras_srlora.conversion.parameters import print_trainable_parameters
from keras_srlora.conversion.plain_weights import load_plain_weights
from keras_srlora.conversion.unload import unload_srlora
from keras_srlora.layers.dense import SRLoRADense
from keras_srlora.layers.einsum_dense import SRLoRAEinsumDense
from keras_srlora.layers.embedding import SRLoRAEmbedding
from keras_srlora.layers.find import initialize_factors
from keras_srlora.recipes.definition import Recipe
from keras_srlora.training.callback import RecompositionCallback
from keras_srlora.training.optimizer import SensitivityOptimizer
from keras_srlora.training.recomposer import Recomposer
from keras_srlora.training.recomposition import Recomposition
from keras_srlora.training.recomposition import recompose
from keras_srlora.training.sensitivity import Sensitivity
from keras_srlora.training.slots import register_optimizer_slots
from keras_srlora.version import __version__

__all__ = [
    "Recipe",
    "Recomposer",
    "Recomposition",
    "RecompositionCallback",
    "SRLoRADense",
    "SRLoRAEinsumDense",
    "SRLoRAEmbedding",
    "Sensitivity",
    "SensitivityOptimizer",
    "__version__",
    "adapter_disabled",
    "add_adapter",
    "combine_adapters",
    "delete_adapter",
    "enable_srlora",
    "export_lora",
    "export_peft",
    "initialize_factors",
    "list_adapters",
    "load_adapter",
    "load_plain_weights",
    "merge_srlora",
    "print_trainable_parameters",
    "recompose",
    "register_optimizer_slots",
    "save_adapter",
    "set_adapter",
    "unload_srlora",
]
