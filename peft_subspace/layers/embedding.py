"""A chain in place of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_subspace.layers.base import Branch
from peft_subspace.layers.costs import Route
from peft_subspace.layers.linear import TransposedKind, add_chain


class EmbeddingKind(TransposedKind):
    """`nn.Embedding`: a linear layer on one-hot rows, without dropout, for its input is indices."""

    linear = False
    dropout_cls = None

    def routes(self, base: nn.Module, branches: Sequence[Branch], x: Tensor, free: bool) -> Sequence[Route]:
        """Beside the layer."""
        return ["chain"] * len(branches)

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor, route: Route) -> Tensor:
        """Look the indices up in the last factor and apply the others."""
        *rest, last = branch.factors
        rows = F.embedding(
            x, last.T, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq
        )
        rows = _scaled(base, rows)
        result = add_chain(result, tuple(rest), rows) if rest else (result + rows).to(result.dtype)
        if base.padding_idx is None or not result.requires_grad:
            return result
        padding = (x == base.padding_idx)[..., None]
        return torch.where(padding, result.detach(), result)  # as in the base layer, padding trains nothing

    def add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        """Add the rows of the gradient to the columns of their indices."""
        indices, rows = x.flatten(), _scaled(base, grad_output.flatten(0, -2).float())
        if base.scale_grad_by_freq:
            rows = rows / indices.bincount()[indices, None]
        if base.padding_idx is not None:
            rows = rows.masked_fill((indices == base.padding_idx)[:, None], 0.0)
        total.index_add_(1, indices, rows.T)


def _scaled(base: Any, rows: Tensor) -> Tensor:
    """Rows times the scale that Gemma's embedding, and others, give to their output."""
    scale = getattr(base, "embed_scale", None)
    return rows if scale is None else rows * torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)
