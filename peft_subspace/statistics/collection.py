"""The pass over data that gathers statistics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_subspace.core.errors import error_context
from peft_subspace.core.modes import lasting
from peft_subspace.core.validation import check_count, invalid
from peft_subspace.initialization.batches import Batches
from peft_subspace.initialization.evaluating import device_of
from peft_subspace.initialization.from_gradient import unwrap
from peft_subspace.initialization.gradient_sum import GradientSum
from peft_subspace.initialization.loss import LossFunction, check_loss, model_loss
from peft_subspace.runtime import distributed as processes
from peft_subspace.statistics import passes
from peft_subspace.statistics.layers import Watched, empty_sums, watched_layers
from peft_subspace.statistics.moment import Rows, SecondMoment
from peft_subspace.statistics.record import KINDS, Statistics


@lasting()
def collect(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    inputs: bool | Literal["norms"] = True,
    gradients: bool = False,
    target_modules: list[str] | str | None = None,
    num_batches: int | None = None,
    loss_fn: LossFunction | None = None,
    max_memory: int | str | None = None,
    offload: bool = False,
    progress: bool = True,
) -> Statistics:
    """Gather second moments of what layers get, and of the gradients that reach them, in one pass over data.

    The model runs in evaluation mode with its active adapters, and is left as it was, like the loader and all
    random generators. The weights are not read, so that they may be quantized or offloaded. A convolution's
    rows are the windows of its kernel, by its own stride, padding and dilation; groups share columns. Padding
    (`attention_mask`) does not count. Sums are taken in fp32 (in fp64 for a model in fp64), over the batches
    of all processes if `torch.distributed` is initialized.

    Args:
        model: Model, with adapters or without.
        dataloader: Batches, which are kept in memory: keyword arguments of the model, or its only one.
        inputs: Whether to gather those of inputs, `XᵀX (n, n)`; `"norms"` for their diagonal alone.
        gradients: Whether to gather those of gradients of outputs, `gᵀg (m, m)`, and of the weight's mean
            gradient in each batch, `Σ G Gᵀ (m, m)`, which takes a backward pass.
        target_modules: Layers to watch, as in a config; by default those with adapters of this package, else
            all linear ones.
        num_batches: Batches to read; `None` for all.
        loss_fn: Function of model and batch that runs the model, and returns the mean loss of the batch's
            samples where gradients are asked for; by default the loss that the model returns.
        max_memory: Most bytes for all sums, as a number or a string such as `"2GB"`. Sums that do not fit are
            replaced by sketches, of the largest width for which all fit.
        offload: Whether to keep the sums in host memory.
        progress: Whether to show a progress bar.

    Returns:
        The statistics, by the names that modules have in the base model.

    Raises:
        TypeError: If an argument has the wrong type, or a layer that was named multiplies no rows.
        ValueError: If there are no data or no such layers, `max_memory` is too little, or values are not
            finite.

    Warns:
        UserWarning: If no input reached some of the layers; they are left out.
    """
    if inputs not in (True, False, "norms"):
        raise invalid("inputs", inputs, 'must be True, False or "norms"', TypeError)
    if not (inputs or gradients):
        raise invalid("inputs", inputs, "leaves nothing to gather; set gradients=True, or inputs=True")
    if num_batches is not None:
        check_count("num_batches", num_batches)
    model = unwrap(model)
    layers = watched_layers(model, target_modules)
    device = device_of(model)
    sums = empty_sums(layers, inputs, gradients, max_memory, "cpu" if offload else device)
    batches = Batches.of_samples(dataloader, num_batches, device)
    with processes.raise_in_all_processes(device, "gathering statistics"):
        _gather(model, layers, sums, batches.items, loss_fn, progress=progress)
    return _summed(sums, device)


class _Inputs:
    """Adds the inputs of a layer to a moment; layers that are called with one tensor share its products."""

    def __init__(self, layer: Watched, moment: SecondMoment, padding: passes.Padding, shared: dict) -> None:
        self.kind, self.base, self.moment = layer.kind, layer.get_base_layer(), moment
        self.padding, self.shared = padding, shared

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of the base layer, which may run once more in the backward pass."""
        if not self.shared["forward"]:
            return
        x = args[0].detach()
        key = (x.data_ptr(), x.shape, x.stride(), x._version) if self.kind.linear else None
        if key is None or self.shared.get("key") != key:
            self.shared.update(key=key, x=x, rows=Rows(self._rows(x)))
        with torch.autocast(x.device.type, enabled=False):
            self.moment.add(self.shared["rows"])

    def _rows(self, x: Tensor) -> Tensor:
        return self.kind.input_rows(self.base, self.padding.without(x) if self.kind.linear else x)


