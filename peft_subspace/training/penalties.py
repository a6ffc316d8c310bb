"""Loss terms of updates, and the ways by which their gradients reach the adapters, each step once.

In training they are added to the loss that an adapted model returns, wrapped by PEFT or not. For losses of
one's own there is `regularization_loss`, for those of a Trainer `RegularizationCallback`. Each gradient that
arrives leaves the version of the parameters in their updates, by which the callback knows that a step has had
its gradient, however it came.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft_subspace.core.delta import ReadWeight, Update
from peft_subspace.core.modes import is_transformed, lasting
from peft_subspace.runtime.engines import engine_of, gathered, whole
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.model import SubspaceModel


def regularization_loss(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """`Σ λ_i L_i` over an adapter's loss terms, each the mean over its layers, summed over adapters.

    For Effort it is `λ1 · L_orthogonality + λ2 · L_energy`. In training it is a part of the loss that the
    model returns; add it to a loss that you compute yourself.

    Args:
        model: Model with adapters, wrapped by PEFT or injected.
        adapter_name: Adapter to regularize; all active and trainable ones if `None`.

    Returns:
        Scalar in fp32; zero if no weight is above zero.

    Raises:
        ValueError: If the model has no such adapter with loss terms.
        RuntimeError: If its tensors are sharded.
    """
    groups = regularized_layers(model)
    if adapter_name is not None:
        groups = {adapter_name: _layers_of(model, adapter_name)}
    total = torch.zeros(())
    for name, layers in groups.items():
        weights = layers[0].deltas[name].penalty_weights
        weighted = sum(weights[key] * loss for key, loss in mean_losses(layers, name).items())
        if isinstance(weighted, Tensor):
            deltas = [layer.deltas[name] for layer in layers]
            if weighted.requires_grad:
                # On the loss, never on a parameter: parameters can be replaced and would lose it.
                weighted.register_hook(lambda gradient, deltas=deltas: mark(deltas))
            total = total.to(weighted.device) + weighted
    return total


def add_to_loss(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
    """Forward hook of an adapted model: in training, add the loss terms to the `loss` among its outputs.

    With `num_items_in_batch`, by which the loss is one part of an optimizer step's, so is their weight.
    """
    if not (module.training and torch.is_grad_enabled() and isinstance(outputs, MutableMapping)):
        return outputs
    loss = outputs.get("loss")
    if isinstance(loss, Tensor) and regularized_layers(module):
        penalty = regularization_loss(module) * share_of_step(module, kwargs)
        outputs["loss"] = loss + penalty.to(loss.device, loss.dtype)
    return outputs


def regularized_layers(model: nn.Module) -> dict[str, list[SubspaceLayer]]:
    """Layers, by adapter, of those adapters that are active, train, and have a loss term."""
    found: dict[str, list[SubspaceLayer]] = {}
    for layer in _layers(model):
        for name in [] if layer.disable_adapters else layer.active_here():
            delta = layer.deltas[name]
            trains = any(parameter.requires_grad for parameter in delta.trained.values())
            if trains and any(delta.penalty_weights.values()) and name not in layer.merged_adapters:
                found.setdefault(name, []).append(layer)
    return found


def mean_losses(layers: list[SubspaceLayer], adapter_name: str) -> dict[str, Tensor]:
    """Unweighted loss terms of one adapter, averaged over its layers; those alone that have a weight."""
    sums: dict[str, Tensor] = {}
    for layer in layers:
        for key, loss in _losses(layer, layer.deltas[adapter_name]).items():
            sums[key] = sums[key] + loss.to(sums[key].device) if key in sums else loss
    return {key: total / len(layers) for key, total in sums.items()}


def _losses(layer: SubspaceLayer, delta: Update) -> dict[str, Tensor]:
    """Unweighted loss terms of one update, in the precision of the adapter, whatever autocast says."""
    trained = delta.trained
    split = any(map(engine_of, trained.values()))
    held = [*trained.values(), *layer.get_base_layer().parameters(recurse=False)] if split else []
    device = next(iter(trained.values())).device.type
    with lasting(), torch.autocast(device, enabled=False), gathered(held):
        if not split:
            _check_whole(delta, trained)
            return delta.penalty(layer.read_weight)
        tensors = {f"delta.{name}": whole(tensor) for name, tensor in trained.items()}
        _check_whole(delta, dict(zip(trained, tensors.values(), strict=True)))
        return functional_call(_Penalty(delta), tensors, (lambda: whole(layer.read_weight()),))


class _Penalty(nn.Module):
    """The loss terms as a module's forward, in which other tensors can take the place of the parameters."""

    def __init__(self, delta: Update) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: ReadWeight) -> dict[str, Tensor]:
        """Return them."""
        return self.delta.penalty(weight)


