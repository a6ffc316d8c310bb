"""Trainer callback that initializes an adapter from gradients before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_subspace.initialization.evaluating import device_of
from peft_subspace.initialization.from_gradient import initialize_from_gradient, is_initialized
from peft_subspace.initialization.loss import LossFunction
from peft_subspace.initialization.trainer_batches import TrainerBatches
from peft_subspace.tuner.callers import calls


class GradientInitCallback(TrainerCallback):
    """Initializes an adapter from gradients when a Trainer begins, on the Trainer's own batches.

    It does nothing if training resumes, or if the adapter was loaded or initialized from gradients before.
    Training sees the same batches, in the same order, as without the callback.

    Args:
        adapter_name: Adapter to initialize.
        num_batches: Batches to read; by default those of as many optimizer steps as have 8 batches.
        loss_fn: Function of model and batch that returns the mean loss of the batch's samples; by default the
            Trainer's own loss, with its weights of labels and accumulated batches.
        learning_rate: `η`; by default the one that lowers the loss of these batches most. `"schedule"` takes
            the first learning rate of the schedule that is not zero.
        max_memory: As for `initialize_from_gradient`.
        offload: As for `initialize_from_gradient`.
        cache: As for `initialize_from_gradient`.
    """

    def __init__(
        self,
        *,
        adapter_name: str = "default",
        num_batches: int | None = None,
        loss_fn: LossFunction | None = None,
        learning_rate: float | Literal["auto", "schedule"] = "auto",
        max_memory: int | str | None = None,
        offload: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        self.adapter_name, self.learning_rate, self.num_batches = adapter_name, learning_rate, num_batches
        self.loss_fn = loss_fn
        self.options: dict[str, Any] = {"max_memory": max_memory, "offload": offload, "cache": cache}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = (),
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Initialize the adapter, unless training resumes or the adapter has been initialized."""
        if model is None or state.global_step > 0 or is_initialized(model, self.adapter_name):
            return
        steps = -(-8 // args.gradient_accumulation_steps)
        count = self.num_batches or steps * args.gradient_accumulation_steps
        rate = self.learning_rate
        if rate == "schedule":
            rate = first_learning_rate(lr_scheduler, args.learning_rate)
        batches: Any = train_dataloader
        loss_fn = self.loss_fn
        trainer = calling_trainer()
        if loss_fn is None and trainer is not None:
            batches = TrainerBatches(trainer, train_dataloader, count, device_of(model))
            loss_fn = batches.loss
        initialize_from_gradient(
            model,
            batches,
            adapter_name=self.adapter_name,
            learning_rate=rate,
            num_batches=count,
            loss_fn=loss_fn,
            progress=not args.disable_tqdm,
            **self.options,
        )


def calling_trainer() -> Trainer | None:
    """The Trainer that is calling a callback, which it does not tell who it is."""
    callers = (frame.f_locals.get("self") for frame in calls())
    return next((caller for caller in callers if isinstance(caller, Trainer)), None)


def first_learning_rate(scheduler: Any, default: float, steps: int = 10_000) -> float:
    """First learning rate above zero that a scheduler will set, because a warm-up begins with zero."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    functions = getattr(scheduler, "lr_lambdas", None)
    if functions is None:
        return max(getattr(scheduler, "_last_lr", None) or [0.0]) or default
    for step in range(steps):
        rate = max(rate * f(step) for rate, f in zip(scheduler.base_lrs, functions, strict=True))
        if rate > 0:
            return rate
    return default
