"""Subspace fine-tuning for Hugging Face PEFT; importing the package registers its methods."""

from .core import config as _config
from .core.callbacks import GradientInitCallback
from .core.export import save_as_lora, to_lora
from .core.initialize import initialize_from_gradient
from .core.loading import load
from .effort import EffortConfig, EffortModel, RegularizationCallback, regularization_loss
from .flora import FLoRAConfig, FLoRAModel
from .lora_sb import LoRASBConfig, LoRASBModel
from .mos import MoSConfig, MoSModel

__version__ = _config.VERSION

__all__ = [
    "EffortConfig",
    "EffortModel",
    "FLoRAConfig",
    "FLoRAModel",
    "GradientInitCallback",
    "LoRASBConfig",
    "LoRASBModel",
    "MoSConfig",
    "MoSModel",
    "RegularizationCallback",
    "initialize_from_gradient",
    "load",
    "regularization_loss",
    "save_as_lora",
    "to_lora",
]
