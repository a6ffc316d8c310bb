"""The processes that train together; one, where `torch.distributed` is not initialised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .delta import Delta


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if count() > 1 else 0


def total(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def failing_together(device: torch.device, action: str) -> Iterator[None]:
    """Raise in all processes if the block raises in one, so that none waits for it in vain.

    The block itself must not wait for other processes.

    Args:
        device: Device on which the processes exchange tensors.
        action: What the block does, for the error.

    Raises:
        RuntimeError: If the block failed in another process.
    """
    try:
        yield
    except BaseException:
        total(torch.ones((), device=device))
        raise
    failed = int(total(torch.zeros((), device=device)))
    if failed:
        raise RuntimeError(f"{action} failed in {failed} of {count()} processes; their own errors say why")


def prepare_for_ddp(model: nn.Module) -> None:
    """Send the frozen tensors of adapters to all processes once, and keep DDP from sending them every step.

    `DistributedDataParallel` takes all buffers from process 0 in each forward pass, and what a method freezes
    are buffers: hundreds of megabytes in a large model, all of them the same everywhere. Call this in every
    process, before the very same `model` is wrapped but when it is on its device and `torch.distributed` is
    initialised: with a Trainer after making it, as `prepare_for_ddp(trainer.model)`; with accelerate after
    `Accelerator()` and before `prepare`. In one process it does nothing, as without it only time is lost.

    Args:
        model: Model with adapters, wrapped by PEFT or injected; buffers of the base model stay as they are.
    """
    if count() == 1:
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
