"""The processes that train together; a single one if `torch.distributed` is not initialized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def total(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def raise_in_all_processes(device: torch.device, action: str) -> Iterator[None]:
    """Context manager that raises in all processes if the block raises in one, so that none waits in vain.

    The block itself must not wait for other processes.

    Args:
        device: Device on which the processes exchange tensors.
        action: Description of the block in the error.

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
        raise RuntimeError(
            f"{action} failed in {failed} of {world_size()} processes; their own errors say why"
        )
