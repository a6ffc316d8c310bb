"""Subspace fine-tuning for Hugging Face PEFT; importing the package registers its methods."""

from .core import config as _config
from .core.export import save_as_lora, to_lora
from .core.loading import load
from .flora import FLoRAConfig, FLoRAModel
from .mos import MoSConfig, MoSModel

__version__ = _config.VERSION

__all__ = ["FLoRAConfig", "FLoRAModel", "MoSConfig", "MoSModel", "load", "save_as_lora", "to_lora"]
