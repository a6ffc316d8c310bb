"""Merged updates cut to a rank, with the error of that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peft_subspace.core.linalg import truncated_svd
from peft_subspace.core.validation import check_count, check_number, invalid
from peft_subspace.merging.stack import singular


@dataclass
class ModuleReport:
    """What became of one module.

    Attributes:
        rank: Rank of the merged update as it is written.
        norm: Frobenius norm of the merged update.
        error: Relative error of cutting it to that rank; 0 where nothing is cut.
        cosines: Cosines between the sources, `(T, T)`; NaN for updates of zero.
    """

    rank: int
    norm: float
    error: float
    cosines: Tensor


def check_cut(rank: int | None, energy: float | None) -> None:
    """Raise unless a rank, a part of the energy, or neither is given."""
    if rank is not None:
        check_count("rank", rank)
    if energy is not None:
        check_number("energy", energy, minimum=0.0, maximum=1.0)
    if rank is not None and energy is not None:
        raise invalid("energy", energy, f"cannot be given beside rank={rank}; choose one")


def cut(
    merged: tuple[Tensor, Tensor] | Tensor, rank: int | None, energy: float | None, method: str
) -> tuple[Tensor, Tensor, float, float]:
    """Factors cut to a rank or a part of the energy, the relative error of that, and the norm before."""
    if isinstance(merged, Tensor):
        if rank is None and energy is None:
            raise invalid(
                "rank", None, f"is needed, for {method!r} gives entries of full rank; or set energy"
            )
        norm = float(merged.double().norm())
        count = min(rank or min(merged.shape), *merged.shape)
        left, values, right = truncated_svd(merged, count, exact=energy is not None)
    else:
        left, right = merged
        if rank is None and energy is None:
            inner = (left.double().T @ left.double()) * (right.double() @ right.double().T)
            return left, right, 0.0, float(inner.sum().clamp(min=0).sqrt())
        left, values, right = singular(left, right)
        norm = float(values.double().norm())
    squares = values.double().square().cumsum(0)
    count = len(values) if rank is None else min(rank, len(values))
    if energy is not None:
        count = int((squares < energy * norm**2).sum()) + 1
    count = max(1, min(count, len(values))) if len(values) else 0
    kept = float(squares[count - 1]) if count else 0.0
    error = max(0.0, 1 - kept / norm**2) ** 0.5 if norm else 0.0
    if not count:
        return left.new_zeros(len(left), 1), right.new_zeros(1, right.shape[1]), 0.0, 0.0
    return left[:, :count] * values[:count], right[:count], error, norm
