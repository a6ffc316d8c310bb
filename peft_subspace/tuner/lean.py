"""Adapters without what only further training needs: in files, and in models that only run them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.base_weights.weight import offload_hook
from peft_subspace.core.delta import Update
from peft_subspace.core.names import in_base, saved_key


def check_trainable(update: Update, adapter_name: str, *, training: bool) -> None:
    """Raise if an update has trainable parameters that cannot be trained.

    Raises:
        RuntimeError: If it is offloaded, or in a training step is lean, or awaits something.
    """
    if offload_hook(update) is not None:
        why, remedy = "is offloaded with its base layer", "give the layer a device in device_map, or load"
        remedy += " with is_trainable=False"
    elif update.lean and training:
        why = "was loaded, or closed, to be run only"
        remedy = "load it with is_trainable=True, or freeze it with model.set_requires_grad(name, False)"
    elif update.awaits is not None and training:
        why, remedy = update.awaits
    else:
        return
    if any(parameter.requires_grad for parameter in update.parameters()):
        raise RuntimeError(f"adapter {adapter_name!r} {why}, so it cannot be trained; {remedy}")


def layers_by_key(model: nn.Module, layer_cls: Any, adapter_name: str) -> dict[tuple[str, str], Any]:
    """Layers that have an adapter, by the prefix of their keys in the model, and by that in a file.

    The prefix that FSDP puts before names is left out.
    """
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, layer_cls) and adapter_name in layer.deltas:
            start = f"{name.replace('_fsdp_wrapped_module.', '')}.{layer_cls.prefix}delta."
            layers[f"{start}{adapter_name}.", saved_key(in_base(start))] = layer
    return layers


def by_start(starts: Iterable[str], state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the prefixes of their keys, each of which ends with a point, and by the rest of these."""
    found: dict[str, dict[str, Tensor]] = {start: {} for start in starts}
    for key, tensor in state.items():
        path = key.rpartition(".")[0]
        while path and f"{path}." not in found:
            path = path.rpartition(".")[0]
        if path:
            found[f"{path}."][key.removeprefix(f"{path}.")] = tensor
    return found


def training_updates(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Those updates whose file is not enough to train them."""
    return {start: update for start, update in updates.items() if update.training_only and not update.lean}


def frozen_tensors(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Frozen tensors that adapters of one start have in common, by key."""
    return {
        f"{start}{name}": tensor
        for start, update in updates.items()
        for name, tensor in update.named_buffers()
        if name not in ("fingerprint", *update.training_only)
    }


@torch.no_grad()
def inference_state(
    model: nn.Module, layer_cls: Any, adapter_name: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of an adapter, by key in the model, that make the same updates without those for training."""
    kept = dict(state)
    layers = {start: layer for (start, _), layer in layers_by_key(model, layer_cls, adapter_name).items()}
    for start, own in by_start(layers, state).items():
        update = layers[start].deltas[adapter_name]
        if update.training_only and own:
            device = next(iter(own.values())).device.type
            with torch.autocast("cpu" if device == "meta" else device, enabled=False):
                lean = update.inference_state(own)
            kept = {key: tensor for key, tensor in kept.items() if not key.startswith(start)}
            kept |= {f"{start}{name}": tensor for name, tensor in lean.items()}
    return kept


def without_frozen(
    model: nn.Module, layer_cls: Any, adapter_name: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of an adapter, by key in the model, without those that adapters of one start have in common."""
    layers = layers_by_key(model, layer_cls, adapter_name)
    frozen = frozen_tensors({start: layer.deltas[adapter_name] for (start, _), layer in layers.items()})
    return {key: tensor for key, tensor in state.items() if key not in frozen}
