"""Recognize a weight again, cheaply and on any machine: a few projections of it onto fixed waves."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_subspace.core.delta import FINGERPRINT

_WAVES = FINGERPRINT - 2  # beside the root mean square of the weight and the precision of its dtype


_SAME = 1e-4
"""Change, relative to the weight, below which two weights of one dtype are the same."""


def fingerprint(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Fingerprint of a weight, `(out, in, *kernel)`, that is stored in `dtype`.

    The projections `aᵀ W b / (‖a‖ ‖b‖)`, in double precision, have the size of an entry of `W`. A change of
    `W` by some part of its norm changes each of them by about the same part, wherever in `W` it lies.
    """
    matrix = weight.flatten(1)
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
    left, right = (_waves(size).to(matrix.device) for size in matrix.shape)
    projections = ((matrix @ right) * left).sum(0)
    precision = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    rest = torch.tensor([precision], dtype=torch.float64, device=matrix.device)
    return torch.cat([matrix.square().mean().sqrt()[None], projections, rest]).float()


def is_same(found: Tensor, expected: Tensor) -> bool:
    """Whether two fingerprints are those of one weight, give or take a conversion to another dtype."""
    found, expected = found.double().cpu(), expected.double().cpu()
    precision = max(found[-1].item(), expected[-1].item()) if found[-1] != expected[-1] else 0.0
    limit = (_SAME + 2 * precision) * expected[0].clamp_min(torch.finfo(torch.float32).tiny)
    return bool(((found - expected)[:-1].abs() <= limit).all())


def _waves(size: int) -> Tensor:
    """Unit vectors `(size, waves)` that have nothing to do with the structure of a weight."""
    positions = torch.arange(1, size + 1, dtype=torch.float64)[:, None]
    frequencies = torch.tensor([2.0, 3.0, 5.0, 7.0][:_WAVES], dtype=torch.float64).sqrt()
    waves = torch.cos(positions * frequencies + frequencies)
    return waves / waves.norm(dim=0)
