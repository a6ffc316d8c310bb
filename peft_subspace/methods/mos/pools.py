"""The pools: parameters that all modules of a group share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_subspace.core.trained import TrainedModule

from .sharing import MoSSpec


class Pools(TrainedModule):
    """Pools of one adapter: `<group>__A` of shape `(e·L·l, in / l)` and `<group>__B` of `(e·L·l, out / l)`.

    The names are flat because PEFT finds an adapter's name in a key only as its last or last but one part.
    They are created in fp32, whatever the base model's dtype.

    Args:
        specs: Slices of all modules.
        scalings: Scaling of the first module of each group.
    """

    def __init__(self, specs: Iterable[MoSSpec], scalings: Mapping[str, float]) -> None:
        super().__init__()
        self.first: dict[str, MoSSpec] = {}
        self.scalings = dict(scalings)
        for spec in specs:
            if spec.group not in self.first:
                self.first[spec.group] = spec
                for side, shape in zip("AB", spec.pool_shapes, strict=True):
                    pool = nn.Parameter(torch.empty(shape, dtype=torch.float32))
                    self.register_parameter(f"{spec.group}__{side}", pool)

    def forward(self, group: str, *indices: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of one group's pools A and B that the indices name."""
        return tuple(_gather(pool, index) for pool, index in zip(self.pair(group), indices, strict=True))

    def pair(self, group: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Pools A and B of one group, as they are now: parameters get replaced."""
        return getattr(self, f"{group}__A"), getattr(self, f"{group}__B")

    def reset_parameters(
        self, init_weights: bool | str, generator_for: Callable[[str], torch.Generator]
    ) -> None:
        """Draw pool A from U(±1/√in), with the whole vector's width; zero pool B, or draw it evenly too."""
        for group, spec in self.first.items():
            generator, (pool_a, pool_b) = generator_for(group), self.pair(group)
            width = spec.shape.columns
            pool_a.data.uniform_(-(width**-0.5), width**-0.5, generator=generator)
            if init_weights is False:
                std = spec.shape.random_std / (self.scalings[group] or 1.0)
                bound = 3 * std * (width / spec.rank) ** 0.5  # three, as U(±b) has a variance of b² / 3
                pool_b.data.uniform_(-bound, bound, generator=generator)
            else:
                pool_b.data.zero_()


def _gather(pool: Tensor, index: Tensor) -> Tensor:
    """Rows of `pool`, on the device of `index`."""
    # An embedding, for its gradient is deterministic on every device; that of `pool[index]` is not.
    return F.embedding(index.to(pool.device), pool).to(index.device)