def _check_whole(delta: Update, tensors: Mapping[str, Tensor]) -> None:
    """Raise if the parameters are not all here: FSDP1 leaves parts of them, or freed memory."""
    for name, tensor in tensors.items():
        freed = not is_transformed() and not tensor.is_meta and tensor.untyped_storage().size() == 0
        if tensor.shape != delta.trained_shapes[name] or freed:
            weights = " and ".join(f"{key}_weight" for key, value in delta.penalty_weights.items() if value)
            raise RuntimeError(
                f"{weights} need whole tensors, and FSDP1 has split these; set them to 0, or train with DDP, "
                "FSDP2 or DeepSpeed"
            )


def share_of_step(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | float:
    """Part of an optimizer step that a batch is: its items over `num_items_in_batch`, as Trainers count.

    A Trainer that hands `num_items_in_batch` to the model does not average over accumulated batches and
    processes, but sums; the parts of a step then sum to one. Without it, every batch counts in full.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    total = inputs.get("num_items_in_batch")
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    decoder_only = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if "shift_labels" not in inputs and shifts and decoder_only:
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / torch.as_tensor(total, device=labels.device).flatten()[0]


def mark(deltas: list[Update]) -> None:
    """Note that the gradient for the present parameters is there."""
    for delta in deltas:
        delta.original.penalized_at = version_of(delta)


def version_of(delta: Update) -> int:
    """Number of changes that the parameters of an update have seen."""
    return next(iter(delta.original.trained.values()))._version


def _regularize(tuner: SubspaceModel, adapter_name: str, layers: dict[str, Any]) -> None:
    """Let a model add the loss terms of a new adapter to its loss; a layer watches that they arrive."""
    if not any(tuner.peft_config[adapter_name].penalty_weights.values()):
        return
    for layer in list(layers.values())[:1]:
        layer.watch(adapter_name, _Watch())
    if add_to_loss not in tuner.model._forward_hooks.values():
        tuner.handles.append(tuner.model.register_forward_hook(add_to_loss, with_kwargs=True))


class _Watch:
    """Warns once if an adapter has taken a step without its loss terms."""

    def __init__(self) -> None:
        self.version: int | None = None

    def __call__(self, delta: Update, adapter_name: str) -> bool:
        self.version = version_of(delta) if self.version is None else self.version
        if self.version == version_of(delta):
            return True
        if delta.original.penalized_at is None:
            names = " and ".join(f"{name}_weight" for name in delta.penalty_weights)
            warnings.warn(
                f"adapter {adapter_name!r} has taken a step without its {names}: the loss that the model "
                "returns, if it does, was not used for it; add peft_subspace.RegularizationCallback() to the "
                "Trainer, or peft_subspace.regularization_loss(model) to the loss",
                stacklevel=5,
            )
        return False


def _layers(model: nn.Module) -> list[SubspaceLayer]:
    return [module for module in model.modules() if isinstance(module, SubspaceLayer)]


def _layers_of(model: nn.Module, adapter_name: str) -> list[SubspaceLayer]:
    layers = [layer for layer in _layers(model) if adapter_name in layer.deltas]
    if not any(layer.deltas[adapter_name].penalty_weights for layer in layers):
        raise ValueError(f"adapter_name={adapter_name!r} is no adapter of this model that has loss terms")
    return layers


SubspaceModel.after_injection.append(_regularize)
