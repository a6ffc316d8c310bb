"""A random subspace with one vector for the whole model, and the size at which it is enough (1804.08838).

All `D` entries of all updates are `ΔW_p = √(d/D) · σ(p) · θ_{h(p)}` with one trained vector `θ (d,)`, and a
sign and a place that are hashes of the entry's position `p`: a sparse projection with columns of norm one, of
which nothing is stored. `ΔW` is formed in each pass, so this measures; it is no way to save time.

    sizes, scores = measure_dimension(make_model, train, sizes=[100, 300, 1000], target_modules="all-linear")
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from peft import get_peft_model
from torch import nn

from peft_subspace.developer import SubspaceConfig, SubspaceModel, Update


@dataclass
class IntrinsicConfig(SubspaceConfig):
    """Configuration.

    Args:
        r: Size `d` of the vector.
    """

    peft_type_name: ClassVar[str] = "EXAMPLEINTRINSIC"
    r: int = 1000


class Theta(nn.Module):
    """The vector `(d,)`, and where the entries of each module begin among those of all."""

    def __init__(self, size, specs):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(size))
        self.starts, self.total = {}, 0
        for spec in specs:
            self.starts[spec.name] = self.total
            self.total += prod(spec.shape.dims)

    def forward(self):
        """Return the vector, scaled so that all updates together are as long as it is."""
        return self.theta * (len(self.theta) / self.total) ** 0.5

    def reset_parameters(self, init_weights, generator_for):
        """Start at zero, or at random."""
        std = 0.02 * (self.total / len(self.theta)) ** 0.5 if init_weights is False else 0.0
        self.theta.data.normal_(std=std, generator=generator_for("theta"))


def hashed(positions):
    """Numbers from 0 to 2³² − 1 that look random."""
    x = positions * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    return x ^ x >> 13


class IntrinsicUpdate(Update):
    """`ΔW_p = √(d/D) · σ(p) · θ_{h(p)}`."""

    @classmethod
    def shared(cls, config, specs):
        """Make the one vector."""
        return Theta(config.r, specs)

    def update(self, weight):
        """Look each entry up."""
        shared, dims = self.shared_tensors, self.shape.dims
        theta = shared()
        places = hashed(shared.starts[self.spec.name] + torch.arange(prod(dims), device=theta.device))
        return (theta[places % len(theta)] * (1 - 2 * (places >> 31))).view(dims)

    def reset_parameters(self, init_weights, generator):
        """Nothing is a module's own."""


class IntrinsicModel(SubspaceModel, config=IntrinsicConfig, update=IntrinsicUpdate):
    """Model with such adapters."""


def measure_dimension(make_model, train, sizes, target_modules, share=0.9):
    """Return the smallest size that reaches a share of the full score (None: none does), and all scores.

    `train(model)` trains what requires gradients and returns a score; the full one has size None.
    """
    scores = {None: train(make_model())}
    for size in sorted(sizes):
        model = get_peft_model(make_model(), IntrinsicConfig(r=size, target_modules=target_modules))
        scores[size] = train(model)
        if scores[size] >= share * scores[None]:
            return size, scores
    return None, scores
