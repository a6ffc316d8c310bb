"""Mean gradients of base weights, taken from activations.

The gradient of a weight is a sum of outer products of output gradients and inputs. Both pass through the
layer, so hooks on the layer see them, and the weight may be frozen, quantised, or not readable at all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from accelerate.utils import find_batch_size, send_to_device
from torch import Tensor, nn

from peft_subspace.core.delta import Delta
from peft_subspace.core.validation import invalid
from peft_subspace.initialization.evaluating import evaluating, read_batches
from peft_subspace.runtime import distributed as processes
from peft_subspace.runtime.progress import bar
from peft_subspace.tuner.layer import SubspaceLayer

LossFunction = Callable[[nn.Module, Any], Tensor]


Gradients = Generator[tuple[str, Tensor], None, None]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Loss that a model returns for a batch with labels.

    Raises:
        ValueError: If it returns none.
    """
    outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(
            "the model returned no loss for the batch; give batches with labels, or a loss_fn(model, batch)"
        )
    return loss


class _Tap(torch.autograd.Function):
    """Identity that hands its gradient, with the layer's input, to a `_GradientSum` on the way back.

    The input goes through `save_for_backward`, so that gradient checkpointing and offloading apply to it. The
    output is a copy, because the model may go on to change it in place.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, receiver: _GradientSum) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receiver = receiver
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.receiver.add(*ctx.saved_tensors, grad_output)
        return grad_output, None, None, None


class _GradientSum:
    """Sum of one layer's weight gradients; None until the first one."""

    def __init__(self, layer: SubspaceLayer, offload: bool) -> None:
        self.ops, self.base, self.offload = layer.ops, layer.get_base_layer(), offload
        self.total: Tensor | None = None
        self.busy = False

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Forward hook of the layer: its output, tapped."""
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
            self.total = torch.zeros(self.ops.shape.dims, device="cpu" if self.offload else device)
        apart = self.total.device != device
        target = torch.zeros_like(self.total, device=device) if apart else self.total
        self.busy = True  # adding may call the layer once more
        try:
            with torch.autocast(device.type, enabled=False):
                self.ops.add_weight_gradient(target, self.base, x.to(device), grad_output)
        finally:
            self.busy = False
        if apart:
            self.total += target.cpu()


class GradientEstimate:
    """Mean gradients of the base weights of some layers.

    Args:
        layers: The layers, by module name.
        adapter_name: Adapter without which the model is differentiated.
        loss_fn: Mean loss of a batch's samples.
        max_memory: Most bytes to use beyond a pass through the model; None for no limit.
        offload: Whether to keep the sums in host memory.
    """

    def __init__(
        self,
        layers: Mapping[str, SubspaceLayer],
        adapter_name: str,
        loss_fn: LossFunction,
        max_memory: int | None,
        offload: bool,
    ) -> None:
        self.layers, self.adapter_name, self.loss_fn = layers, adapter_name, loss_fn
        self.max_memory, self.offload = max_memory, offload

    def means(
        self, model: nn.Module, dataloader: Iterable[Any], num_batches: int | None, *, progress: bool
    ) -> Gradients:
        """Yield name and mean gradient, `(out, in, *kernel)` in fp32, of each layer; zeros if unreached."""
        with evaluating(model, list(self.layers.values()), self.adapter_name):
            device = next(model.parameters()).device
            with processes.raise_in_all_processes(device, "reading the batches"):
                batches = read_batches(dataloader, num_batches)
                sizes = [find_batch_size(batch) or 1 for batch in batches]
            samples = int(processes.total(torch.tensor(float(sum(sizes)), device=device)))
            if not samples:
                raise ValueError("the dataloader is empty; give it at least one batch")
            groups = [list(self.layers)]
            if self.max_memory is not None:
                with processes.raise_in_all_processes(device, "planning the passes"):
                    groups = self._groups(model, batches, device)
            with bar(len(groups) * len(batches), "gradients", hidden=not progress) as shown:
                for group in groups:
                    sums = {name: _GradientSum(self.layers[name], self.offload) for name in group}
                    with processes.raise_in_all_processes(device, "taking gradients"):
                        self._run(model, sums.values(), batches, sizes, device, shown)
                    for name in group:
                        yield name, self._mean(sums.pop(name), device, samples)

    def _run(
        self,
        model: nn.Module,
        sums: Iterable[_GradientSum],
        batches: Sequence[Any],
        sizes: Sequence[int],
        device: torch.device,
        shown: Any,
    ) -> None:
        """Send all batches through the model and back, and let the layers of one group add up."""
        handles = [receiver.base.register_forward_hook(receiver.hook) for receiver in sums]
        try:
            for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
                with torch.enable_grad():
                    loss = self.loss_fn(model, send_to_device(batch, device))
                    _check_loss(loss, number)
                    (loss * size).backward()
                shown.update()
        finally:
            for handle in handles:
                handle.remove()

    def _mean(self, gradient_sum: _GradientSum, device: torch.device, samples: int) -> Tensor:
        total = gradient_sum.total
        if total is None:
            total = torch.zeros(gradient_sum.ops.shape.dims, device="cpu" if self.offload else device)
        if processes.world_size() > 1:
            total = processes.total(total.to(device)).to(total.device)
        return total.div_(samples)

    def _groups(self, model: nn.Module, batches: Sequence[Any], device: torch.device) -> list[list[str]]:
        """Split the layers into consecutive groups whose sums and inputs fit into memory together.

        The new adapter tensors, and what an SVD needs, are set aside first.
        """
        if not batches:  # other processes have some
            return [list(self.layers)]
        input_bytes = self._input_bytes(model, send_to_device(max(batches, key=_numel), device))
        budget = self.max_memory or 0
        sums = {name: 4 * prod(layer.ops.shape.dims) for name, layer in self.layers.items()}
        results = sum(_bytes(layer.deltas[self.adapter_name]) for layer in self.layers.values())
        aside = results + max(sums[name] + 2 * input_bytes.get(name, 0) for name in sums)
        needed = {name: sums[name] + input_bytes.get(name, 0) for name in sums}
        largest = max(needed, key=lambda name: needed[name])
        if aside + needed[largest] > budget:
            raise invalid(
                "max_memory", budget, f"bytes are too few for {largest!r}; give {aside + needed[largest]}"
            )
        groups: list[list[str]] = [[]]
        used = aside
        for name, size in needed.items():
            if used + size > budget:
                groups.append([])
                used = aside
            groups[-1].append(name)
            used += size
        return groups

    def _input_bytes(self, model: nn.Module, batch: Any) -> dict[str, int]:
        """Bytes of each layer's inputs, which are kept until its gradient is taken.

        Layers that are called with one tensor in turn, such as the projections of an attention, share it.
        """
        kept: dict[str, int] = {}
        last: list[Tensor | None] = [None]

        def watch(name: str, x: Tensor) -> None:
            if x is not last[0]:
                kept[name] = kept.get(name, 0) + x.nbytes
            last[0] = x

        handles = [
            layer.get_base_layer().register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
            for name, layer in self.layers.items()
        ]
        try:
            with torch.no_grad():
                self.loss_fn(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return kept


def _check_loss(loss: Any, number: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError("loss_fn must return a tensor with one entry, the mean loss of the batch's samples")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {number} has no gradient: no adapted module takes part in it, or loss_fn "
            "detaches it"
        )
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of batch {number} is {loss.item()}; look for broken samples")


def _numel(batch: Any) -> int:
    """Entries of all tensors of a batch."""
    if isinstance(batch, Tensor):
        return batch.numel()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return sum(_numel(part) for part in parts)


def _bytes(delta: Delta) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in delta.state_dict().values())
