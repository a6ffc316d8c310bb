"""What runs a function: Python, or a transform or tracer that some of its shortcuts do not go through."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether `vmap`, `grad`, `jvp` or forward-mode differentiation run, which know no autograd functions."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0
