"""DiffScaler in its mergeable form: scales, shifts and a low-rank term (arXiv 2404.09976).

`y = (1 + a) ⊙ W x + b + B A x`. The shift is the bias that the layer has: `bias="examplediffscaler_only"`
trains it. The paper's form has a ReLU between `B` and `A`; then `y` is no product of `x` with any weight, and
neither merging nor the sums, files and routes of an update of a weight are possible: it is left out.

    from diff_scaler import DiffScalerConfig
    config = DiffScalerConfig(r=4, target_modules="all-linear", bias="examplediffscaler_only")
"""

import torch
from torch import nn

from peft_subspace.developer import SubspaceConfig, SubspaceModel, Update


class DiffScalerConfig(SubspaceConfig):
    """Configuration: `r` and everything else of PEFT come from the base class."""

    peft_type_name = "EXAMPLEDIFFSCALER"
    bounded_rank = True


class DiffScalerUpdate(Update):
    """`ΔW = diag(a) W + B A` with trained `a (out,)`, `B (out, r)` and `A (r, in · kernel)`."""

    needs_weight = reads_weight = True

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.a = nn.Parameter(torch.empty(spec.shape.out_features))
        self.B = nn.Parameter(torch.empty(spec.shape.out_features, spec.rank))
        self.A = nn.Parameter(torch.empty(spec.rank, spec.shape.columns))

    def update(self, weight):
        """Scale the rows of the weight, and add the low-rank term."""
        base = weight().to(self.B.dtype)
        return (self.a[:, None] * base.flatten(1) + self.B @ self.A).reshape(base.shape)

    def reset_parameters(self, init_weights, generator):
        """Start at `a = 0` and `B = 0`, or at random."""
        std = 0.1 if init_weights is False else 0.0
        self.a.data.normal_(std=std, generator=generator)
        self.B.data.normal_(std=std, generator=generator)
        self.A.data.normal_(std=self.shape.columns**-0.5, generator=generator)

    def reset_from_weight(self, weight):
        """Take nothing: the weight is read in each pass, and the adapter belongs to it."""


class DiffScalerModel(SubspaceModel, config=DiffScalerConfig, update=DiffScalerUpdate):
    """Model with such adapters."""
