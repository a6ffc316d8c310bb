"""Trainer callback that brings the gradients of loss terms which no loss has brought."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_subspace.runtime.engines import check_gradients_count
from peft_subspace.training.penalties import (
    mark,
    mean_losses,
    regularization_loss,
    regularized_layers,
    version_of,
)


class RegularizationCallback(TrainerCallback):
    """Gives an adapter the gradients of its loss terms, where no loss has given them in a step.

    For Trainers that compute their own loss (`compute_loss_func`, label smoothing), and for models that
    return none. The gradients are added once per optimizer step, after clipping, so that they depend neither
    on accumulated batches nor on the number of processes; with loss scaling, what is there is unscaled
    before. Where the loss of the model has brought them, they are not added again.

    It also puts `orthogonality_loss` and `energy_loss`, unweighted, into the Trainer's logs.
    """

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the gradients of those adapters that have had none for their present parameters.

        Raises:
            RuntimeError: If they come too late for the engine that trains.
        """
        for name, layers in regularized_layers(model).items() if model is not None else ():
            deltas = [layer.deltas[name] for layer in layers]
            if any(delta.penalized_at == version_of(delta) for delta in deltas):
                continue
            parameters = [p for delta in deltas for p in delta.parameters()]
            check_gradients_count(
                parameters,
                f"what RegularizationCallback adds for adapter {name!r}",
                "add peft_subspace.regularization_loss(model) to the loss instead",
            )
            _unscale(optimizer)
            loss = regularization_loss(model, name)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None and parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad.add_(gradient)
            mark(deltas)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begin a new step, also where loss scaling has skipped one and the parameters are the same."""
        for name, layers in regularized_layers(model).items() if model is not None else ():
            for layer in layers:
                if layer.deltas[name].penalized_at is not None:
                    layer.deltas[name].penalized_at = -1

    @torch.no_grad()
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the unweighted losses to what is logged with the training loss."""
        if model is None or logs is None or "loss" not in logs:
            return
        groups = regularized_layers(model)
        for name, layers in groups.items():
            for key, loss in mean_losses(layers, name).items():
                label = f"{key}_loss" if len(groups) == 1 else f"{key}_loss_{name}"
                logs[label] = loss.item()
                if state.log_history:
                    state.log_history[-1][label] = loss.item()


def _unscale(optimizer: Any) -> None:
    """Divide gradients by the scale of mixed precision, unless clipping has done so."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return
    try:
        scaler.unscale_(optimizer.optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise
