"""The regularisers of Effort, and the ways by which their gradients reach the adapter, each step once.

In training they are added to the loss that an adapted model returns, wrapped by PEFT or not. For losses of
one's own there is `regularization_loss`, for those of a Trainer `RegularizationCallback`. Each gradient that
arrives leaves the version of the parameters in their deltas, by which the callback knows that a step has had
its gradient, however it came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from peft_subspace.methods.effort.delta import EffortDelta

if TYPE_CHECKING:
    from peft_subspace.methods.effort.model import EffortLayer


def regularization_loss(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """`λ1 · L_orthogonality + λ2 · L_energy`, each the mean over an adapter's layers, summed over adapters.

    In training it is a part of the loss that the model returns; add it to a loss that you compute yourself.

    Args:
        model: Model with Effort adapters, wrapped by PEFT or injected.
        adapter_name: Adapter to regularise; all active and trainable ones if `None`.

    Returns:
        Scalar in fp32; zero if no weight is above zero.

    Raises:
        ValueError: If the model has no such Effort adapter.
        RuntimeError: If its tensors are sharded.
    """
    groups = regularized_layers(model)
    if adapter_name is not None:
        groups = {adapter_name: _layers_of(model, adapter_name)}
    total = torch.zeros(())
    for name, layers in groups.items():
        config = _weights(layers[0].deltas[name])
        losses = mean_losses(layers, name)
        weighted = sum(config[key] * loss for key, loss in losses.items())
        if isinstance(weighted, Tensor):
            deltas = [layer.deltas[name] for layer in layers]
            if weighted.requires_grad:
                # On the loss, never on a parameter: parameters can be replaced and would lose it.
                weighted.register_hook(lambda gradient, deltas=deltas: _mark(deltas))
            total = total.to(weighted.device) + weighted
    return total


def add_to_loss(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
    """Forward hook of an adapted model: in training, add the regularisers to the `loss` among its outputs.

    With `num_items_in_batch`, by which the loss is one part of an optimiser step's, so is their weight.
    """
    if not (module.training and torch.is_grad_enabled() and isinstance(outputs, MutableMapping)):
        return outputs
    loss = outputs.get("loss")
    if isinstance(loss, Tensor) and regularized_layers(module):
        penalty = regularization_loss(module) * share_of_step(module, kwargs)
        outputs["loss"] = loss + penalty.to(loss.device, loss.dtype)
    return outputs


def regularized_layers(model: nn.Module) -> dict[str, list[EffortLayer]]:
    """Layers, by adapter, of those adapters that are active, train, and have a regulariser."""
    found: dict[str, list[EffortLayer]] = {}
    for layer in _effort_layers(model):
        if layer.disable_adapters:
            continue
        for name in layer.active_adapters:
            if name in layer.deltas and name not in layer.merged_adapters:
                delta = layer.deltas[name]
                if delta.U_change.requires_grad and any(_weights(delta).values()):
                    found.setdefault(name, []).append(layer)
    return found


def mean_losses(layers: list[EffortLayer], adapter_name: str) -> dict[str, Tensor]:
    """Unweighted regularisers of one adapter, averaged over its layers; those alone that have a weight."""
    sums: dict[str, Tensor] = {}
    for layer in layers:
        for key, loss in _losses(layer, layer.deltas[adapter_name]).items():
            sums[key] = sums[key] + loss.to(sums[key].device) if key in sums else loss
    return {key: total / len(layers) for key, total in sums.items()}


def share_of_step(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | float:
    """Part of an optimiser step that a batch is: its items over `num_items_in_batch`, as Trainers count.

    A Trainer that hands `num_items_in_batch` to the model does not average over accumulated batches and
    processes, but sums; the parts of a step then sum to one. Without it, every batch counts in full.
    """
    total = inputs.get("num_items_in_batch")
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    decoder_only = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if "shift_labels" not in inputs and shifts and decoder_only:
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / torch.as_tensor(total, device=labels.device).flatten()[0]


class RegularizationCallback(TrainerCallback):
    """Gives an Effort adapter the gradients of its regularisers, where no loss has given them in a step.

    For Trainers that compute their own loss (`compute_loss_func`, label smoothing), and for models that
    return none. The gradients are added once per optimiser step, after clipping, so that they depend neither
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
        """Add the gradients of those adapters that have had none for their present parameters."""
        for name, layers in regularized_layers(model).items() if model is not None else ():
            deltas = [layer.deltas[name] for layer in layers]
            if any(delta.penalized_at == delta.U_change._version for delta in deltas):
                continue
            _unscale(optimizer)
            parameters = [p for delta in deltas for p in delta.parameters()]
            loss = regularization_loss(model, name)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None and parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad.add_(gradient)
            _mark(deltas)

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


def _losses(layer: EffortLayer, delta: EffortDelta) -> dict[str, Tensor]:
    """Unweighted regularisers of one layer, in the precision of the adapter whatever autocast says."""
    if delta.U_change.shape != delta.U0.shape or hasattr(delta.U_change, "device_mesh"):
        raise RuntimeError(
            "orthogonality_weight and energy_weight need whole tensors, and these are sharded; set both to 0 "
            "or train with DDP"
        )

    def weight() -> Tensor:
        with torch.no_grad():
            return layer.ops.to_layout(layer.get_base_weight().detach()).flatten(1)

    weights = _weights(delta)
    with torch.autocast(delta.U0.device.type, enabled=False):
        losses = {}
        if weights["orthogonality"]:
            losses["orthogonality"] = delta.orthogonality_loss(weight)
        if weights["energy"]:
            losses["energy"] = delta.energy_loss(weight())
    return losses


def _weights(delta: EffortDelta) -> dict[str, float]:
    return {"orthogonality": delta.orthogonality_weight, "energy": delta.energy_weight}


def _effort_layers(model: nn.Module) -> Iterable[EffortLayer]:
    return (m for m in model.modules() if isinstance(getattr(m, "effort_delta", None), nn.ModuleDict))


def _layers_of(model: nn.Module, adapter_name: str) -> list[EffortLayer]:
    layers = [layer for layer in _effort_layers(model) if adapter_name in layer.deltas]
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r} is no Effort adapter of this model")
    return layers


def _mark(deltas: list[EffortDelta]) -> None:
    """Note that the gradient for the present parameters is there."""
    for delta in deltas:
        delta.penalized_at = delta.U_change._version


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
