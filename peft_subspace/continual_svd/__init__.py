"""Continual SVD: task after task, outside the directions in which the model already knows something."""

from __future__ import annotations

from pathlib import Path

from peft_subspace.core.registry import register

from .callback import NextTaskCallback
from .config import ContinualSVDConfig
from .delta import ContinualSVDDelta
from .importance import layer_importance, preserve_pattern
from .leak import subspace_leak
from .metrics import continual_metrics, save_heatmap
from .model import ContinualSVDLayer, ContinualSVDModel
from .tasks import list_tasks, next_task, preserve_schedule

METRIC = str(Path(__file__).parent / "continual_learning")
"""Folder of the metric, for `evaluate.load`."""

register("CONTINUALSVD", ContinualSVDConfig, ContinualSVDModel)

__all__ = [
    "METRIC",
    "ContinualSVDConfig",
    "ContinualSVDDelta",
    "ContinualSVDLayer",
    "ContinualSVDModel",
    "NextTaskCallback",
    "continual_metrics",
    "layer_importance",
    "list_tasks",
    "next_task",
    "preserve_pattern",
    "preserve_schedule",
    "save_heatmap",
    "subspace_leak",
]
