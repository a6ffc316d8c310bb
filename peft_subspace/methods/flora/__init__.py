"""FLoRA: Tucker-decomposed updates for weights of any number of axes."""

from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.model import SubspaceModel
from peft_subspace.tuner.parameter_layer import ParameterLayer
from peft_subspace.tuner.registry import register

from .config import FLoRAConfig
from .delta import FLoRADelta


class FLoRALayer(SubspaceLayer):
    """Layer with FLoRA adapters."""

    prefix = "flora_"
    delta_cls = FLoRADelta


class FLoRALinear(FLoRALayer):
    """Linear layer with FLoRA adapters."""


class ParamWrapper(ParameterLayer, FLoRALayer):
    """FLoRA adapters on one parameter of a module; PEFT knows such wrappers by this name."""


class FLoRAModel(SubspaceModel):
    """Model with FLoRA adapters."""

    prefix = "flora_"
    tuner_layer_cls = FLoRALayer
    linear_layer_cls = FLoRALinear
    parameter_layer_cls = ParamWrapper


register("FLORA", FLoRAConfig, FLoRAModel)

__all__ = ["FLoRAConfig", "FLoRADelta", "FLoRALayer", "FLoRAModel"]
