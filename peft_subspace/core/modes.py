"""Modes in which torch runs Python: inference mode, transforms; and what does not go through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

# PyTorch before 2.7 does not tell exports from what else is compiled, which is as right, and slower.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that last, also under inference mode, in which those made can never be trained with."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # without the second, gradients would be recorded
        yield


def must_be_plain() -> bool:
    """Whether no autograd function may run (transforms do not know them), and no choice by size (exports)."""
    return _is_exporting() or is_transformed()


def is_transformed() -> bool:
    """Whether `vmap`, `grad`, `jvp` or forward-mode differentiation run, which know no autograd functions."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0
