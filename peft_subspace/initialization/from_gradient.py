"""Initialization of adapters from the mean gradients of the weights that they adapt."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn

from peft_subspace.core.delta import Update
from peft_subspace.core.validation import check_count, check_number, invalid
from peft_subspace.initialization.batches import Batches
from peft_subspace.initialization.evaluating import device_of
from peft_subspace.initialization.gradient_cache import read_gradients, write_gradients
from peft_subspace.initialization.gradients import GradientEstimate
from peft_subspace.initialization.loss import LossFunction, model_loss
from peft_subspace.initialization.step_length import StepSearch, set_tensors
from peft_subspace.runtime import distributed as processes
from peft_subspace.runtime.engines import check_writable
from peft_subspace.runtime.progress import progress as shown
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer


def initialize_from_gradient(
    model: nn.Module,
    dataloader: Iterable[Any] | Batches,
    *,
    learning_rate: float | Literal["auto"] = "auto",
    adapter_name: str = "default",
    num_batches: int | None = 8,
    loss_fn: LossFunction | None = None,
    max_memory: int | str | None = None,
    offload: bool = False,
    cache: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Initialize an adapter from the first step of full fine-tuning, `−η · sign(g)`.

    The mean gradient `g` of the loss by each adapted weight is taken in evaluation mode, at the weights that
    the model has without this adapter; other adapters count if they are active together with it. Every sample
    has the same weight. If `torch.distributed` is initialized, each process reads its own batches, and all
    processes get the same tensors. Nothing of the model but the adapter is changed, and the adapter only at
    the end.

    Args:
        model: Model with the adapter, wrapped by PEFT or injected.
        dataloader: Batches to take gradients from, which are kept in memory; or `Batches` with weights.
        learning_rate: `η`. `"auto"` takes the one that lowers the loss of the batches most, found by at most
            eight forward passes; zero, with a warning, if none lowers it. A number, such as the first
            learning rate of full fine-tuning (1e-4 or less), saves these passes.
        adapter_name: Adapter to initialize.
        num_batches: Batches to read; `None` for all.
        loss_fn: Function of model and batch that returns the mean loss of the batch's samples; by default
            the loss that the model returns.
        max_memory: Most bytes to use beyond a pass through the model, as a number or a string such as
            `"2GB"`. Gradients are then taken for a part of the modules at a time, in several passes over the
            same batches.
        offload: Whether to keep the sums of gradients in host memory.
        cache: File of mean gradients. If it exists, it is read in place of the data; otherwise it is written.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the adapter is missing, merged or initialized already, there are no data, the loss has
            no gradient, a gradient is not finite, or `max_memory` is too little for one module.

    Warns:
        UserWarning: If no sample reached some of the modules; they keep the tensors that they have.
    """
    _check(learning_rate, num_batches)
    model = unwrap(model)
    layers = _fresh_layers(model, adapter_name)
    known = cache is not None and Path(cache).is_file()
    if not isinstance(dataloader, Batches):
        device = device_of(model)
        needed = not known or learning_rate == "auto"
        read = (dataloader, num_batches, device)
        dataloader = Batches.of_samples(*read) if needed else Batches([], [], 1.0)
    if known:
        gradients = read_gradients(Path(str(cache)), _shapes(layers))
    else:
        budget = None if max_memory is None else convert_file_size_to_int(max_memory)
        estimate = GradientEstimate(layers, adapter_name, loss_fn or model_loss, budget, offload)
        gradients = estimate.means(model, dataloader, progress=progress)
        if cache is not None and processes.rank() == 0:
            gradients = write_gradients(Path(cache), _shapes(layers), gradients)
    with closing(gradients):
        counted = shown(gradients, len(layers), "decomposing gradients", hidden=not progress)
        length = 1.0 if learning_rate == "auto" else float(learning_rate)
        states = _states_from(layers, adapter_name, counted, length)
    if learning_rate == "auto":
        search = StepSearch(model, layers, adapter_name, loss_fn or model_loss, dataloader)
        states = search.scaled(states, progress=progress)
    for name, layer in layers.items():
        set_tensors(layer.deltas[adapter_name], states.get(name, {}))
        layer.deltas[adapter_name].initialized = True


