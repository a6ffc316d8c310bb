r"""Composition: `ΔW = Σ_t c_t L_t R_t = [L_1 … L_T] diag(c) [R_1; …; R_T]`, where `c` alone trains.

`L_t (out, r_t)` and `R_t (r_t, in)` are the frozen factors of adapters that are there already. A coefficient
belongs to an adapter, to an adapter in one module, or to one of the `Σ r_t` components of a module, and the
gradient of `c_t` is `⟨∂L/∂W, L_t R_t⟩`. A convolution's kernel is part of the input axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_subspace.core.delta import Combined, Delta

from .config import CompositionConfig, CompositionSpec


class CompositionDelta(Delta):
    """Buffers `left` `(out, R)` and `right` `(R, in, *kernel)`, fp32, and parameter `coefficients`.

    Reference:
        Zhang et al. (arXiv 2407.02880), one coefficient for each task vector and tensor.
    """

    full_precision: ClassVar[tuple[str, ...]] = ("coefficients",)
    shared_name: ClassVar[str] = "coefficients"
    spec: CompositionSpec
    coefficients: nn.Parameter | None
    left: Tensor
    right: Tensor

    def __init__(self, config: CompositionConfig, spec: CompositionSpec) -> None:
        super().__init__(config, spec)
        self.start, by_component = config.start, config.per == "component"
        self.expects_adapters = config.init_weights is True
        self.ranks = (1,) * spec.rank if by_component else spec.ranks
        self.register_buffer("left", torch.empty(spec.shape.out_features, spec.rank, dtype=torch.float32))
        self.register_buffer("right", torch.empty(spec.rank, *spec.shape.dims[1:], dtype=torch.float32))
        own = None if config.per == "task" else torch.empty(len(self.ranks), dtype=torch.float32)
        self.register_parameter("coefficients", None if own is None else nn.Parameter(own))

    @classmethod
    def shared(cls, config: CompositionConfig, specs: Sequence[Any]) -> Coefficients | None:
        """Make the coefficients of the adapters, if all modules have the same."""
        return Coefficients(max(1, len(config.adapters)), config.start) if config.per == "task" else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `[L_1 … L_T] diag(c)` and `[R_1; …; R_T]`."""
        values = self.shared_tensors() if self.coefficients is None else self.coefficients
        values = values.to(self.left.dtype)
        c = torch.cat([values[t : t + 1].expand(rank) for t, rank in enumerate(self.ranks)])
        return self.left * c, self.right

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Start the coefficients; the factors are random until those of adapters take their place."""
        self.left.normal_(std=max(1, self.spec.rank) ** -0.5, generator=generator)
        self.right.normal_(std=self.random_std, generator=generator)
        if self.coefficients is not None:
            _start(self.coefficients, self.start, init_weights, generator)

    @classmethod
    def product(cls, left: Tensor, right: Tensor, deltas: Sequence[CompositionDelta]) -> Combined:
        """The factors themselves, with coefficients of one."""
        ones = torch.ones(len(right), dtype=torch.float32, device=left.device)
        return {"ranks": [len(right)]}, {"left": left, "right": right, "coefficients": ones}

    @torch.no_grad()
    def fill(self, left: Tensor, right: Tensor) -> None:
        """Take the factors of the adapters, `(out, R)` and `(R, columns)`."""
        self.left.copy_(left)
        self.right.copy_(right.view_as(self.right))
        self.initialized = True

    def on_training_step(self, adapter_name: str) -> bool:
        """Warn if there is nothing to compose."""
        if self.expects_adapters and not self.initialized:
            warnings.warn(
                f"adapter {adapter_name!r} trains coefficients of random factors; make it by "
                "peft_subspace.compose(model, adapters)",
                stacklevel=5,
            )
        return False


class Coefficients(nn.Module):
    """Coefficients `(T,)` of the adapters in all modules."""

    def __init__(self, count: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.coefficients = nn.Parameter(torch.empty(count, dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return them."""
        return self.coefficients

    def reset_parameters(
        self, init_weights: bool | str, generator_for: Callable[[str], torch.Generator]
    ) -> None:
        """Start them."""
        _start(self.coefficients, self.start, init_weights, generator_for("coefficients"))


def _start(
    coefficients: nn.Parameter, start: float, init_weights: bool | str, generator: torch.Generator
) -> None:
    if init_weights is False:
        coefficients.data.normal_(generator=generator)
    else:
        coefficients.data.fill_(start)
