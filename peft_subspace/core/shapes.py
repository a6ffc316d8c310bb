"""What a method is asked for on one weight: its shape, and the rank that the config gives it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class WeightShape:
    """Shape of a weight as the methods see it, whatever layout its layer stores.

    Attributes:
        out_features: Rows of `ΔW`.
        in_features: Columns of `ΔW`; for a convolution `in_channels / groups`.
        kernel_size: Further axes: the kernel of a convolution, the number of experts in a stack of matrices;
            `()` for a matrix.
        groups: Groups of a convolution.
        lookup_axis: Axis of `dims` of which an input selects one entry: 1 for an embedding, 2 for a stack of
            matrices.
    """

    out_features: int
    in_features: int
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    lookup_axis: int | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        """Axes `(out, in, *kernel)` of `ΔW`."""
        return (self.out_features, self.in_features, *self.kernel_size)

    @property
    def modes(self) -> tuple[int, ...]:
        """The same in the order `(in, out, *kernel)` of the literature on tensor decompositions."""
        return (self.in_features, self.out_features, *self.kernel_size)

    @property
    def columns(self) -> int:
        """Columns of `ΔW` seen as a matrix, the kernel folded into the input axis."""
        return self.in_features * prod(self.kernel_size)

    @property
    def full_rank(self) -> int:
        """Largest rank of `ΔW` seen as a matrix."""
        return min(self.out_features, self.columns)

    @property
    def random_std(self) -> float:
        """Root mean square of the entries of `ΔW` where `init_weights=False` draws it: `0.3 / √fan_in`.

        That is half of what torch's initialization gives a weight, as PEFT's LoRA has it.
        """
        fan_in = {None: self.columns, 1: self.out_features, 2: self.in_features}[self.lookup_axis]
        return 0.3 * fan_in**-0.5


@dataclass(frozen=True)
class ModuleSpec:
    """What a config asks for on one weight. A method that needs more than a rank adds fields in a subclass.

    Attributes:
        name: Name of the module, or of the parameter, in the base model.
        shape: Shape of its weight.
        rank: Rank of its update, as far as the weight can hold it; 0 where the method sets none.
        lowered: Whether the config asks for a higher rank.
    """

    name: str
    shape: WeightShape
    rank: int
    lowered: bool = False

    def unnamed(self) -> ModuleSpec:
        """The same for any module; updates of equal ones have equal shapes."""
        return replace(self, name="")
