"""Trainer callback that initializes an adapter from gradients before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_subspace.initialization.from_gradient import initialize_from_gradient, is_initialized
from peft_subspace.initialization.loss import LossFunction


class GradientInitCallback(TrainerCallback):
    """Initializes an adapter from gradients when a Trainer begins, on the Trainer's own batches.

    It does nothing if training resumes, or if the adapter was loaded or initialized from gradients before.
    Training sees the same batches, in the same order, as without the callback.

    Args:
        adapter_name: Adapter to initialize.
        num_batches: Batches to read; by default those of one optimizer step, and at least 8.
        loss_fn: Function of model and batch that returns the loss, such as `trainer.compute_loss`; by default
            the loss that the model returns.
        learning_rate: `η`; by default the first learning rate of the schedule that is not zero, which suits
            a schedule with warm-up. Without warm-up, give the rate of full fine-tuning, about 1e-4 or less.
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
        learning_rate: float | None = None,
        max_memory: int | str | None = None,
        offload: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        self.adapter_name, self.learning_rate, self.num_batches = adapter_name, learning_rate, num_batches
        self.options: dict[str, Any] = {
            "loss_fn": loss_fn, "max_memory": max_memory, "offload": offload, "cache": cache,
        }  # fmt: skip

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Iterable[Any] = (),
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Initialize the adapter, unless training resumes or the adapter has been initialized."""
        if model is None or state.global_step > 0 or is_initialized(model, self.adapter_name):
            return
        initialize_from_gradient(
            model,
            train_dataloader,
            adapter_name=self.adapter_name,
            learning_rate=self.learning_rate or first_learning_rate(lr_scheduler, args.learning_rate),
            num_batches=self.num_batches or max(8, args.gradient_accumulation_steps),
            progress=not args.disable_tqdm,
            **self.options,
        )


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
