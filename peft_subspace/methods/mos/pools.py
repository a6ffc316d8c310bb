"""The pools: parameters that all modules of a group share, held once by the root of the adapted model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peft_subspace.methods.mos.sharing import Share


class Pools(nn.Module):
    """Pools of one adapter: `<group>__A` of shape `(e·L·l, in / l)` and `<group>__B` of `(e·L·l, out / l)`.

    The names are flat because PEFT finds an adapter's name in a key only as its last or last but one part.
    They are created in fp32, whatever the base model's dtype.

    Args:
        shares: Shares of all modules.
    """

    def __init__(self, shares: Iterable[Share]) -> None:
        super().__init__()
        self.input_widths = {share.group: share.widths[0] for share in shares}
        for share in shares:
            for side, shape in zip("AB", share.pool_shapes, strict=True):
                name = pool_name(share.group, side)
                if name not in self._parameters:
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))

    def pair(self, group: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Pools A and B of one group, as they are now: parameters get replaced."""
        return getattr(self, pool_name(group, "A")), getattr(self, pool_name(group, "B"))

    def reset_parameters(self, group: str, init_weights: bool | str, generator: torch.Generator) -> None:
        """Draw pool A from U(±1/√in), with the whole vector's width; zero pool B, or draw it from U(±1)."""
        bound = self.input_widths[group] ** -0.5
        pool_a, pool_b = self.pair(group)
        pool_a.data.uniform_(-bound, bound, generator=generator)
        if init_weights is False:
            pool_b.data.uniform_(-1.0, 1.0, generator=generator)
        else:
            pool_b.data.zero_()


class PoolDict(nn.ModuleDict):
    """Pools by adapter name, a child of the adapted model's root module."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, so that a root which runs its children in turn (`nn.Sequential`) still works."""
        return x


def pool_name(group: str, side: str) -> str:
    """Name of a pool's parameter."""
    return f"{group}__{side}"
