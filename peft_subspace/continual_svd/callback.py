"""Tasks that follow each other within one training by a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_subspace.core.config import check_count

from .tasks import next_task


class NextTaskCallback(TrainerCallback):
    """Starts tasks when a Trainer has taken certain numbers of steps; 0 is before the first.

    Each task starts with a fresh optimiser and from the beginning of the schedule. When training resumes,
    tasks that the model has already are not started again.

    Args:
        starts: Name of the task to start, by the number of steps taken.
        options: As for `next_task`: `keep`, `preserve`, `new_heads`.

    Raises:
        TypeError: If a number of steps is none.
    """

    def __init__(self, starts: Mapping[int, str], **options: Any) -> None:
        for step in starts:
            check_count("starts", step, minimum=0)
        self.starts, self.options = dict(starts), options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the task of step 0, unless training resumes."""
        self._start(state.global_step, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the task of this step, if there is one."""
        self._start(state.global_step, **kwargs)

    def _start(
        self,
        step: int,
        model: nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        name = self.starts.get(step)
        if name is not None and model is not None and name not in getattr(model, "peft_config", ()):
            next_task(model, name, optimizer=optimizer, scheduler=lr_scheduler, **self.options)
