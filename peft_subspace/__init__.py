"""Subspace fine-tuning for Hugging Face PEFT; importing the package registers its methods."""

from .continual_svd import (
    ContinualSVDConfig,
    ContinualSVDModel,
    NextTaskCallback,
    continual_metrics,
    layer_importance,
    list_tasks,
    next_task,
    preserve_pattern,
    preserve_schedule,
    save_heatmap,
    subspace_leak,
)
from .core import config as _config
from .core.callbacks import GradientInitCallback
from .core.estimate import Estimate, estimate
from .core.export import save_as_lora, to_lora
from .core.hub import push_to_hub
from .core.initialize import initialize_from_gradient
from .core.loading import load
from .core.processes import prepare_for_ddp
from .effort import EffortConfig, EffortModel, RegularizationCallback, regularization_loss
from .flora import FLoRAConfig, FLoRAModel
from .lora_sb import LoRASBConfig, LoRASBModel
from .mos import MoSConfig, MoSModel

__version__ = _config.VERSION

__all__ = [
    "ContinualSVDConfig",
    "ContinualSVDModel",
    "EffortConfig",
    "EffortModel",
    "Estimate",
    "FLoRAConfig",
    "FLoRAModel",
    "GradientInitCallback",
    "LoRASBConfig",
    "LoRASBModel",
    "MoSConfig",
    "MoSModel",
    "NextTaskCallback",
    "RegularizationCallback",
    "continual_metrics",
    "estimate",
    "initialize_from_gradient",
    "layer_importance",
    "list_tasks",
    "load",
    "next_task",
    "prepare_for_ddp",
    "preserve_pattern",
    "preserve_schedule",
    "push_to_hub",
    "regularization_loss",
    "save_as_lora",
    "save_heatmap",
    "subspace_leak",
    "to_lora",
]
