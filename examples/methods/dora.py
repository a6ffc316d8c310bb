"""Weight-decomposed low-rank adaptation, an update that is no chain of matrices (arXiv 2402.09353).

Copy this file to start a method of your own. It trains, merges and unmerges bit for bit, saves and loads on
linear layers and convolutions, quantized ones included; a LoRA export and weighted sums are refused.

    from dora import DoRAConfig
    model = get_peft_model(model, DoRAConfig(r=8, target_modules="all-linear"))
"""

import torch
from torch import Tensor, nn

from peft_subspace.developer import SubspaceConfig, SubspaceModel, Update


class DoRAConfig(SubspaceConfig):
    """Configuration: `r` and everything else of PEFT come from the base class."""

    peft_type_name = "EXAMPLEDORA"
    bounded_rank = True


class DoRAUpdate(Update):
    """`ΔW = m ⊙ V / ‖V‖ − W` with `V = W + B A`, norms by row, and trained `m (out,)`, `B`, `A`."""

    reads_weight = needs_weight = True

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.m = nn.Parameter(torch.empty(spec.shape.out_features))
        self.B = nn.Parameter(torch.empty(spec.shape.out_features, spec.rank))
        self.A = nn.Parameter(torch.empty(spec.rank, spec.shape.columns))

    def update(self, weight) -> Tensor:
        """Return `ΔW`; the norm takes part in the gradient."""
        base = weight().to(self.B.dtype)
        rows = base.flatten(1) + self.B @ self.A
        return (self.m[:, None] * rows / rows.norm(dim=1, keepdim=True)).reshape(base.shape) - base

    def reset_parameters(self, init_weights, generator):
        """Start at `B = 0`, or at random."""
        self.m.data.fill_(1.0)
        self.A.data.normal_(std=self.shape.columns**-0.5, generator=generator)
        self.B.data.normal_(std=0.0 if init_weights else 0.1, generator=generator)

    def reset_from_weight(self, weight):
        """Take the norms of the weight's rows, so that `ΔW = 0` where `B = 0`."""
        self.m.data.copy_(weight.flatten(1).norm(dim=1))


class DoRAModel(SubspaceModel, config=DoRAConfig, update=DoRAUpdate):
    """Model with such adapters."""
