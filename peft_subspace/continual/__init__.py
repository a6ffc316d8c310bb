"""Sequences of tasks: close one, keep it, and start the next outside what is known by then."""

from __future__ import annotations

from pathlib import Path

from peft_subspace.continual.callback import NextTaskCallback
from peft_subspace.continual.current import reopen
from peft_subspace.continual.directions import protect
from peft_subspace.continual.importance import layer_importance, preserve_pattern, preserve_schedule
from peft_subspace.continual.leak import subspace_leak
from peft_subspace.continual.listing import list_tasks
from peft_subspace.continual.metrics import continual_metrics, save_heatmap
from peft_subspace.continual.presets import preset
from peft_subspace.continual.tasks import next_task

METRIC = str(Path(__file__).parent / "evaluate_metric" / "continual_learning.py")
"""File of the metric, for `evaluate.load`."""

__all__ = [
    "METRIC",
    "NextTaskCallback",
    "continual_metrics",
    "layer_importance",
    "list_tasks",
    "next_task",
    "preserve_pattern",
    "preserve_schedule",
    "preset",
    "protect",
    "reopen",
    "save_heatmap",
    "subspace_leak",
]
