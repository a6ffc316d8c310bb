"""Size and spectrum of an adapter's updates, and the overlap of two adapters, from their factors alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_subspace.core.chain import split
from peft_subspace.runtime.progress import progress
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer

_NEGLIGIBLE = 1e-6
"""Part of the largest singular value below which a direction does not count as one of the update's."""


@dataclass
class LayerUpdate:
    """Update `s · ΔW` of one module.

    Attributes:
        rank: Narrowest dimension of the chain of factors.
        trained: Number of trainable parameters of this module alone; 0 if modules share them in pools.
        norm: Frobenius norm.
        effective_rank: `exp(−Σ pᵢ log pᵢ)` with `pᵢ = σᵢ / Σσ`; 0 for an update that is zero.
        singular_values: `σ`, largest first: `rank` of them, or as many as the weight has.

    Reference:
        Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).
    """

    rank: int
    trained: int
    norm: float
    effective_rank: float
    singular_values: Tensor


@dataclass
class Overlap:
    """Overlap of two updates `ΔW₁`, `ΔW₂` of one module; NaN if one of them is zero.

    Attributes:
        cosine: `⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖)`.
        outputs: `‖U₁ᵀ U₂‖² / min(r₁, r₂)` with orthonormal bases of their column spaces: 1 if one space
            contains the other, 0 if they are orthogonal.
        inputs: The same with their row spaces.

    Reference:
        Hu et al. (arXiv 2106.09685), 7.2, for the similarity of subspaces.
    """

    cosine: float
    outputs: float
    inputs: float


def layer_updates(model: nn.Module, adapter_name: str = "default") -> dict[str, LayerUpdate]:
    """Size and spectrum of an adapter's update in each module.

    The spectrum comes from a small core between orthonormal bases, never from the whole update.

    Raises:
        ValueError: If the model has no such adapter of this package.
    """
    layers = _layers(model, adapter_name)
    return {
        name: _update(layers[name], adapter_name)
        for name in progress(layers, len(layers), "decomposing updates")
    }


def layer_overlaps(
    model: nn.Module, other: nn.Module, adapter_name: str = "default", other_name: str = "default"
) -> dict[str, Overlap]:
    """Overlap of two adapters, of one method or of two, in each module that both adapt.

    Raises:
        ValueError: If there are no such modules, or their weights differ in shape.
    """
    first, second = _layers(model, adapter_name), _layers(other, other_name)
    shared = [name for name in first if name in second]
    if not shared:
        raise ValueError(f"the adapters have no modules in common: one adapts {[*first]}, one {[*second]}")
    overlaps = {}
    for name in progress(shared, len(shared), "comparing updates"):
        if first[name].kind.shape != second[name].kind.shape:
            raise ValueError(f"{name}: the adapters are for weights of different shapes")
        overlaps[name] = _overlap(_pair(first[name], adapter_name), _pair(second[name], other_name))
    return overlaps


def _layers(model: nn.Module, adapter_name: str) -> dict[str, SubspaceLayer]:
    layers = adapted_layers(model, adapter_name, SubspaceLayer)
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r} is no adapter of peft_subspace on this model")
    return layers


@torch.no_grad()
def _pair(layer: SubspaceLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Factors `(m, r)` and `(r, n)` of `s · ΔW`, in double precision; `n` includes a kernel's axes."""
    left, right = split(
        [factor.double() for factor in layer.initialized_delta(adapter_name)(layer.read_weight)]
    )
    return left * layer.scaling[adapter_name], right.flatten(1)


def _core(left: Tensor, right: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return `Q₁, C, Q₂` with `ΔW = Q₁ C Q₂ᵀ`; for a chain as wide as the weight, `C` is `ΔW` itself."""
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return None, left @ right, None
    (one, left), (two, right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    return one, left @ right.T, two


def _update(layer: SubspaceLayer, adapter_name: str) -> LayerUpdate:
    left, right = _pair(layer, adapter_name)
    values = torch.linalg.svdvals(_core(left, right)[1])
    parts = values[values > 0] / values.sum()
    return LayerUpdate(
        rank=left.shape[1],
        trained=sum(p.numel() for p in layer.deltas[adapter_name].parameters()),
        norm=float(values.norm()),
        effective_rank=float(torch.exp(-(parts * parts.log()).sum())) if len(parts) else 0.0,
        singular_values=values,
    )


def _overlap(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Overlap:
    inner = ((first[0].T @ second[0]) * (first[1] @ second[1].T)).sum()
    one, two = _bases(*first), _bases(*second)
    if not one.norm * two.norm:
        return Overlap(math.nan, math.nan, math.nan)
    outputs, inputs = (
        float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1])
        for a, b in ((one.columns, two.columns), (one.rows, two.rows))
    )
    return Overlap(float(inner) / (one.norm * two.norm), outputs, inputs)


@dataclass
class _Bases:
    """Orthonormal bases of the columns and of the rows of an update, and its norm."""

    columns: Tensor
    rows: Tensor
    norm: float


def _bases(left: Tensor, right: Tensor) -> _Bases:
    one, core, two = _core(left, right)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)  # noqa: N806 - as torch names them
    count = int((_NEGLIGIBLE * S.max() < S).sum())
    columns, rows = U[:, :count], Vh[:count].T
    return _Bases(
        columns if one is None else one @ columns, rows if two is None else two @ rows, float(S.norm())
    )
