"""Casts of a module that leave some of its tensors in fp32."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn


def apply_keeping_fp32(
    module: nn.Module,
    apply: Callable[[Callable[[Tensor], Tensor]], Any],
    fn: Callable[[Tensor], Tensor],
    kept: Collection[str],
) -> None:
    """Apply `fn` (a move, a cast, …) to a module's tensors, but take no buffer, nor what is kept, below fp32.

    Args:
        module: The module.
        apply: Its `_apply` of `nn.Module`, which knows all cases of how parameters are replaced.
        fn: Function of a tensor.
        kept: Names of parameters.
    """

    def move(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.dtype == tensor.dtype or result.dtype.itemsize >= 4 or tensor.is_meta:
            return result
        return tensor.to(result.device)

    parameters, buffers = vars(module)["_parameters"], vars(module)["_buffers"]
    fixed = {name: parameters[name] for name in parameters if name in kept}
    free = {name: parameters[name] for name in parameters if name not in fixed}
    try:
        module._parameters, module._buffers = fixed, buffers
        apply(move)
        module._parameters, module._buffers = free, {}
        apply(fn)
    finally:
        module._parameters = {name: {**fixed, **free}[name] for name in parameters}
        module._buffers = buffers
