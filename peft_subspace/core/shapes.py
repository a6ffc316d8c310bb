"""Shapes of weights as the methods see them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class WeightShape:
    """Shape of a weight as the methods see it, whatever layout its layer stores.

    Attributes:
        out_features: Rows of `ΔW`.
        in_features: Columns of `ΔW`; of a convolution `in_channels / groups`.
        kernel_size: Further axes: the kernel of a convolution, the number of experts in a stack of matrices;
            `()` for a matrix.
        groups: Groups of a convolution.
        picked: Axis of `dims` of which an input picks one entry: 1 of an embedding, 2 of a stack of matrices.
    """

    out_features: int
    in_features: int
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    picked: int | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        """Axes `(out, in, *kernel)` of `ΔW`."""
        return (self.out_features, self.in_features, *self.kernel_size)

    @property
    def columns(self) -> int:
        """Columns of `ΔW` seen as a matrix, the kernel folded into the input axis."""
        return self.in_features * prod(self.kernel_size)
