"""What `enable_srlora` freezes: the pretrained part around the factors."""

import keras

from keras_srlora.backend import keras_private
from keras_srlora.backend.keras_private import inside


def freeze_base(model, targets, trained):
    """Freezes the pretrained part, all but the targets and some variables.

    `model.trainable = True` brings it back, but for what `convert_layers` moves
    out of its reach.
    """
    targets = {id(layer) for layer in targets}
    trained = {id(variable) for variable in trained}
    for part in _base_parts(model, targets):
        for layer in keras_private.flatten_layers(part):
            kept = any(id(v) in trained for v in layer.variables)
            if not kept and not inside(layer) & targets:
                layer.trainable = False
            elif id(layer) not in targets:
                # Weights of its own, beside those of the layers inside.
                for variable in keras_private.own_variables(layer):
                    variable.trainable = id(variable) in trained


def _base_parts(model, targets):
    base = getattr(model, "backbone", None)
    if isinstance(base, keras.Model):
        return [base]
    if _is_backbone(model):
        return [model]
    holding = [layer for layer in model.layers if inside(layer) & targets]
    if all(isinstance(layer, keras.Model) for layer in holding):
        return holding
    head = {id(layer) for layer in keras_private.output_layers(model)}
    if not head:
        # A subclassed model does not say which of its layers are its head.
        return holding
    return [layer for layer in model.layers if id(layer) not in head]


def _is_backbone(model):
    # By name, so that keras_hub need not be imported.
    return any(
        cls.__name__ == "Backbone" and cls.__module__.startswith("keras_hub")
        for cls in type(model).__mro__
    )
