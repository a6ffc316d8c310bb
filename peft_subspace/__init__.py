"""Subspace fine-tuning for Hugging Face PEFT; importing the package registers its methods.

Configs and models are imported with the package, because PEFT has to know them. All other names are imported
when they are first asked for.
"""

import warnings
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .methods import edit as _edit  # noqa: F401 - registers what holds edits
from .methods.composition import CompositionConfig, CompositionModel
from .methods.continual_svd import ContinualSVDConfig, ContinualSVDModel
from .methods.effort import EffortConfig, EffortModel
from .methods.flora import FLoRAConfig, FLoRAModel
from .methods.lora_sb import LoRASBConfig, LoRASBModel
from .methods.mos import MoSConfig, MoSModel
from .persistence import card as _card  # noqa: F401 - completes the card of every config that is saved
from .persistence import training_files as _files  # noqa: F401 - writes what resuming needs to checkpoints
from .training import penalties as _penalties  # noqa: F401 - adds the loss terms of every adapter
from .training import reach as _reach  # noqa: F401 - warns of adapters that take no part in training
from .tuner import combination as _combination
from .tuner import config as _config

if TYPE_CHECKING:
    from . import continual, edits, merging, statistics
    from .continual.callback import NextTaskCallback
    from .heads import EquiangularHead, GrassmannHead
    from .initialization.callback import GradientInitCallback
    from .initialization.from_gradient import initialize_from_gradient
    from .methods.composition.compose import compose, entropy_loss
    from .methods.composition.learn import learn_masks
    from .persistence.exchange import frozen_digest, load_trainable_state_dict, trainable_state_dict
    from .persistence.hub import push_to_hub
    from .persistence.loading import load
    from .persistence.lora_export import export_lora, lora_state_dict
    from .persistence.shared_bases import save_with_shared_bases
    from .tools.estimate import Estimate, estimate
    from .tools.report import inspect
    from .training.callback import RegularizationCallback
    from .training.ddp import prepare_for_ddp
    from .training.penalties import regularization_loss
    from .tuner.heads import grow_head

__version__ = _config.VERSION
_combination.PROVIDERS.append(f"{__name__}.merging.combinations")

__all__ = [
    "CompositionConfig",
    "CompositionModel",
    "ContinualSVDConfig",
    "ContinualSVDModel",
    "EffortConfig",
    "EffortModel",
    "EquiangularHead",
    "Estimate",
    "FLoRAConfig",
    "FLoRAModel",
    "GradientInitCallback",
    "GrassmannHead",
    "LoRASBConfig",
    "LoRASBModel",
    "MoSConfig",
    "MoSModel",
    "NextTaskCallback",
    "RegularizationCallback",
    "compose",
    "continual",
    "edits",
    "entropy_loss",
    "estimate",
    "export_lora",
    "frozen_digest",
    "grow_head",
    "initialize_from_gradient",
    "inspect",
    "learn_masks",
    "load",
    "load_trainable_state_dict",
    "lora_state_dict",
    "merging",
    "prepare_for_ddp",
    "push_to_hub",
    "regularization_loss",
    "save_with_shared_bases",
    "statistics",
    "trainable_state_dict",
]

_MODULES = {
    "EquiangularHead": "heads",
    "Estimate": "tools.estimate",
    "GradientInitCallback": "initialization.callback",
    "GrassmannHead": "heads",
    "NextTaskCallback": "continual.callback",
    "RegularizationCallback": "training.callback",
    "compose": "methods.composition.compose",
    "entropy_loss": "methods.composition.compose",
    "estimate": "tools.estimate",
    "export_lora": "persistence.lora_export",
    "frozen_digest": "persistence.exchange",
    "grow_head": "tuner.heads",
    "initialize_from_gradient": "initialization.from_gradient",
    "inspect": "tools.report",
    "learn_masks": "methods.composition.learn",
    "load": "persistence.loading",
    "load_trainable_state_dict": "persistence.exchange",
    "lora_state_dict": "persistence.lora_export",
    "prepare_for_ddp": "training.ddp",
    "push_to_hub": "persistence.hub",
    "regularization_loss": "training.penalties",
    "save_with_shared_bases": "persistence.shared_bases",
    "trainable_state_dict": "persistence.exchange",
}
"""Modules of the names that are imported late."""

_FORMER = {
    "continual_metrics": "continual.continual_metrics",
    "layer_importance": "continual.layer_importance",
    "list_tasks": "continual.list_tasks",
    "next_task": "continual.next_task",
    "preserve_pattern": "continual.preserve_pattern",
    "preserve_schedule": "continual.preserve_schedule",
    "save_heatmap": "continual.save_heatmap",
    "subspace_leak": "continual.subspace_leak",
    "to_lora": "lora_state_dict",
}
"""Names of version 0.1 that are elsewhere now: scripts written for it run, and are told where."""


def __getattr__(name: str) -> Any:
    if name in ("continual", "edits", "merging", "statistics"):
        return import_module(f".{name}", __name__)
    if name in _FORMER:
        place = f"{__name__}.{_FORMER[name]}"
        warnings.warn(f"{__name__}.{name} is {place} now", DeprecationWarning, stacklevel=2)
        return attrgetter(_FORMER[name])(import_module(__name__))
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
