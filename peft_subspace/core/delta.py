"""The abstraction: an update of one weight, and the chain `ΔW = F1 F2 … Fn` that most updates are.

A method is one subclass. What it must, should and may define is said in the two classes; all else (forward
passes, merging, saving, LoRA export, sums, spectra) is derived from `update` or `factors` elsewhere:

    class LoRA(Delta):
        def __init__(self, config, spec):
            super().__init__(config, spec)
            self.B = nn.Parameter(torch.empty(spec.shape.out_features, spec.rank))
            self.A = nn.Parameter(torch.empty(spec.rank, *spec.shape.dims[1:]))

        def factors(self):
            return self.B, self.A
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_subspace.core.chain import multiply
from peft_subspace.core.lean import UNLOADED, LeanModule
from peft_subspace.core.precision import apply_keeping_fp32
from peft_subspace.core.shapes import ModuleSpec

FINGERPRINT = 6
"""Numbers in the fingerprint of a base weight."""

Combined = tuple[dict[str, Any], dict[str, Tensor]]
"""Entries for a config's patterns, such as `{"rank_pattern": 8}`, and the state of an update."""

ReadWeight = Callable[[], Tensor]
"""Returns the base weight, `(out, in, *kernel)` in fp32."""


class Update(LeanModule, ABC):
    """Tensors of one adapter on one weight, and the update `ΔW` that they make of it.

    Parameters train; buffers are frozen, persistent, and stay fp32 in casts to less. An update knows nothing
    of adapter names, base layers, devices, quantization or PEFT.

    Args:
        config: Configuration of the method.
        spec: What the config asks for on this weight.

    Attributes:
        reads_weight: Whether the initialization depends on the base weight; an instance may decide.
        from_gradient: Names of the tensors that `state_from_gradient` gives, if any; an instance may decide.
        needs_weight: Whether nothing can take the weight's place there, so that a weight that cannot be read
            is an error. Such an adapter belongs to its base weight: it carries a fingerprint of it.
        can_keep_zeros: Whether `ΔW ⊙ (W ≠ 0)` has what the method promises of `ΔW`.
        full_precision: Names of parameters that stay fp32 as well.
        shared_name: Name, in files, of the tensors that all layers of an adapter share.
        random_std: Root mean square of the entries of `ΔW` that `init_weights=False` asks for.
        keeps_zeros: Whether the update is `ΔW ⊙ (W ≠ 0)`.
        initialized: Whether the tensors are from a file or from data: nothing replaces them unasked.
        frozen: Whether nothing trains even while the adapter is active.
        awaits: What is lacking before it may train, and what to do about it; None if nothing is.
        penalty_weights: Weights of the loss terms by name.
        penalized_at: Version of the parameters at the last gradient of loss terms; -1 after its step.
    """

    reads_weight: bool = False
    from_gradient: tuple[str, ...] = ()
    needs_weight: ClassVar[bool] = False
    can_keep_zeros: ClassVar[bool] = True
    full_precision: ClassVar[tuple[str, ...]] = ()
    shared_name: ClassVar[str] = "shared"
    fingerprint: Tensor
    awaits: tuple[str, str] | None = None
    penalized_at: int | None = None
    _shared: tuple[Any, str] = ({}, "")  # a tuple hides modules from torch: one place alone holds them

    def __init__(self, config: Any, spec: ModuleSpec) -> None:
        super().__init__(for_inference=config.for_inference)
        self.spec, self.shape, self.random_std = spec, spec.shape, spec.shape.random_std
        self.keeps_zeros = bool(config.keep_zeros)
        self.initialized, self.frozen = bool(config.initialized), bool(config.frozen)
        self.penalty_weights: dict[str, float] = config.penalty_weights
        if self.needs_weight:
            self.register_buffer("fingerprint", torch.zeros(FINGERPRINT, dtype=torch.float32))

    @abstractmethod
    def update(self, weight: ReadWeight) -> Tensor:
        """Return `ΔW`, `(out, in, *kernel)`, for a base weight that `weight()` reads."""

    def chain(self, weight: ReadWeight) -> tuple[Tensor, ...]:
        """`ΔW` as a chain of factors; here of one."""
        return (self.update(weight),)

    def forward(self, weight: ReadWeight) -> tuple[Tensor, ...]:
        """The chain; called as a module, so that hooks which fetch the tensors run."""
        factors = self.chain(weight)
        if self.keeps_zeros:
            factors = (self.confined(multiply(factors), weight),)
        return tuple(factor.clone() for factor in factors) if self.is_fetched else factors

    def confined(self, update: Tensor, weight: ReadWeight) -> Tensor:
        """`update ⊙ (W ≠ 0)`, `(out, in, *kernel)`, if zeros are kept; of a gradient, what it can move."""
        return update.masked_fill((weight() == 0).to(update.device), 0.0) if self.keeps_zeros else update

    @property
    def has_factors(self) -> bool:
        """Whether the chain is made of the update's own tensors, whatever the base weight is."""
        return isinstance(self, Delta) and not self.keeps_zeros

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Fill the parameters in place; `init_weights=False` asks for a random update, `random_std`."""
        raise NotImplementedError

    def reset_from_weight(self, weight: Tensor) -> None:
        """Initialize from the base weight, `(out, in, *kernel)` in fp32, where `reads_weight` is set."""
        raise NotImplementedError

    def speed(self) -> float | None:
        """Norm by which AdamW's first step moves `ΔW`, per learning rate (`speed.py`); None if unknown."""
        return None

    def can_do_without_weight(self, config: Any) -> bool:
        """Whether the base weight may be left out: it has a substitute, and was not asked for."""
        return not self.needs_weight and config.init_weights is True

    def check_weight(self, weight: Tensor) -> None:
        """Raise unless `reset_from_weight` can do with this weight, given as its layer stores it.

        Raises:
            ValueError: If it is not finite.
        """
        if not torch.isfinite(weight).all():
            raise ValueError("the weight has NaN or infinite values; load a sound checkpoint, or exclude it")

    def check_values(self, state: Mapping[str, Tensor]) -> None:
        """Raise a ValueError naming the tensor unless values to be loaded, of right shapes, are possible."""

    def state_from_gradient(
        self, gradient: Tensor, learning_rate: float, scaling: float
    ) -> dict[str, Tensor]:
        """Return the state that a mean gradient of the weight, `(out, in, *kernel)` in fp32, leads to.

        `gradient` may be overwritten.

        Raises:
            NotImplementedError: If the method does not start from gradients.
        """
        raise NotImplementedError

    def on_training_step(self, adapter_name: str) -> bool:
        """Look at the adapter in a training step, on one of its layers; again in the next one if True."""
        return False

    def penalty(self, weight: ReadWeight) -> dict[str, Tensor]:
        """Return the unweighted loss terms, by name, of those that have a weight above zero."""
        return {}

    @classmethod
    def shared(cls, config: Any, specs: Sequence[ModuleSpec]) -> nn.Module | None:
        """Make the tensors that all layers of one adapter share, uninitialized; or None.

        The module has `reset_parameters(init_weights, generator_for)`, where `generator_for(name)` returns a
        generator of its own for each name, and flat names for its parameters.
        """
        return None

    @classmethod
    def defines(cls, name: str) -> bool:
        """Whether the method has a class method of its own, where `Update` has one that gives nothing."""
        return getattr(cls, name).__func__ is not vars(Update)[name].__func__

    def attach(self, holder: Any, name: str) -> None:
        """Set where the tensors are that this update shares with others: `holder[name]`, now and later."""
        self._shared = (holder, name)

    @property
    def shared_tensors(self) -> Any:
        """The module of tensors that this update shares; to be called, so that hooks which fetch them run."""
        holder, name = self._shared
        return holder[name]

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that have the tensors: the update, and what it shares."""
        return (self, self.shared_tensors) if self._shared[1] else (self,)

    def copy_frozen(self, source: Update) -> None:
        """Take over the frozen tensors of another update of the same config."""
        self.load_state_dict(dict(source.named_buffers()), strict=False)
        self.initialized, self.awaits = source.initialized, source.awaits

    @classmethod
    def concatenate(cls, deltas: Sequence[Any], weights: Sequence[float]) -> Combined:
        """Return config entries and state of one update that is `Σ weights[i] · deltas[i]`, exactly."""
        raise NotImplementedError

    @classmethod
    def product(cls, left: Tensor, right: Tensor, deltas: Sequence[Any]) -> Combined:
        """Return the same for the update `left · right`, `(out, k)` and `(k, in, *kernel)`, made of `deltas`.

        Where the method confines its updates, it is the nearest one that is allowed.
        """
        raise NotImplementedError

    @classmethod
    def average(cls, deltas: Sequence[Any], weights: Sequence[float]) -> Combined:
        """Return the same for an update of the same rank; ValueError if these have no such sum."""
        raise NotImplementedError

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Load what `concatenate`, `average` or `product` returned."""
        self.load_state_dict(self.inference_state(state) if self.lean else state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.initialized = self.initialized or any(key.startswith(prefix) for key in state_dict)
        if self.awaits == UNLOADED and any(f"{prefix}{name}" in state_dict for name in self.frozen_in_files):
            self.awaits = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Update:
        apply_keeping_fp32(self, super()._apply, fn, self.full_precision)
        return self

    def extra_repr(self) -> str:
        """Shapes of the tensors, as a summary of the update."""
        tensors = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        return ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in tensors)


class Delta(Update):
    """An update that is a chain of matrices, `ΔW = F1 F2 … Fn`, whose forward pass never forms `ΔW`."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """Return the chain, left to right: first `(out, ·)`, last `(·, in)`.

        In a convolution's chain exactly one factor carries the kernel, `(·, ·, *kernel_size)`.
        """

    def update(self, weight: ReadWeight) -> Tensor:
        """Product of the chain."""
        return multiply(self.factors())

    def chain(self, weight: ReadWeight) -> tuple[Tensor, ...]:
        """The factors themselves."""
        return self.factors()
