"""LoRA-FA, which trains `B` and leaves a random `A` as it is (arXiv 2308.03303)."""

import torch
from torch import nn

from peft_subspace.developer import Delta, ScaledConfig, SubspaceModel


class LoRAFAConfig(ScaledConfig):
    """Configuration: `r`, `alpha`, `dropout` and everything else of PEFT come from the base class."""

    peft_type_name = "LORAFA"


class LoRAFADelta(Delta):
    """`ΔW = (α/r) B A` with trained `B (out, r)` and frozen `A (r, in, *kernel)`."""

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.B = nn.Parameter(torch.empty(spec.shape.out_features, spec.rank))
        self.register_buffer("A", torch.empty(spec.rank, *spec.shape.dims[1:]))

    def factors(self):
        """Return `B` and `A`."""
        return self.B, self.A

    def reset_parameters(self, init_weights, generator):
        """Start at `B = 0`, or at random."""
        self.A.normal_(std=self.shape.columns**-0.5, generator=generator)
        std = self.shape.random_std * (self.shape.columns / len(self.A)) ** 0.5
        self.B.data.normal_(std=std if init_weights is False else 0.0, generator=generator)


class LoRAFAModel(SubspaceModel, config=LoRAFAConfig, update=LoRAFADelta):
    """Model with LoRA-FA adapters; this registers the method with PEFT."""
