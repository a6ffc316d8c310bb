"""An edit: a frozen matrix, dense, sparse or of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from peft_subspace.core.delta import Delta
from peft_subspace.core.shapes import ModuleSpec

from .config import EditConfig


class EditDelta(Delta):
    """Buffers `left (out, r)` and `right (r, in)`, or `matrix (out, in)`, or `indices` and `values` `(k,)`.

    A convolution's kernel is part of the input axis.
    """

    def __init__(self, config: EditConfig, spec: ModuleSpec) -> None:
        super().__init__(config, spec)
        self.form, out, into = config.form, spec.shape.out_features, spec.shape.columns
        forms: dict[str, dict[str, tuple[int, ...]]] = {
            "chain": {"left": (out, spec.rank), "right": (spec.rank, into)},
            "dense": {"matrix": (out, into)},
            "sparse": {"indices": (spec.rank,), "values": (spec.rank,)},
        }
        for name, size in forms[config.form].items():
            dtype = torch.int32 if name == "indices" else torch.float32
            self.register_buffer(name, torch.zeros(size, dtype=dtype))

    def factors(self) -> tuple[Tensor, ...]:
        """Return the factors, or the one matrix."""
        tensors: Any = self
        if self.form == "chain":
            return tensors.left, tensors.right.view(-1, *self.shape.dims[1:])
        if self.form == "dense":
            return (tensors.matrix.view(self.shape.dims),)
        flat = tensors.values.new_zeros(prod(self.shape.dims))
        return (flat.index_put((tensors.indices.long(),), tensors.values).view(self.shape.dims),)

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Start at zero, or at random; the functions that make edits fill them in."""
        std = self.random_std if init_weights is False else 0.0
        for tensor in self.buffers():
            if tensor.is_floating_point():
                tensor.normal_(std=std, generator=generator)

    def check_values(self, state: Mapping[str, Tensor]) -> None:
        """Raise unless sparse entries lie in the weight.

        Raises:
            ValueError: If they do not, or two have one place.
        """
        indices, count = state.get("indices"), prod(self.shape.dims)
        if indices is None:
            return
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < count:
            raise ValueError(
                f"indices must be from 0 to {count - 1}, the entries of the weight; save it again"
            )
        if len(indices.unique()) < len(indices):
            raise ValueError("indices name an entry twice; the file is damaged, save the adapter again")
