r"""Composition: `ΔW = Σ_t c_t L_t R_t = [L_1 … L_T] diag(c) [R_1; …; R_T]`, where `c` alone trains.

`L_t (out, r_t)` and `R_t (r_t, in)` are the frozen factors of adapters that are there already. A coefficient
belongs to an adapter, to an adapter in one module, or to one of the `Σ r_t` components of a module, and the
gradient of `c_t` is `⟨∂L/∂W, L_t R_t⟩`. A convolution's kernel is part of the input axis.

Where masks train, too, `ΔW = diag(m_out) [L_1 … L_T] diag(c ⊙ m_rank) [R_1; …; R_T] diag(m_in)`, or
`M ⊙ Σ_t c_t L_t R_t` with a mask of entries. A mask is `σ((x + logit u) / temperature)` divided by its mean,
where `x` trains and `u` is uniform: a sample while masks are learned, and `u = 1/2` at any other time. A mask
of equal logits is one everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_subspace.core.chain import multiply
from peft_subspace.core.delta import Combined, Delta

from .config import CompositionConfig, CompositionSpec


class CompositionDelta(Delta):
    """Buffers `left` `(out, R)` and `right` `(R, in, *kernel)`, fp32, and parameter `coefficients`.

    Masks have the parameters `mask_out` `(out,)`, `mask_rank` `(R,)` and `mask_in` `(in, *kernel)`, or
    `mask_entries` `(out, in, *kernel)`.

    Attributes:
        masks: Names of the masks.
        noise: `logit u` by the name of a mask, while samples of the masks are learned from.

    Reference:
        Zhang et al. (arXiv 2407.02880), one coefficient for each task vector and tensor; Tang et al. (arXiv
        2312.06173) for masks of entries. Masks of rows, columns and components are this package's: they keep
        the rank.
    """

    full_precision: ClassVar[tuple[str, ...]] = (
        "coefficients", "mask_out", "mask_rank", "mask_in", "mask_entries",
    )  # fmt: skip
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
        self.temperature, self.noise = config.temperature, dict[str, Tensor]()
        dims = spec.shape.dims
        shapes: dict[str, Sequence[int]] = {"entries": dims} if config.mask == "entries" else {}
        if config.mask == "structured":
            shapes = {"out": dims[:1], "rank": (spec.rank,), "in": dims[1:]}
        self.masks = tuple(shapes)
        for name, sizes in shapes.items():
            self.register_parameter(f"mask_{name}", nn.Parameter(torch.empty(*sizes, dtype=torch.float32)))

    @classmethod
    def shared(cls, config: CompositionConfig, specs: Sequence[Any]) -> Coefficients | None:
        """Make the coefficients of the adapters, if all modules have the same."""
        return Coefficients(max(1, len(config.adapters)), config.start) if config.per == "task" else None

    def factors(self) -> tuple[Tensor, ...]:
        """Return `[L_1 … L_T] diag(c)` and `[R_1; …; R_T]`, masked; with a mask of entries their product."""
        values = self.shared_tensors() if self.coefficients is None else self.coefficients
        values = values.to(self.left.dtype)
        c = torch.cat([values[t : t + 1].expand(rank) for t, rank in enumerate(self.ranks)])
        if "entries" in self.masks:
            return (multiply((self.left * c, self.right)) * self.mask("entries"),)
        if not self.masks:
            return self.left * c, self.right
        return self.mask("out")[:, None] * self.left * (c * self.mask("rank")), self.right * self.mask("in")

    def logits(self, name: str) -> Any:
        """`x` of a mask."""
        return getattr(self, f"mask_{name}")

    def mask(self, name: str) -> Tensor:
        """`σ((x + logit u) / temperature)`, by its mean."""
        logits = self.logits(name)
        if name in self.noise:
            logits = logits + self.noise[name]
        values = (logits / self.temperature).sigmoid()
        return values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)

    def draw(self, generator: torch.Generator) -> None:
        """Sample the masks, until `noise` is cleared."""
        for name in self.masks:
            u = torch.rand(self.logits(name).shape, generator=generator)
            self.noise[name] = u.logit(eps=1e-6).to(self.logits(name))

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Start the coefficients; the factors are random until those of adapters take their place."""
        self.left.normal_(std=max(1, self.spec.rank) ** -0.5, generator=generator)
        self.right.normal_(std=self.random_std, generator=generator)
        if self.coefficients is not None:
            _start(self.coefficients, self.start, init_weights, generator)
        for name in self.masks:
            _start(self.logits(name), 0.0, init_weights, generator)

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
    parameter: nn.Parameter, start: float, init_weights: bool | str, generator: torch.Generator
) -> None:
    if init_weights is False:
        parameter.data.normal_(generator=generator)
    else:
        parameter.data.fill_(start)
