"""Tasks that follow each other within one training by a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_subspace.continual.tasks import continue_task, next_task
from peft_subspace.core.validation import check_count
from peft_subspace.runtime import distributed as processes


class NextTaskCallback(TrainerCallback):
    """Starts tasks when a Trainer has taken certain numbers of steps; 0 is before the first.

    Each task starts with a fresh optimizer and from the beginning of the schedule. When training resumes,
    give the Trainer the model that it was given at first: tasks that the checkpoint has are not started
    again, and the last of them goes on. That needs `keep="stack"`; with `"merge"` the checkpoint of a later
    task fits the base model with the earlier ones in it only, which a Trainer does not save.

    Args:
        starts: Name of the task to start, by the number of steps taken.
        options: As for `next_task`: `keep`, `preserve`, `energy`, `new_heads`; `statistics` as a function of
            the model that gathers them.

    Raises:
        TypeError: If a number of steps is none.
        RuntimeError: When a task is to start, if several processes train.
    """

    def __init__(self, starts: Mapping[int, str], **options: Any) -> None:
        for step in starts:
            check_count("starts", step, minimum=0)
        self.starts, self.options = dict(starts), options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the task of step 0; when training resumes, go on with the task of the checkpoint.

        Raises:
            ValueError: If the checkpoint has no such task.
        """
        begun = max((step for step in self.starts if step <= state.global_step), default=None)
        if begun is not None and state.global_step > 0:
            self._go_on(begun, state.global_step, **kwargs)
        self._start(state.global_step, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the task of this step, if there is one."""
        self._start(state.global_step, **kwargs)

    def _go_on(
        self, begun: int, step: int, model: nn.Module | None = None, optimizer: Any = None, **_: Any
    ) -> None:
        name = self.starts[begun]
        if model is None or name in getattr(model, "active_adapters", ()):
            return
        if name in getattr(model, "peft_config", ()):
            _check_alone(name)
            continue_task(model, name, optimizer)
        elif begun < step:
            raise ValueError(
                f"training resumes at step {step}, when task {name!r} had begun, but the checkpoint has no "
                "such task; resume from one that was saved with this callback"
            )

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
            _check_alone(name)
            options = dict(self.options)
            if callable(options.get("statistics")):
                options["statistics"] = options["statistics"](model)
            next_task(model, name, optimizer=optimizer, scheduler=lr_scheduler, **options)


def _check_alone(name: str) -> None:
    """Raise in several processes: by now DDP, or an engine, has noted the parameters that it looks after."""
    if processes.world_size() > 1:
        raise RuntimeError(
            f"task {name!r} cannot start within a training of {processes.world_size()} processes, which "
            "would not share the gradients of its parameters; train each task by a Trainer of its own, and "
            "call next_task in between"
        )
