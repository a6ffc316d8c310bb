"""An update of a parameter that is a matrix, or a stack of them, as in fused experts."""

from __future__ import annotations

from torch import Tensor, nn

from peft_subspace.core.shapes import WeightShape
from peft_subspace.layers.base import LayerKind


class ParameterKind(LayerKind):
    """A matrix `(out, in)`, or a stack of them, `(experts, out, in)`, or `(experts, in, out)` if transposed.

    A stack's update is `(out, in, experts)`: the experts are one more axis, like those of a kernel.
    """

    dropout_cls = None

    def __init__(self, shape: WeightShape, *, transposed: bool = False) -> None:
        super().__init__(shape, has_custom_forward=True)
        self.transposed = transposed

    def from_layout(self, weight: Tensor) -> Tensor:
        """Put the experts last."""
        if not self.shape.kernel_size:
            return weight
        return weight.permute(2, 1, 0) if self.transposed else weight.permute(1, 2, 0)

    def to_layout(self, delta: Tensor) -> Tensor:
        """Put the experts first."""
        if not self.shape.kernel_size:
            return delta
        return delta.permute(2, 1, 0) if self.transposed else delta.permute(2, 0, 1)


def parameter_kind(base: nn.Module, name: str) -> ParameterKind:
    """Kind of a parameter; the module's `is_transposed`, if it has one, tells the order of a stack.

    Raises:
        TypeError: If the parameter is quantized.
        ValueError: If it has not two or three axes.
    """
    parameter = getattr(base, name)
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise TypeError(
            f"it is quantized ({parameter.dtype}), and only its module can read it; load the base model "
            "unquantized, or leave it out of target_parameters"
        )
    if parameter.ndim == 2:
        return ParameterKind(WeightShape(*parameter.shape))
    if parameter.ndim != 3:
        raise ValueError(
            f"it has shape {tuple(parameter.shape)}, and only matrices and stacks of them can be adapted; "
            "leave it out of target_parameters"
        )
    transposed = bool(getattr(base, "is_transposed", False))
    experts, *sides = parameter.shape
    into, out = sides if transposed else reversed(sides)
    return ParameterKind(WeightShape(out, into, (experts,), lookup_axis=2), transposed=transposed)
