"""States of a model's random generators, so that dropout resumes too.

Keras saves no state of a seed generator, and on torch its dropout draws from
torch's own generators.
"""

import keras
import numpy as np
from keras import ops

from keras_srlora.backend.keras_private.nesting import seed_states


class RandomState:
    """The generators that a model draws from in training."""

    def __init__(self, model):
        self.seeds = seed_states(model)

    def to_arrays(self):
        """Their states, as `{name: array}`."""
        seeds = [ops.convert_to_numpy(seed) for seed in self.seeds]
        arrays = {"random_seeds": np.array(seeds, "int64").reshape(-1, 2)}
        if keras.backend.backend() == "torch":
            import torch

            arrays["random_torch"] = torch.get_rng_state().numpy()
            if torch.cuda.is_initialized():
                states = torch.cuda.get_rng_state_all()
                arrays["random_cuda"] = np.stack([s.numpy() for s in states])
        return arrays

    def restore(self, arrays):
        """Sets the states of `to_arrays`, where they fit."""
        seeds = arrays.get("random_seeds", ())
        # Those of a model with other dropout layers do not.
        if len(seeds) == len(self.seeds):
            for variable, value in zip(self.seeds, seeds):
                variable.assign(value)
        if keras.backend.backend() == "torch":
            import torch

            if "random_torch" in arrays:
                torch.set_rng_state(torch.from_numpy(arrays["random_torch"]))
            for device, state in enumerate(arrays.get("random_cuda", ())):
                if device < torch.cuda.device_count():
                    torch.cuda.set_rng_state(torch.from_numpy(state), device)
