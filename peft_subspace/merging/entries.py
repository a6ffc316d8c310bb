"""Methods that are functions of entries, in weight space or in aligned coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_subspace.core.validation import check_number, invalid
from peft_subspace.merging.methods import Entries, Merged, register
from peft_subspace.merging.stack import Stack

ELECTIONS = ("total", "frequency")
"""How a sign is elected: by the weighted sum, or by the number of entries."""


@register("ties")
def ties(
    stack: Stack, weights: Tensor, generators: Any, *, density: float = 0.2, elect: str = "total"
) -> Merged:
    """Trim to the largest entries, elect a sign, average what agrees (Yadav et al., arXiv 2306.01708).

    `γ = sign Σ w_t τ_t`, or `sign Σ sign(w_t τ_t)` for `elect="frequency"`, and the result is the mean, by
    weights, of the trimmed entries of sign `γ`.
    """
    _check_elect(elect)

    def merge(rows: Tensor, limits: Sequence[Any]) -> Tensor:
        return _agreeing_mean(_trimmed(rows, limits), weights, elect)

    return Entries(_threshold(density), merge)


@register("magnitude")
def magnitude(stack: Stack, weights: Tensor, generators: Any, *, density: float = 0.2) -> Merged:
    """`Σ w_t τ_t` of the largest entries of each source."""
    return Entries(_threshold(density), lambda rows, limits: _sum(weights, _trimmed(rows, limits)))


@register("breadcrumbs")
def breadcrumbs(
    stack: Stack, weights: Tensor, generators: Any, *, density: float = 0.9, outliers: float = 0.01
) -> Merged:
    """`Σ w_t τ_t` without the part `outliers` of largest entries, and without the smallest (2312.06795)."""
    check_number("outliers", outliers, minimum=0.0, maximum=1.0)
    lower, upper = _threshold(min(1.0, density + outliers)), _threshold(outliers) if outliers else None

    def limits(entries: Tensor) -> tuple[float, float]:
        return lower(entries), float("inf") if upper is None else upper(entries)

    def merge(rows: Tensor, bounds: Sequence[tuple[float, float]]) -> Tensor:
        size = rows.abs()
        low, high = (torch.tensor(b, dtype=rows.dtype)[:, None, None] for b in zip(*bounds, strict=True))
        return _sum(weights, rows * ((size >= low) & (size < high)))

    return Entries(limits, merge)


@register("dare")
def dare(stack: Stack, weights: Tensor, generators: Any, *, density: float = 0.5) -> Merged:
    """`Σ w_t τ_t` of entries kept with probability `density`, divided by it (Yu et al., arXiv 2311.03099)."""
    _check_density(density)
    return Entries(None, lambda rows, limits: _sum(weights, _dropped(rows, generators, density)))


@register("dare_ties")
def dare_ties(
    stack: Stack, weights: Tensor, generators: Any, *, density: float = 0.5, elect: str = "total"
) -> Merged:
    """TIES of entries that DARE has dropped in place of trimming."""
    _check_density(density)
    _check_elect(elect)
    return Entries(None, lambda rows, _: _agreeing_mean(_dropped(rows, generators, density), weights, elect))


@register("della")
def della(
    stack: Stack, weights: Tensor, generators: Any, *, density: float = 0.5, spread: float = 0.15
) -> Merged:
    """TIES of entries kept by chance, the larger in their row the likelier (Deep et al., 2406.11617).

    It goes linearly from `density − spread` for the smallest to `density + spread` for the largest.
    """
    _check_density(density)
    if not 0 <= spread <= min(density, 1 - density):
        raise invalid("spread", spread, f"must be from 0 to {min(density, 1 - density):g} at this density")

    def merge(rows: Tensor, limits: Sequence[Any]) -> Tensor:
        places = rows.abs().argsort(dim=2).argsort(dim=2)
        chance = density + spread * (2 * places / max(rows.shape[2] - 1, 1) - 1)
        return _agreeing_mean(_dropped(rows, generators, chance.to(rows.dtype)), weights)

    return Entries(None, merge)


@register("consensus")
def consensus(
    stack: Stack, weights: Tensor, generators: Any, *, threshold: float = 0.4, votes: int = 2
) -> Merged:
    """`Σ w_t τ_t` at entries that matter to `votes` sources or more (Wang et al., arXiv 2405.07813).

    An entry matters to a source if `|τ_t| > threshold · |Σ_s w_s τ_s − w_t τ_t|`.
    """

    def merge(rows: Tensor, limits: Sequence[Any]) -> Tensor:
        scaled = rows * weights.to(rows)[:, None, None]
        total = scaled.sum(0)
        matters = scaled.abs() > threshold * (total - scaled).abs()
        return total * (matters.sum(0) >= votes)

    return Entries(None, merge)


@register("emr")
def emr(stack: Stack, weights: Tensor, generators: Any) -> Merged:
    """The elected sign times the largest entry that agrees with it (Huang et al., 2405.17461), unmasked."""

    def merge(rows: Tensor, limits: Sequence[Any]) -> Tensor:
        scaled = rows * weights.to(rows)[:, None, None]
        sign = scaled.sum(0).sign()
        return sign * (scaled * (scaled.sign() == sign)).abs().amax(0)

    return Entries(None, merge)


def _check_density(density: Any) -> None:
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise invalid("density", density, "must be above 0 and at most 1, the part of entries that stays")


def _check_elect(elect: Any) -> None:
    if elect not in ELECTIONS:
        raise invalid("elect", elect, "must be 'total', by the sum, or 'frequency', by the number of entries")


def _threshold(density: float) -> Callable[[Tensor], float]:
    """Size of the smallest entry among the part `density` of largest ones."""
    _check_density(density)

    def limit(entries: Tensor) -> float:
        flat = entries.abs().flatten()
        kept = int(density * len(flat) + 1e-9)
        if not kept:
            raise invalid("density", density, f"keeps nothing of {len(flat)} entries; raise it")
        return float(flat.kthvalue(len(flat) - kept + 1).values)

    return limit


def _trimmed(rows: Tensor, limits: Sequence[float]) -> Tensor:
    return rows * (rows.abs() >= torch.tensor(limits, dtype=rows.dtype)[:, None, None])


def _dropped(rows: Tensor, generators: Sequence[torch.Generator], chance: float | Tensor) -> Tensor:
    drawn = torch.stack([torch.rand(rows.shape[1:], generator=g, dtype=torch.float64) for g in generators])
    return torch.where(drawn < chance, rows / chance, torch.zeros_like(rows))


def _sum(weights: Tensor, rows: Tensor) -> Tensor:
    return (weights.to(rows)[:, None, None] * rows).sum(0)


def _agreeing_mean(rows: Tensor, weights: Tensor, elect: str = "total") -> Tensor:
    """Mean, by weights, of the entries whose sign is that of the weighted sum; zeros do not count."""
    scaled = weights.to(rows)[:, None, None]
    voting = (scaled * rows).sign() if elect == "frequency" else scaled * rows
    sign = voting.sum(0).sign()
    agrees = ((scaled * rows).sign() == sign) & (rows != 0)
    share = (scaled.abs() * agrees).sum(0)
    return (scaled * rows * agrees).sum(0) / share.clamp(min=torch.finfo(rows.dtype).tiny)
