"""Frozen tensors of adapters in data-parallel training."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_subspace.core.delta import Delta
from peft_subspace.runtime.distributed import world_size


def prepare_for_ddp(model: nn.Module) -> None:
    """Send the frozen tensors of adapters to all processes once, and keep DDP from sending them every step.

    `DistributedDataParallel` takes all buffers from process 0 in each forward pass, and what a method freezes
    are buffers: hundreds of megabytes in a large model, all of them the same everywhere. Call this in every
    process, before the very same `model` is wrapped but when it is on its device and `torch.distributed` is
    initialized: with a Trainer after making it, as `prepare_for_ddp(trainer.model)`; with accelerate after
    `Accelerator()` and before `prepare`. In one process it does nothing, as without it only time is lost.

    Args:
        model: Model with adapters, wrapped by PEFT or injected; buffers of the base model stay as they are.
    """
    if world_size() == 1:
        return
    frozen = {
        f"{name}.{key}": buffer
        for name, module in model.named_modules()
        if isinstance(module, Delta)
        for key, buffer in module.named_buffers(recurse=False)
    }
    for buffer in frozen.values():
        dist.broadcast(buffer, 0)
    known = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, {*known, *frozen})
