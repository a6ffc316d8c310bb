"""Methods of merging: coefficients of sources, new factors, or a function of entries.

`weights` are those of the sources, `(T,)`; `generators` are one for each source, so that what is drawn
depends on the seed, the module and the source alone. A user adds a method by `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_subspace.core.validation import invalid
from peft_subspace.merging.stack import Stack, singular


@dataclass
class Coefficients:
    """The merged update is `Σ c_t τ_t`: an exact sum of rank `R`.

    Attributes:
        values: One for each source, or one for each of the `R` components.
    """

    values: Tensor


@dataclass
class Factors:
    """The merged update is `L R`."""

    left: Tensor
    right: Tensor


@dataclass
class Entries:
    """The merged update is a function of entries at the same place.

    Attributes:
        limits: Function of all entries of one source, `(…)`, such as a threshold; None if none is needed.
        merge: Function of the sources' rows `(T, a, b)` and their limits, which returns `(a, b)`.
    """

    limits: Callable[[Tensor], Any] | None
    merge: Callable[[Tensor, Sequence[Any]], Tensor]


Merged = Coefficients | Factors | Entries
Method = Callable[..., Merged]

METHODS: dict[str, Method] = {}
"""Methods by name."""


def register(name: str) -> Callable[[Method], Method]:
    """Decorator that adds a method: a function of a `Stack`, `weights`, `generators` and its options.

    Raises:
        ValueError: If the name is taken.
    """
    if name in METHODS:
        raise ValueError(f"method={name!r} exists already; choose another name")

    def add(method: Method) -> Method:
        METHODS[name] = method
        return method

    return add


@register("task_arithmetic")
def task_arithmetic(stack: Stack, weights: Tensor, generators: Any) -> Merged:
    """`Σ w_t τ_t` (Ilharco et al., arXiv 2212.04089)."""
    return Coefficients(weights)


@register("average")
def average(stack: Stack, weights: Tensor, generators: Any) -> Merged:
    """`Σ w_t τ_t / Σ w_t`."""
    return Coefficients(weights / weights.sum())


@register("slerp")
def slerp(stack: Stack, weights: Tensor, generators: Any) -> Merged:
    """Point on the arc from `τ_1` to `τ_2` at the share of `w_2`, lengths included."""
    if len(stack) != 2:
        raise invalid("method", "slerp", f"takes two sources, and there are {len(stack)}")
    share = float(weights[1] / weights.sum())
    gram = stack.gram().double()
    cosine = gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:  # all but parallel
        return Coefficients(torch.tensor([1 - share, share]))
    parts = torch.stack([((1 - share) * angle).sin(), (share * angle).sin()]) / angle.sin()
    return Coefficients(parts)


@register("svd")
def svd(stack: Stack, weights: Tensor, generators: Any, *, keep: int = 16) -> Merged:
    """The best approximation of `Σ w_t τ_t` of rank `keep`."""
    left, values, right = singular(stack.left(), stack.right(weights))
    return Factors(left[:, :keep] * values[:keep], right[:keep])


@register("tsv_m")
def tsv_m(stack: Stack, weights: Tensor, generators: Any) -> Merged:
    """`U_⊥ diag(w_t σ_t) V_⊥ᵀ`: the leading triples of each source, made orthogonal to those of the others.

    Each source keeps `⌊min(m, n) / T⌋` triples at most; the stacked singular vectors are replaced by their
    polar factors (Gargiulo et al., arXiv 2412.00081).
    """
    most = max(1, min(stack.shape) // len(stack))
    triples = [singular(*pair) for pair in zip(stack.lefts, stack.rights, strict=True)]
    U = torch.cat([left[:, :most] for left, _, _ in triples], dim=1)  # noqa: N806
    V = torch.cat([right[:most] for _, _, right in triples])  # noqa: N806
    values = torch.cat([w * s[:most] for w, (_, s, _) in zip(weights, triples, strict=True)])
    return Factors(_polar(U) * values, _polar(V.T).T)


@register("iso_c")
def iso_c(stack: Stack, weights: Tensor, generators: Any) -> Merged:
    """`mean(σ) · U Vᵀ` of `Σ w_t τ_t`: the directions of its support alike (Marczak et al., 2502.04959)."""
    left, values, right = singular(stack.left(), stack.right(weights))
    return Factors(left * values.mean() if len(values) else left, right)


@register("regmean")
def regmean(stack: Stack, weights: Tensor, generators: Any, *, grams: Sequence[Tensor]) -> Merged:
    """`(Σ w_t τ_t G_t)(Σ w_t G_t)⁻¹` with `G_t = X_tᵀ X_t (n, n)` of the module's inputs in each task.

    It is the least-squares solution for the outputs of all tasks (Jin et al., arXiv 2212.09849), of rank `R`.
    """
    if len(grams) != len(stack):
        raise invalid("grams", len(grams), f"must be one matrix for each of the {len(stack)} sources")
    total = sum(w * gram.double() for w, gram in zip(weights, grams, strict=True))
    parts = zip(weights, stack.rights, grams, strict=True)
    rows = torch.cat([w * right.double() @ gram.double() for w, right, gram in parts])
    right = torch.linalg.lstsq(total.T, rows.T).solution.T
    return Factors(stack.left(), right.to(stack.lefts[0].dtype))


def _polar(matrix: Tensor) -> Tensor:
    """Nearest matrix with orthonormal columns (or rows), on the support of the given one."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)  # noqa: N806
    kept = 1e-5 * S.max() < S
    return (U[:, kept] @ Vh[kept]).to(matrix.dtype)
