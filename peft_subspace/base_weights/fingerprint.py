"""Recognize a weight again, cheaply and on any machine: a few projections of it onto fixed waves."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_subspace.core.delta import FINGERPRINT

_WAVES = FINGERPRINT - 2  # beside the root mean square of the weight and the precision of its dtype
_PART = 2**17  # entries in double precision at a time: they stay in a cache, and no weight is copied whole
_SAME = 1e-4
"""Change, relative to the weight, below which two weights of one dtype are the same."""


def fingerprint(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Fingerprint of a weight, `(out, in, *kernel)`, that is stored in `dtype`.

    The projections `aᵀ W b / (‖a‖ ‖b‖)`, in double precision, have the size of an entry of `W`. A change of
    `W` by some part of its norm changes each of them by about the same part, wherever in `W` it lies.
    """
    matrix = weight.flatten(1)
    matrix = matrix.cpu() if matrix.device.type == "mps" else matrix
    left, right = (torch.from_numpy(_waves(size)).to(matrix.device) for size in matrix.shape)
    rows = 1 + _PART // (1 + matrix.shape[1])
    sums, squares = torch.zeros_like(right), right.new_zeros(())
    for waves, part in zip(left.split(rows, 1), matrix.split(rows), strict=True):
        part = part.double()
        sums += waves @ part
        squares += torch.linalg.vector_norm(part).square()
    precision = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    rest = torch.tensor([precision], dtype=torch.float64, device=matrix.device)
    root_mean_square = (squares / matrix.numel()).sqrt()
    return torch.cat([root_mean_square[None], (sums * right).sum(1), rest]).float()


def is_same(found: Tensor, expected: Tensor) -> bool:
    """Whether two fingerprints are those of one weight, give or take a conversion to another dtype."""
    (*numbers, eps), (*wanted, wanted_eps) = found.tolist(), expected.tolist()
    precision = max(eps, wanted_eps) if eps != wanted_eps else 0.0
    limit = (_SAME + 2 * precision) * max(wanted[0], torch.finfo(torch.float32).tiny)
    return all(abs(a - b) <= limit for a, b in zip(numbers, wanted, strict=True))


@lru_cache(maxsize=32)
def _waves(size: int) -> Any:
    """Unit vectors `(waves, size)` that have nothing to do with the structure of a weight."""
    frequencies = np.sqrt([2.0, 3.0, 5.0, 7.0][:_WAVES])[:, None]
    waves = np.cos(np.arange(1, size + 1) * frequencies + frequencies)
    return waves / np.linalg.norm(waves, axis=1, keepdims=True)
