"""A chain in place of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_subspace.core.chain import split
from peft_subspace.layers.base import Branch, LayerKind
from peft_subspace.layers.costs import Route
from peft_subspace.layers.linear import TransposedKind, add_chain
from peft_subspace.layers.stacked import Form, add_product


class EmbeddingKind(TransposedKind):
    """`nn.Embedding`: a linear layer on one-hot rows, without dropout, for its input is indices."""

    linear = has_rows = False
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

    add_each = LayerKind.add_each

    def stackable(self, factors: tuple[Tensor, ...]) -> Form | None:
        """`(out, r)` and `(tokens, r)`, in which an index is a row."""
        form = super().stackable(factors)
        if form is None:
            return None
        left, right = split(form)
        return left, right.T.contiguous()

    def add_stacked(self, result: Tensor, base: nn.Module, stacked: Form, x: Tensor) -> Tensor:
        """Look the indices up in the adapters' rows, one adapter's after another's."""
        left, table = stacked
        starts = torch.arange(len(table), device=x.device) * table.shape[1]
        indices = x.reshape(len(table), -1) + starts[:, None]
        return add_product(result, _scaled(base, F.embedding(indices, table.flatten(0, 1))), left)

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
