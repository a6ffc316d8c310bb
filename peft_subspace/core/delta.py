"""The one abstraction: a weight update as a short chain of matrices, `ΔW = F1 F2 … Fn`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_subspace.core.shapes import WeightShape


class Delta(nn.Module, ABC):
    """Tensors of one adapter on one weight, and the equation that makes `ΔW` of them.

    Parameters train; buffers are frozen, persistent, and stay fp32 when the module is cast to less. A delta
    knows nothing of adapter names, base layers, devices, quantisation or PEFT.

    Args:
        config: Configuration of the method.
        shape: Shape of the adapted weight.
        rank: The config's `r`, or the entry of `rank_pattern` that applies to this module; of methods whose
            modules depend on each other, what `SubspaceModel.ranks` gives this one.

    Attributes:
        reads_weight: Whether the start depends on the base weight; an instance may decide for itself.
        needs_weight: Whether such a start has no substitute, so that a weight without one is an error.
        on_embeddings: Whether embeddings can be adapted.
        full_precision: Names of parameters that stay fp32 as well.
        combinations: What `add_weighted_adapter` can make of several such deltas, exactly.
        initialized: Whether the tensors come from a file or from data, so that nothing replaces them unasked.
    """

    reads_weight: bool = False
    needs_weight: ClassVar[bool] = False
    on_embeddings: ClassVar[bool] = True
    full_precision: ClassVar[tuple[str, ...]] = ()
    combinations: ClassVar[tuple[str, ...]] = ("cat",)

    def __init__(self, config, shape: WeightShape, rank) -> None:
        super().__init__()
        self.shape = shape
        self.rank = rank
        self.initialized: bool = config.initialized

    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """Return the chain, left to right: first `(out, ·)`, last `(·, in)`.

        Of a convolution's chain exactly one factor carries the kernel, `(·, ·, *kernel_size)`.
        """

    def forward(self) -> tuple[Tensor, ...]:
        """The chain; called as a module, so that hooks which fetch the tensors from elsewhere run."""
        return self.factors()

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Fill the parameters in place; `init_weights=False` asks for a start that changes the output."""
        raise NotImplementedError

    def reset_from_weight(self, weight: Tensor) -> None:
        """Initialise from the base weight, `(out, in, *kernel)` in fp32, where `reads_weight` is set."""
        raise NotImplementedError

    def can_do_without_weight(self, config) -> bool:
        """Whether a start may leave the base weight out: it has a substitute, and was not asked for."""
        return not self.needs_weight and config.init_weights is True

    def check_weight(self, weight: Tensor) -> None:
        """Raise unless `reset_from_weight` can do with this weight, given as its layer stores it.

        Raises:
            ValueError: If it is not finite.
        """
        if not torch.isfinite(weight).all():
            raise ValueError("the weight has NaN or infinite values; load a sound checkpoint, or exclude it")

    def check_values(self, state: dict[str, Tensor]) -> None:
        """Raise unless values that are about to be loaded are possible; shapes are right and all is finite.

        Raises:
            ValueError: Naming the tensor.
        """

    def state_from_gradient(
        self, gradient: Tensor, learning_rate: float, scaling: float
    ) -> dict[str, Tensor]:
        """Return the state that starts from a mean gradient of the weight, `(out, in, *kernel)` in fp32.

        `gradient` may be overwritten; the delta itself is not changed.

        Raises:
            NotImplementedError: If the method does not start from gradients.
        """
        raise NotImplementedError

    def copy_frozen(self, twin: Delta) -> None:
        """Take over the frozen tensors of another delta of the same config."""
        self.load_state_dict(dict(twin.named_buffers()), strict=False)
        self.initialized = twin.initialized

    @classmethod
    def concatenate(cls, deltas: Sequence[Delta], weights: Sequence[float]) -> tuple[Any, dict[str, Tensor]]:
        """Return rank and state of one delta whose update is `Σ weights[i] · deltas[i]`, exactly.

        Raises:
            NotImplementedError: If the method's chains cannot be concatenated within the method.
        """
        raise NotImplementedError

    @classmethod
    def average(cls, deltas: Sequence[Delta], weights: Sequence[float]) -> tuple[Any, dict[str, Tensor]]:
        """Return rank and state of one delta of the same rank whose update is `Σ weights[i] · deltas[i]`.

        Raises:
            ValueError: If these deltas have no such sum.
            NotImplementedError: If no deltas of the method have.
        """
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(key.startswith(prefix) for key in state_dict):
            self.initialized = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Delta:
        """Apply `fn` (a move, a cast, …), but take no buffer and nothing in `full_precision` below fp32."""

        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype == tensor.dtype or result.dtype.itemsize >= 4 or tensor.is_meta:
                return result
            return tensor.to(result.device)

        parameters, buffers = vars(self)["_parameters"], vars(self)["_buffers"]
        kept = {name: parameters[name] for name in parameters if name in self.full_precision}
        cast = {name: parameters[name] for name in parameters if name not in kept}
        try:
            self._parameters, self._buffers = kept, buffers
            super()._apply(move, recurse)
            self._parameters, self._buffers = cast, {}
            super()._apply(fn, recurse)
        finally:
            self._parameters, self._buffers = {n: {**kept, **cast}[n] for n in parameters}, buffers
        return self

    def extra_repr(self) -> str:
        """Shapes of the tensors, as a summary of the chain."""
        tensors = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        return ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in tensors)
