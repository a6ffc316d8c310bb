"""LoRA-SB: a small trained matrix between frozen bases taken from the first gradients."""

from peft_subspace.tuner.model import SubspaceModel

from .config import LoRASBConfig
from .delta import LoRASBDelta


class LoRASBModel(SubspaceModel, config=LoRASBConfig, update=LoRASBDelta):
    """Model with LoRA-SB adapters."""


__all__ = ["LoRASBConfig", "LoRASBDelta", "LoRASBModel"]
