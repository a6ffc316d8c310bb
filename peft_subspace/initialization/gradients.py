"""Mean gradients of the base weights of several layers, over batches of data."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from peft_subspace.initialization.batches import Batches
from peft_subspace.initialization.evaluating import device_of, evaluating
from peft_subspace.initialization.gradient_sum import GradientSum
from peft_subspace.initialization.loss import LossFunction, check_loss
from peft_subspace.initialization.memory import batch_numel, groups_within, measured_input_bytes
from peft_subspace.runtime import distributed as processes
from peft_subspace.runtime.progress import bar
from peft_subspace.tuner.layer import SubspaceLayer

Gradients = Generator[tuple[str, Tensor], None, None]
"""Module names with mean gradients, one after the other."""


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

    def means(self, model: nn.Module, batches: Batches, *, progress: bool) -> Gradients:
        """Yield name and mean gradient of each layer, `(out, in, *kernel)` in fp32.

        A layer that no sample reached has the mean gradient zero.
        """
        with evaluating(model, list(self.layers.values()), self.adapter_name):
            device = device_of(model)
            with processes.raise_in_all_processes(device, "planning the passes"):
                groups = self._groups(model, batches.items, device)
            with bar(len(groups) * len(batches.items), "gradients", hidden=not progress) as shown:
                for group in groups:
                    sums = {name: GradientSum(self.layers[name], self.offload) for name in group}
                    with processes.raise_in_all_processes(device, "taking gradients"):
                        self._run(model, sums.values(), batches, device, shown)
                    for name in group:
                        yield name, self._mean(sums.pop(name), device, batches.total)

    def _groups(self, model: nn.Module, batches: Sequence[Any], device: torch.device) -> list[list[str]]:
        """Groups of layers that a pass over the batches takes gradients of; one, if memory has no limit."""
        if self.max_memory is None or not batches:  # without batches here, other processes have some
            return [list(self.layers)]
        batch = send_to_device(max(batches, key=batch_numel), device)
        input_bytes = measured_input_bytes(self.layers, lambda: self.loss_fn(model, batch))
        return groups_within(self.max_memory, self.layers, self.adapter_name, input_bytes)

    def _run(
        self,
        model: nn.Module,
        sums: Iterable[GradientSum],
        batches: Batches,
        device: torch.device,
        shown: Any,
    ) -> None:
        """Run forward and backward passes over all batches, in which the gradients of one group add up."""
        handles = [receiver.base.register_forward_hook(receiver.hook) for receiver in sums]
        try:
            for number, (batch, weight) in enumerate(zip(batches.items, batches.weights, strict=True)):
                with torch.enable_grad():
                    loss = self.loss_fn(model, send_to_device(batch, device))
                    check_loss(loss, number)
                    (loss * weight).backward()
                shown.update()
        finally:
            for handle in handles:
                handle.remove()

    def _mean(self, gradient_sum: GradientSum, device: torch.device, weight: float) -> Tensor:
        """Weighted mean over the batches of all processes."""
        total = gradient_sum.total
        if total is None:
            total = torch.zeros(gradient_sum.kind.shape.dims, device="cpu" if self.offload else device)
        if processes.world_size() > 1:
            total = processes.total(total.to(device)).to(total.device)
        return total.div_(weight)
