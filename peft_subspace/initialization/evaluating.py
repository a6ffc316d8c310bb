"""Evaluation of a model without one of its adapters, after which the model is as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from peft_subspace.base_weights.repacking import undo_repacking
from peft_subspace.base_weights.weight import offload_hook
from peft_subspace.tuner.layer import SubspaceLayer


def device_of(model: nn.Module) -> torch.device:
    """Device on which a model works; the parameters of an offloaded one are on meta between two calls."""
    hooks = (offload_hook(module) for module in model.modules())
    working = next((torch.device(hook.execution_device) for hook in hooks if hook is not None), None)
    return working or next(model.parameters()).device


@contextmanager
def evaluating(
    model: nn.Module, layers: Sequence[SubspaceLayer], adapter_name: str, *, adapted: bool = False
) -> Iterator[None]:
    """Context manager in which a model is in evaluation mode, without one adapter and with nothing to train.

    Modes, flags, active adapters and global random generators are restored at the end.

    Args:
        model: The model.
        layers: Layers in which the adapter is switched off.
        adapter_name: The adapter.
        adapted: Whether the adapter is active all the same.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = [(layer, layer._active_adapter) for layer in layers]
    try:
        for module, training in modes:
            # Gradient checkpointing works in training mode only, which its module alone may keep.
            module.training = training and getattr(module, "gradient_checkpointing", False) is True
            if hasattr(module, "support_avx512bf16_for_cpu"):  # in evaluation mode it would repack its weight
                undo_repacking(module)
                module.training = True
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for layer in layers:
            others = [name for name in layer.active_adapters if name != adapter_name]
            others = others if adapter_name in layer.active_adapters else []
            layer._active_adapter = [*others, adapter_name] if adapted else others
        with restored_generators():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for layer, names in active:
            layer._active_adapter = names


@contextmanager
def restored_generators() -> Iterator[None]:
    """Context manager that restores the global random generators of torch, numpy and Python."""
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    accelerator = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if accelerator:
            torch.cuda.set_rng_state_all(accelerator)
