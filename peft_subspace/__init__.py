"""Subspace fine-tuning for Hugging Face PEFT; importing the package registers its methods."""

from .continual import (
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
from .initialization.callback import GradientInitCallback
from .initialization.from_gradient import initialize_from_gradient
from .methods.continual_svd import ContinualSVDConfig, ContinualSVDModel
from .methods.effort import EffortConfig, EffortModel
from .methods.flora import FLoRAConfig, FLoRAModel
from .methods.lora_sb import LoRASBConfig, LoRASBModel
from .methods.mos import MoSConfig, MoSModel
from .persistence.hub import push_to_hub
from .persistence.loading import load
from .persistence.lora_export import save_as_lora, to_lora
from .tools.estimate import Estimate, estimate
from .training.callback import RegularizationCallback
from .training.ddp import prepare_for_ddp
from .training.penalties import regularization_loss
from .tuner import config as _config

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
