"""Pruning while tuning: low-rank scores move a mask, and a callback its sparsity (PST, arXiv 2205.11005).

`W + ΔW = M ⊙ (W + B A)`, where `M` keeps the part `1 − s` of the layer's entries with the largest scores
`S = |W + B A| + Q P + u 1ᵀ + 1 vᵀ`. The gradient of `M` goes to `S` as it is (straight-through).

    model = get_peft_model(model, MovingMaskConfig(r=8, target_modules="all-linear"))
    Trainer(model, callbacks=[SparsityCallback(0.5)], …).train()
"""

import torch
from torch import nn
from transformers import TrainerCallback

from peft_subspace.developer import SubspaceConfig, SubspaceModel, Update


class MovingMaskConfig(SubspaceConfig):
    """Configuration: `r`, of both products, and everything else of PEFT come from the base class."""

    peft_type_name = "EXAMPLEMOVINGMASK"
    bounded_rank = True


class MovingMaskUpdate(Update):
    """`ΔW = M ⊙ (W + B A) − W` with trained `B`, `Q` `(out, r)`, `A`, `P` `(r, in)`, `u`, `v`.

    The buffer `sparsity` is `s`. A convolution's kernel is part of the input axis.
    """

    reads_weight = needs_weight = True

    def __init__(self, config, spec):
        super().__init__(config, spec)
        out, into = spec.shape.out_features, spec.shape.columns
        sizes = {"B": (out, spec.rank), "Q": (out, spec.rank), "A": (spec.rank, into), "P": (spec.rank, into)}
        for name, size in {**sizes, "u": (out, 1), "v": (1, into)}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size)))
        self.register_buffer("sparsity", torch.zeros(()))

    def update(self, weight):
        """Mask the tuned weight."""
        base = weight().to(self.B.dtype)
        tuned = base.flatten(1) + self.B @ self.A
        scores = tuned.abs() + self.Q @ self.P + self.u + self.v
        order = scores.detach().flatten().argsort()
        mask = torch.ones_like(order, dtype=scores.dtype)
        cut = (torch.arange(len(order), device=order.device) >= self.sparsity * len(order)).to(mask)
        mask = mask.scatter(0, order, cut).view_as(scores)
        return ((mask + scores - scores.detach()) * tuned).reshape(base.shape) - base

    def reset_parameters(self, init_weights, generator):
        """Start at the weight itself, or at random."""
        for name, parameter in self.named_parameters():
            std = self.shape.columns**-0.5 if name in "AP" else 0.1 if init_weights is False else 0.0
            parameter.data.normal_(std=std, generator=generator)
        self.sparsity.fill_(0.3 if init_weights is False else 0.0)

    def reset_from_weight(self, weight):
        """Take nothing: the weight is read in each pass, and the adapter belongs to it."""


class MovingMaskModel(SubspaceModel, config=MovingMaskConfig, update=MovingMaskUpdate):
    """Model with such adapters."""


class SparsityCallback(TrainerCallback):
    """Zero sparsity in the first tenth of the steps, then a cubic rise, and the last 30 % at `final`."""

    def __init__(self, final):
        self.final = final

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Set the sparsity of this step."""
        done = min(1.0, max(0.0, (state.global_step / state.max_steps - 0.1) / 0.6))
        for module in model.modules():
            if isinstance(module, MovingMaskUpdate):
                module.sparsity.fill_(self.final * (1 - (1 - done) ** 3))