def _check(learning_rate: Any, num_batches: Any) -> None:
    if learning_rate != "auto":
        check_number("learning_rate", learning_rate, minimum=0.0)
        if learning_rate == 0:
            raise invalid("learning_rate", learning_rate, 'must be above zero, or "auto"')
    if num_batches is not None:
        check_count("num_batches", num_batches)


def _shapes(layers: Mapping[str, SubspaceLayer]) -> dict[str, tuple[int, ...]]:
    return {name: layer.kind.shape.dims for name, layer in layers.items()}


def is_initialized(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter was loaded, or initialized from gradients."""
    layers = adapted_layers(unwrap(model), adapter_name, SubspaceLayer).values()
    return any(layer.deltas[adapter_name].initialized for layer in layers)


def _fresh_layers(model: nn.Module, adapter_name: str) -> dict[str, SubspaceLayer]:
    """Layers with the adapter, after checking that it can be initialized on them."""
    layers = adapted_layers(model, adapter_name, SubspaceLayer)
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r} is no adapter of peft_subspace on this model")
    for name, layer in layers.items():
        delta = layer.deltas[adapter_name]
        if not delta.from_gradient:
            raise ValueError(
                f"adapter_name={adapter_name!r} is of a method that does not start from gradients"
            )
        if delta.awaits is not None:
            raise ValueError(f"adapter_name={adapter_name!r} {delta.awaits[0]}; {delta.awaits[1]}")
        if delta.initialized:
            raise ValueError(
                f"adapter_name={adapter_name!r} was loaded or started from gradients before; delete it with "
                "delete_adapter and add it again to start anew"
            )
        if layer.merged:
            raise ValueError(
                f"{name}: adapters {layer.merged_adapters} are merged; call unmerge_adapter() first"
            )
        if layer.scaling[adapter_name] == 0:
            raise ValueError(f"{name}: the adapter's scale is 0; set it to 1 first")
        check_writable(delta.parameters(), "the gradient start")
    return layers


def _states_from(
    layers: Mapping[str, SubspaceLayer],
    adapter_name: str,
    gradients: Iterable[tuple[str, Tensor]],
    learning_rate: float,
) -> dict[str, dict[str, Tensor]]:
    """New tensors of each delta that a sample reached; processes share the work and get the same tensors."""
    states: dict[str, dict[str, Tensor]] = {}
    unreached = []
    for number, (name, gradient) in enumerate(gradients):
        if not torch.isfinite(gradient).all():
            raise ValueError(
                f"{name}: the mean gradient has NaN or infinite values; look for broken samples, or compute "
                "in fp32 or bf16"
            )
        layer = layers[name]
        delta = layer.deltas[adapter_name]
        gradient = delta.confined(gradient.to(next(delta.parameters()).device), layer.read_weight)
        if not gradient.any():
            unreached.append(name)
            continue
        owner = number % processes.world_size()
        if owner == processes.rank():
            states[name] = delta.state_from_gradient(gradient, learning_rate, layer.scaling[adapter_name])
        else:
            states[name] = {key: _whole_like(delta, key) for key in delta.from_gradient}
        if processes.world_size() > 1:
            for key in delta.from_gradient:
                dist.broadcast(states[name][key], owner)
    if not states:
        raise ValueError(f"no sample reached any of {unreached}, so there are no gradients to start from")
    if unreached:
        warnings.warn(f"no sample reached {unreached}; they keep their initialization", stacklevel=3)
    return states


def _whole_like(delta: Update, name: str) -> Tensor:
    """Empty tensor of the full size of one of an update's, of which an engine may have left a part."""
    tensor = getattr(delta, name)
    shape = delta.trained_shapes.get(name, tensor.shape)
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that torch puts around one."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)