class _Gradients(GradientSum):
    """Adds the gradients that reach a layer to two moments: of its outputs, and of its weight in a batch."""

    def __init__(self, layer: Watched, sums: Statistics, name: str, padding: passes.Padding) -> None:
        super().__init__(layer, offload=False)
        self.sums, self.name, self.padding = sums, name, padding

    def add(self, x: Tensor, *grad_outputs: Tensor) -> None:
        """Add the gradient of one call of the layer."""
        super().add(x, *grad_outputs)
        rows = grad_outputs[0]
        if self.kind.linear:
            rows = self.padding.without(rows).reshape(-1, rows.shape[-1])
        else:
            axis = rows.ndim - 1 - len(self.kind.shape.kernel_size)
            rows = rows.movedim(axis, -1).reshape(-1, rows.shape[axis])
        self.sums.output_gradients[self.name].add(Rows(rows))

    def end_batch(self) -> None:
        """Add the gradient of the batch."""
        if self.total is not None:
            self.sums.gradients[self.name].add(Rows(self.total.flatten(1).T))
        self.total = None


def _gather(
    model: nn.Module,
    layers: Mapping[str, Watched],
    sums: Statistics,
    batches: list[Any],
    loss_fn: LossFunction | None,
    *,
    progress: bool,
) -> None:
    padding, shared = passes.Padding(), dict[str, Any]()
    receivers = [_Gradients(layers[name], sums, name, padding) for name in sums.gradients]
    hooks: list[tuple[nn.Module, passes.Hook]] = [(one.base, one.hook) for one in receivers]
    for name, moment in sums.inputs.items():
        seen = _Inputs(layers[name], moment, padding, shared)
        hooks.append((seen.base, seen.hook))
    step, count = loss_fn or (model_loss if receivers else passes.forward), iter(range(len(batches)))

    def run(model: nn.Module, batch: Any) -> None:
        shared.clear()
        shared["forward"] = True
        result = step(model, batch)
        shared["forward"] = False
        if receivers:
            check_loss(result, next(count))
            result.backward()
        for one in receivers:
            one.end_batch()

    passes.run(model, batches, hooks, padding, run, gradients=bool(receivers), hidden=not progress)


def _summed(sums: Statistics, device: torch.device) -> Statistics:
    """The statistics of all processes, without layers that no input reached.

    Raises:
        ValueError: If values are not finite, or no layer was reached.
    """
    unreached = set()
    for kind in KINDS:
        of = getattr(sums, kind)
        for name, moment in list(of.items()):
            home = moment.squares.device
            moment = moment.to(device)
            moment.total()
            of[name] = moment.to(home)
            with error_context(name):
                if not torch.isfinite(moment.squares).all():
                    raise ValueError(f"{kind} have NaN or infinite values; look for broken samples")
            if not moment.rows:
                unreached.add(name)
                del of[name]
    if not sums.modules:
        raise ValueError(f"no sample reached any of {sorted(unreached)}, so there is nothing to gather")
    if unreached:
        warnings.warn(f"no input reached {sorted(unreached)}; they are left out", stacklevel=3)
    return sums
