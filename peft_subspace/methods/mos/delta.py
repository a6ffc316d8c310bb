r"""MoS: `ΔW_k = (α / r) B_k A_k`, both factors assembled from shards of pools that modules share.

A group of `L` modules owns `P^A` of shape `(e·L·l, in / l)` and `P^B` of shape `(e·L·l, out / l)`. Row `j` of
`A_k` is the concatenation of the rows `idx[j·l], …, idx[j·l + l − 1]` of `P^A`; column `j` of `B_k` likewise,
by indices of its own, of `P^B`. The first `(r − p)·l` indices are drawn without repetition from the
`(e − p)·L·l` shared rows, the last `p·l` are the module's own rows. The indices never change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_subspace.core.delta import Delta
from peft_subspace.core.linalg import local_generator
from peft_subspace.core.shapes import WeightShape
from peft_subspace.methods.mos.config import MoSConfig
from peft_subspace.methods.mos.sharing import Share

if TYPE_CHECKING:
    from peft_subspace.methods.mos.pools import Pools


class MoSDelta(Delta):
    """Indices `index_A`, `index_B` of shape `(r·l,)` into pools that live elsewhere.

    A convolution's kernel is a part of the input axis: a vector of `A` is `in / groups · kernel` wide.

    Reference:
        Wang et al. (arXiv 2410.00938): subset selection, pair dissociation, vector sharding, shard
        privatisation.
    """

    def __init__(self, config: MoSConfig, shape: WeightShape, share: Share) -> None:
        super().__init__(config, shape, share)
        self.share = share
        self.dissociate = config.pair_dissociation
        self.seed = config.seed or 0
        # A tuple hides the pools from torch: they are the root module's, and it alone moves and saves them.
        self._pools: tuple[Pools, ...] = ()
        for side, shards in zip("AB", share.shards, strict=True):
            self.register_buffer(f"index_{side}", torch.zeros(share.rank * shards, dtype=torch.int32))

    def attach(self, pools: Pools) -> None:
        """Set the pools that the indices point into."""
        self._pools = (pools,)

    def pool_parameters(self) -> tuple[nn.Parameter, ...]:
        """The group's pools A and B; none before `attach`."""
        return self._pools[0].pair(self.share.group) if self._pools else ()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `B` of shape `(out, r)` and `A` of shape `(r, in, *kernel)`."""
        pool_A, pool_B = self.pool_parameters()
        A = _gather(pool_A, self.index_A).reshape(self.share.rank, *self.shape.dims[1:])
        B = _gather(pool_B, self.index_B).reshape(self.share.rank, self.shape.out_features)
        return B.T, A

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Draw the indices, of which any adapter with this seed has the same; the pools are not its own."""
        self.index_A.copy_(self._draw("A", self.share.shards[0]))
        self.index_B.copy_(self._draw("B", self.share.shards[1]) if self.dissociate else self.index_A)

    def _draw(self, side: str, shards: int) -> Tensor:
        share = self.share
        generator = local_generator(self.seed, share.module, side)
        rows = share.shared_vectors * shards
        chosen = torch.randperm(rows, generator=generator, device="cpu")
        own = share.private_r * shards
        private = torch.arange(own, device="cpu") + rows + share.position * own
        return torch.cat([chosen[: (share.rank - share.private_r) * shards], private])

    def check_values(self, state: dict[str, Tensor]) -> None:
        """Raise unless the indices of `state` are rows of their pools."""
        for side, (rows, _) in zip("AB", self.share.pool_shapes, strict=True):
            index = state.get(f"index_{side}", self.get_buffer(f"index_{side}"))
            if index.is_floating_point() or index.min() < 0 or index.max() >= rows:
                raise ValueError(
                    f"index_{side} points outside its pool of {rows} rows; the adapter is broken, or made "
                    "for another base model"
                )

    def extra_repr(self) -> str:
        """Group of the module and shapes of the indices."""
        return f"group={self.share.group}, {super().extra_repr()}"


def _gather(pool: Tensor, index: Tensor) -> Tensor:
    """Rows of `pool`, on the device of `index`."""
    # An embedding, for its gradient is deterministic on every device; that of `pool[index]` is not.
    return F.embedding(index.to(pool.device), pool).to(index.device)
