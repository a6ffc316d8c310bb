"""FLoRA: Tucker-decomposed updates for weights of any number of axes."""

from peft_subspace.tuner.model import SubspaceModel

from .config import FLoRAConfig
from .delta import FLoRADelta


class FLoRAModel(SubspaceModel, config=FLoRAConfig, update=FLoRADelta):
    """Model with FLoRA adapters."""


__all__ = ["FLoRAConfig", "FLoRADelta", "FLoRAModel"]
