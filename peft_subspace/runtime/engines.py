"""Tensors that a training engine has taken over: those of DeepSpeed's ZeRO, and of FSDP.

An engine leaves a part of a parameter, or nothing, where the parameter was, and its optimizer may update a
copy in fp32 that later overwrites the parameter. So a plain `copy_` fails, or is lost without a word. What
is read from or written into parameters when there may be an engine goes through `read_whole`, `whole` and
`write`; what they cannot do is refused by one of the checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_subspace.runtime.distributed import total, world_size


def engine_of(tensor: Tensor) -> str | None:
    """Name of the engine that has taken over a tensor; None for a tensor that is all here and only here."""
    if hasattr(tensor, "ds_id"):
        return "DeepSpeed's ZeRO-3"
    if hasattr(tensor, "_hp_mapping"):
        return "DeepSpeed's ZeRO"
    if hasattr(tensor, "device_mesh"):
        return "FSDP2 (or tensor parallelism)"
    return "FSDP1" if hasattr(tensor, "_fsdp_flattened") else None


def check_no_engine(tensors: Iterable[Tensor], action: str) -> None:
    """Raise if an engine has taken over one of the tensors.

    Args:
        tensors: The tensors.
        action: What cannot be done then, for the error.

    Raises:
        RuntimeError: Naming the engine.
    """
    for engine in filter(None, map(engine_of, tensors)):
        raise RuntimeError(
            f"{engine} knows the parameters that it was made with only, so {action} must come before: do it "
            "on the model that is not yet prepared or wrapped"
        )


def check_writable(tensors: Iterable[Tensor], action: str) -> None:
    """Raise if values that `write` puts into one of the tensors would be lost.

    Raises:
        RuntimeError: Naming the engine.
    """
    check_no_engine((tensor for tensor in tensors if engine_of(tensor) == "FSDP1"), action)


def check_whole(tensor: Tensor, action: str) -> None:
    """Raise if an engine has left no whole tensor, nor one that stands for it.

    Raises:
        RuntimeError: Naming the engine.
    """
    if hasattr(tensor, "ds_id") or engine_of(tensor) == "FSDP1":
        raise RuntimeError(
            f"{action} needs whole weights, of which {engine_of(tensor)} leaves parts; save the adapter, and "
            "load it in one process"
        )


def check_gradients_count(tensors: Iterable[Tensor], action: str, remedy: str) -> None:
    """Raise if gradients that come after the backward pass would be lost: DeepSpeed steps within it.

    Raises:
        RuntimeError: Saying what to do.
    """
    if any(hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping") for tensor in tensors):
        raise RuntimeError(
            f"DeepSpeed takes its step within the backward pass, so {action} is lost; {remedy}"
        )


@contextmanager
def gathered(tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Context manager in which tensors that ZeRO-3 has split are whole; all processes must enter it.

    Args:
        tensors: The tensors; others stay as they are.
        write: Whether what process 0 writes into them is kept.
    """
    # While the model runs, some are whole, and the engine lets nobody else split them again.
    split: list[Any] = [t for t in tensors if hasattr(t, "ds_id") and (write or not t.numel())]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


@torch.no_grad()
def read_whole(tensor: Any) -> Tensor:
    """Copy of a tensor, whole; all processes must call it."""
    if hasattr(tensor, "device_mesh"):
        return tensor.full_tensor()
    with gathered([tensor]):
        return tensor.detach().clone()


def whole(tensor: Any) -> Tensor:
    """The tensor itself if it is all here, or all of it, from which gradients reach the parts.

    They are averaged over the processes, as the engine does. All processes must call it, within `gathered`.
    """
    if hasattr(tensor, "device_mesh"):
        return _Gathered.apply(tensor) if tensor.requires_grad else tensor.full_tensor()
    return tensor.clone() if hasattr(tensor, "ds_id") else tensor


class _Gathered(torch.autograd.Function):
    """A tensor that FSDP2 has split, whole; its gradient is averaged over the processes, as FSDP2 does it."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.layout = (tensor.device_mesh, tensor.placements)
        return tensor.full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(total(gradient.contiguous().clone()) / world_size(), *ctx.layout)


@torch.no_grad()
def write(tensor: Any, value: Tensor) -> None:
    """Copy whole values into a tensor, in place, and into what an engine keeps of it, in all processes.

    Args:
        tensor: Parameter or buffer.
        value: Values, the same in all processes.

    Raises:
        RuntimeError: If they would be lost.
    """
    check_writable([tensor], "writing into an adapter")
    if hasattr(tensor, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    with gathered([tensor], write=True):
        tensor.copy_(value)
    if hasattr(tensor, "_z3_optimizer"):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(tensor, _own_part(tensor, value.float()))
    elif hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(tensor, value.float())


def _own_part(tensor: Any, value: Tensor) -> Tensor:
    """The part of some values that ZeRO-3 keeps in this process; the last one is padded."""
    size, group = tensor.ds_tensor.numel(), tensor.ds_process_group
    padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size(group) - value.numel()))
    return padded.narrow(0, size * dist.get_rank(group), size)
