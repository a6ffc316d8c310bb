"""Sum of one layer's weight gradients, taken from its activations.

The gradient of a weight is a sum of outer products of output gradients and inputs. Both pass through the
layer, so a hook on the layer sees them, and the weight may be frozen, quantized, or not readable at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from peft_subspace.layers.calls import outputs_in, takes_gradient
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

    def hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of the base layer: replaces its output by one whose gradient is added to the sum."""
        if self.busy or not torch.is_grad_enabled():
            return None
        # Where nothing upstream requires a gradient, the anchor makes the output do so.
        outputs = outputs_in(output)
        anchor = torch.empty((), device=outputs[0].device, requires_grad=True)
        taps = iter(_Tap.apply(args[0].detach(), anchor, self, *outputs))
        return tree_map(lambda leaf: next(taps) if takes_gradient(leaf) else leaf, output)

    @torch.no_grad()
    def add(self, x: Tensor, *grad_outputs: Tensor) -> None:
        """Add the gradient of one call of the layer."""
        device = grad_outputs[0].device
        if self.total is None:
            self.total = torch.zeros(self.kind.shape.dims, device="cpu" if self.offload else device)
        apart = self.total.device != device
        target = torch.zeros_like(self.total, device=device) if apart else self.total
        self.busy = True  # adding may call the layer once more
        try:
            with torch.autocast(device.type, enabled=False):
                self.kind.add_weight_gradient(target, self.base, x.to(device), *grad_outputs)
        finally:
            self.busy = False
        if apart:
            self.total += target.cpu()


class _Tap(torch.autograd.Function):
    """Identity that hands its gradients and the layer's input to a `GradientSum` in the backward pass.

    The input goes through `save_for_backward`, so that gradient checkpointing and offloading apply to it. The
    outputs are copies, because the model may go on to change them in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, receiver: GradientSum, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.receiver = receiver
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        ctx.receiver.add(*ctx.saved_tensors, *grad_outputs)
        return None, None, None, *grad_outputs
