"""Sum of one layer's weight gradients, taken from its activations.

The gradient of a weight is a sum of outer products of output gradients and inputs. Both pass through the
layer, so a hook on the layer sees them, and the weight may be frozen, quantized, or not readable at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.target import Target


class GradientSum:
    """Sum of the gradients of one layer's base weight, over all its calls.

    Args:
        layer: The layer, or a target that is not adapted; `hook` is to be registered on its base layer.
        offload: Whether the sum is kept in host memory.

    Attributes:
        total: Sum `(out, in, *kernel)` in fp32; None until the first gradient.
    """

    def __init__(self, layer: SubspaceLayer | Target, offload: bool) -> None:
        self.kind, self.base, self.offload = layer.kind, layer.get_base_layer(), offload
        self.total: Tensor | None = None
        self.busy = False

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Forward hook of the base layer: replaces its output by one whose gradient is added to the sum."""
        if self.busy or not torch.is_grad_enabled():
            return None
        # Where nothing upstream requires a gradient, the anchor makes the output do so.
        anchor = torch.empty((), device=output.device, requires_grad=True)
        return _Tap.apply(output, args[0].detach(), anchor, self)

    @torch.no_grad()
    def add(self, x: Tensor, grad_output: Tensor) -> None:
        """Add the gradient of one call of the layer."""
        device = grad_output.device
        if self.total is None:
            self.total = torch.zeros(self.kind.shape.dims, device="cpu" if self.offload else device)
        apart = self.total.device != device
        target = torch.zeros_like(self.total, device=device) if apart else self.total
        self.busy = True  # adding may call the layer once more
        try:
            with torch.autocast(device.type, enabled=False):
                self.kind.add_weight_gradient(target, self.base, x.to(device), grad_output)
        finally:
            self.busy = False
        if apart:
            self.total += target.cpu()


class _Tap(torch.autograd.Function):
    """Identity that hands its gradient and the layer's input to a `GradientSum` in the backward pass.

    The input goes through `save_for_backward`, so that gradient checkpointing and offloading apply to it. The
    output is a copy, because the model may go on to change it in place.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, receiver: GradientSum) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receiver = receiver
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.receiver.add(*ctx.saved_tensors, grad_output)
        return grad_output, None, None, None
