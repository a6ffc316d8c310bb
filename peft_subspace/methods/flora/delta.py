r"""FLoRA: `ΔW = s · G ×₁ A⁽¹⁾ ×₂ A⁽²⁾ … ×_N A⁽ᴺ⁾`, a Tucker decomposition over the weight's own axes.

For a linear layer this is `ΔW = s · A⁽²⁾ Gᵀ A⁽¹⁾ᵀ` with `A⁽¹⁾ (in, r1)`, `A⁽²⁾ (out, r2)`, `G (r1, r2)`;
for a convolution
`ΔW[o, i, u, v] = s · Σ_abcd G[a, b, c, d] A⁽¹⁾[i, a] A⁽²⁾[o, b] A⁽³⁾[u, c] A⁽⁴⁾[v, d]`.
Groups of a grouped convolution share the input factor, of size `in_channels / groups`. For stacked experts
the stack is the third mode: `ΔW[e, o, i] = s · Σ_abc G[a, b, c] A⁽¹⁾[i, a] A⁽²⁾[o, b] A⁽³⁾[e, c]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from peft_subspace.core.delta import Combined, Delta
from peft_subspace.core.linalg import column_basis

from .config import FLoRAConfig, FLoRASpec


class FLoRADelta(Delta):
    """Tucker-decomposed update: `core` `(r_in, r_out, *r_kernel)` and `mode_factor_n` `(dim_n, rank_n)`.

    Modes are numbered `in, out, *kernel`, as in the paper.

    Reference:
        Si et al. (arXiv 2405.14739), the Tucker form of the update.
    """

    def __init__(self, config: FLoRAConfig, spec: FLoRASpec) -> None:
        super().__init__(config, spec)
        self.core = nn.Parameter(torch.empty(spec.mode_ranks))
        for mode, sizes in enumerate(zip(spec.shape.modes, spec.mode_ranks, strict=True)):
            self.register_parameter(f"mode_factor_{mode}", nn.Parameter(torch.empty(sizes)))

    @property
    def mode_factors(self) -> list[Tensor]:
        """Factors of all modes, `(dim_n, rank_n)` each."""
        return [getattr(self, f"mode_factor_{mode}") for mode in range(self.core.ndim)]

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `A⁽²⁾`, the core with its kernel modes multiplied out, and `A⁽¹⁾ᵀ`."""
        into, out, *kernel = self.mode_factors
        core = self.core
        if kernel:
            core = (core.flatten(2) @ reduce(torch.kron, kernel).T).unflatten(2, self.shape.modes[2:])
        return out, core.transpose(0, 1), into.T

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Draw the factors and the core; one of them starts at zero, unless `init_weights` is False."""
        start = "zero_output" if init_weights is True else init_weights
        # Modes begin with `in, out`, the axes of the weight with `out, in`.
        for axis, factor in zip((1, 0, *range(2, self.core.ndim)), self.mode_factors, strict=True):
            dim, rank = factor.shape
            if start == "kaiming_uniform":
                factor.data.uniform_(-(rank**-0.5), rank**-0.5, generator=generator)
            else:
                keeping = 1.0 if axis == self.shape.lookup_axis else dim**-0.5
                stds: dict[bool | str, float] = {"normal": 0.02, "zero_output": keeping, False: rank**-0.5}
                factor.data.normal_(0.0, stds.get(start, (2 * rank) ** -0.5), generator=generator)
        if start in (False, "zero_output"):
            std = (self.core.shape[1] / self.core.numel()) ** 0.5 if start else self.random_std
            self.core.data.normal_(0.0, std, generator=generator)
        if start is not False:
            (self.mode_factor_1 if start == "zero_output" else self.core).data.zero_()

    def speed(self) -> float:
        """Return `√(m r)`, that of the default initialization."""
        return self.mode_factor_1.numel() ** 0.5

    @classmethod
    def product(cls, left: Tensor, right: Tensor, deltas: Sequence[FLoRADelta]) -> Combined:
        """Take `left` for the outputs, a basis of the inputs of `right`, and its coordinates for the core."""
        basis = column_basis(right.transpose(0, 1).flatten(1))
        core = torch.tensordot(basis, right, dims=([0], [1]))
        eyes = [torch.eye(size, dtype=core.dtype, device=core.device) for size in right.shape[2:]]
        state = {f"mode_factor_{mode}": factor for mode, factor in enumerate([basis, left, *eyes])}
        return {"rank_pattern": list(core.shape)}, {"core": core, **state}
