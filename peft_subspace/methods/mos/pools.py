"""The pools: parameters that all modules of a group share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from .config import MoSConfig
from .sharing import MoSSpec


class Pools(nn.Module):
    """Pools of one adapter: `<group>__A` of shape `(e·L·l, in / l)` and `<group>__B` of `(e·L·l, out / l)`.

    The names are flat because PEFT finds an adapter's name in a key only as its last or last but one part.
    They are created in fp32, whatever the base model's dtype.

    Args:
        specs: Slices of all modules.
        config: Config of the adapter.
    """

    def __init__(self, specs: Iterable[MoSSpec], config: MoSConfig) -> None:
        super().__init__()
        self.first: dict[str, MoSSpec] = {}
        self.scaling_for = config.scaling_for
        for spec in specs:
            if spec.group not in self.first:
                self.first[spec.group] = spec
                for side, shape in zip("AB", spec.pool_shapes, strict=True):
                    pool = nn.Parameter(torch.empty(shape, dtype=torch.float32))
                    self.register_parameter(f"{spec.group}__{side}", pool)

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
                std = spec.shape.random_std / (self.scaling_for(spec.name) or 1.0)
                bound = 3 * std * (width / spec.rank) ** 0.5  # three, as U(±b) has a variance of b² / 3
                pool_b.data.uniform_(-bound, bound, generator=generator)
            else:
                pool_b.data.zero_()
