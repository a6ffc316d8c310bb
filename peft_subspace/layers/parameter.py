"""An update of a parameter: a matrix, a stack of them, as in fused experts, or one with more axes."""

from __future__ import annotations

from torch import Tensor, nn

from peft_subspace.core.shapes import WeightShape
from peft_subspace.layers.base import LayerKind


class ParameterKind(LayerKind):
    """A matrix `(out, in)`, a stack of them, `(experts, out, in)`, or `(out, in, *kernel)`.

    A stack's update is `(out, in, experts)`: the experts are one more axis, like those of a kernel. A
    transposed stack is `(experts, in, out)`.
    """

    dropout_cls = None

    def __init__(self, shape: WeightShape, *, transposed: bool = False) -> None:
        super().__init__(shape, has_custom_forward=True)
        self.transposed = transposed

    def from_layout(self, weight: Tensor) -> Tensor:
        """Put the experts last."""
        if self.shape.lookup_axis is None:
            return weight
        return weight.permute(2, 1, 0) if self.transposed else weight.permute(1, 2, 0)

    def to_layout(self, delta: Tensor) -> Tensor:
        """Put the experts first."""
        if self.shape.lookup_axis is None:
            return delta
        return delta.permute(2, 1, 0) if self.transposed else delta.permute(2, 0, 1)


def parameter_kind(base: nn.Module, name: str) -> ParameterKind:
    """Kind of a parameter; the module's `is_transposed`, if it has one, tells the order of a stack.

    Raises:
        TypeError: If the parameter is quantized.
        ValueError: If it is a vector.
    """
    parameter = getattr(base, name)
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise TypeError(
            f"it is quantized ({parameter.dtype}), and only its module can read it; load the base model "
            "unquantized, or leave it out of target_parameters"
        )
    if is_vector(parameter):
        raise ValueError(
            f"it has shape {tuple(parameter.shape)}, a vector, and adapted are parameters with two axes "
            "or more; leave it out of target_parameters"
        )
    if parameter.ndim != 3:
        out, into, *kernel = parameter.shape
        return ParameterKind(WeightShape(out, into, tuple(kernel)))
    transposed = bool(getattr(base, "is_transposed", False))
    experts, *sides = parameter.shape
    into, out = sides if transposed else reversed(sides)
    return ParameterKind(WeightShape(out, into, (experts,), lookup_axis=2), transposed=transposed)


def is_vector(tensor: Tensor) -> bool:
    """Whether a tensor has no more than one axis, but for those of size one."""
    return sum(size > 1 for size in tensor.shape) < 2 and tensor.ndim != 2
