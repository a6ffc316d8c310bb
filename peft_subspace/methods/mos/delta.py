r"""MoS: `ΔW_k = s · B_k A_k`, both factors assembled from shards of pools that modules share.

A group of `L` modules owns `P^A` of shape `(e·L·l, in / l)` and `P^B` of shape `(e·L·l, out / l)`. Row `j` of
`A_k` is the concatenation of the rows `idx[j·l], …, idx[j·l + l − 1]` of `P^A`; column `j` of `B_k` likewise,
by indices of its own, of `P^B`. The first `(r − p)·l` indices are drawn without repetition from the
`(e − p)·L·l` shared rows, the last `p·l` are the module's own rows. The indices never change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_subspace.core.delta import Combined, Delta
from peft_subspace.core.linalg import local_generator

from .config import MoSConfig
from .pools import Pools
from .sharing import MoSSpec


class MoSDelta(Delta):
    """Indices `index_A`, `index_B` of shape `(r·l,)` into pools that live elsewhere.

    A convolution's kernel is a part of the input axis: a vector of `A` is `in / groups · kernel` wide.

    Reference:
        Wang et al. (arXiv 2410.00938): subset selection, pair dissociation, vector sharding, shard
        privatization.
    """

    shared_name: ClassVar[str] = "pools"
    spec: MoSSpec

    def __init__(self, config: MoSConfig, spec: MoSSpec) -> None:
        super().__init__(config, spec)
        self.dissociate = config.pair_dissociation
        self.seed = config.seed or 0
        for side, shards in zip("AB", spec.shards, strict=True):
            self.register_buffer(f"index_{side}", torch.zeros(spec.rank * shards, dtype=torch.int32))

    @classmethod
    def shared(cls, config: MoSConfig, specs: Sequence[Any]) -> Pools:
        """Make the pools of all groups."""
        first = {spec.group: spec for spec in reversed(specs)}
        return Pools(specs, {group: config.scaling_for(cls(config, spec)) for group, spec in first.items()})

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `B` of shape `(out, r)` and `A` of shape `(r, in, *kernel)`."""
        A, B = self.shared_tensors(self.spec.group, self.index_A, self.index_B)
        return B.reshape(self.spec.rank, -1).T, A.reshape(self.spec.rank, *self.shape.dims[1:])

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Draw the indices, of which any adapter with this seed has the same; the pools are not its own."""
        self.index_A.copy_(self._draw("A", self.spec.shards[0]))
        self.index_B.copy_(self._draw("B", self.spec.shards[1]) if self.dissociate else self.index_A)

    @classmethod
    def product(cls, left: Tensor, right: Tensor, deltas: Sequence[MoSDelta]) -> Combined:
        """Vectors `A` and `B` for the pools, of which every row is then one module's own."""
        return {"rank_pattern": len(right)}, {"A": right.flatten(1), "B": left.T}

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Put vectors into the module's rows of the pools; zeros stand for those that it has more."""
        pools = self.shared_tensors.pair(self.spec.group)
        for side, pool, index in zip("AB", pools, (self.index_A, self.index_B), strict=True):
            rows = F.pad(state[side], (0, 0, 0, self.spec.rank - len(state[side])))
            pool.data[index.long().to(pool.device)] = rows.to(pool).reshape(-1, pool.shape[1])

    def speed(self) -> float:
        """Return `√(m r / 3)`: rows of `A` have the squared length 1/3."""
        return (self.shape.out_features * self.spec.rank / 3) ** 0.5

    def _draw(self, side: str, shards: int) -> Tensor:
        spec = self.spec
        generator = local_generator(self.seed, spec.name, side)
        rows = spec.shared_vectors * shards
        chosen = torch.randperm(rows, generator=generator, device="cpu")
        own = spec.private_r * shards
        private = torch.arange(own, device="cpu") + rows + spec.position * own
        return torch.cat([chosen[: (spec.rank - spec.private_r) * shards], private])

    def check_values(self, state: Mapping[str, Tensor]) -> None:
        """Raise unless the indices of `state` are rows of their pools."""
        for side, (rows, _) in zip("AB", self.spec.pool_shapes, strict=True):
            index = state.get(f"index_{side}", self.get_buffer(f"index_{side}"))
            if index.is_floating_point() or index.min() < 0 or index.max() >= rows:
                remedy = "the adapter is broken, or made for another base model"
                raise ValueError(f"index_{side} points outside its pool of {rows} rows; {remedy}")

    def extra_repr(self) -> str:
        """Group of the module and shapes of the indices."""
        return f"group={self.spec.group}, {super().extra_repr()}"
