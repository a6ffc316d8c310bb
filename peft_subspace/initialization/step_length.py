"""The length of a first step: the one that lowers the loss of some batches most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from logging import getLogger
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from peft_subspace.core.delta import Update
from peft_subspace.initialization.batches import Batches
from peft_subspace.initialization.evaluating import device_of, evaluating
from peft_subspace.initialization.loss import LossFunction
from peft_subspace.runtime import distributed as processes
from peft_subspace.runtime.engines import read_whole, write
from peft_subspace.runtime.progress import bar
from peft_subspace.tuner.layer import SubspaceLayer

logger = getLogger("peft_subspace")

States = dict[str, dict[str, Tensor]]
"""New tensors of an adapter by module."""

FIRST = 2e-4
"""Length that is tried first, a usual learning rate of full fine-tuning."""

FACTOR = 4.0
"""Ratio of neighboring lengths."""

EVALUATIONS = 8
"""Most evaluations, together less than three passes forward and backward."""


def search_step(loss_at: Callable[[float], float]) -> dict[float, float]:
    """Losses by the lengths that were tried, of which zero is one.

    From a usual length on, lengths grow as long as the loss falls, or shrink until it is below that at zero.
    The minimum of the parabola through the best length and its neighbors comes last.

    Args:
        loss_at: Loss at a length; what is not finite counts as infinite.
    """
    losses: dict[float, float] = {}

    def lowers(step: float, bound: float) -> bool:
        value = loss_at(step)
        losses[step] = value if math.isfinite(value) else math.inf
        return losses[step] < losses[bound]

    lowers(0.0, 0.0)
    step = FIRST
    if lowers(step, 0.0):
        while len(losses) < EVALUATIONS - 1 and lowers(step * FACTOR, step):
            step *= FACTOR
    while losses[step] >= losses[0.0] and len(losses) < EVALUATIONS - 1:
        step /= FACTOR
        lowers(step, 0.0)
    vertex = _vertex(losses)
    if vertex is not None:
        lowers(vertex, 0.0)
    return losses


def _vertex(losses: dict[float, float]) -> float | None:
    """Minimum of the parabola through the best length and its two neighbors, if it is a new length."""
    steps = sorted(step for step, loss in losses.items() if math.isfinite(loss))
    best = min(steps, key=losses.__getitem__) if steps else 0.0
    place = steps.index(best) if steps else 0
    if not 0 < place < len(steps) - 1:
        return None
    left, right = steps[place - 1], steps[place + 1]
    slope_left = (losses[best] - losses[left]) / (best - left)
    slope_right = (losses[right] - losses[best]) / (right - best)
    curvature = (slope_right - slope_left) / (right - left)
    if curvature <= 0:
        return None
    vertex = (left + best) / 2 - slope_left / (2 * curvature)
    return vertex if left < vertex < right and vertex != best else None


class StepSearch:
    """Search for the step that suits new tensors of an adapter, made for a step of length one.

    Args:
        model: The model.
        layers: Layers with the adapter.
        adapter_name: The adapter.
        loss_fn: Loss of a batch.
        batches: The batches.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, SubspaceLayer],
        adapter_name: str,
        loss_fn: LossFunction,
        batches: Batches,
    ) -> None:
        self.model, self.layers, self.adapter_name = model, layers, adapter_name
        self.loss_fn, self.batches = loss_fn, batches

    @torch.no_grad()
    def scaled(self, states: States, *, progress: bool) -> States:
        """Return the states for the best step; what trains in them is proportional to its length, or zero."""
        deltas: dict[str, Update] = {n: self.layers[n].deltas[self.adapter_name] for n in states}
        if not _move(states, deltas):
            return states
        kept = {
            name: {key: read_whole(tensor) for key, tensor in delta.state_dict(keep_vars=True).items()}
            for name, delta in deltas.items()
        }
        count = EVALUATIONS * len(self.batches.items)
        try:
            with (
                evaluating(self.model, list(self.layers.values()), self.adapter_name, adapted=True),
                bar(count, "searching the step", hidden=not progress) as shown,
            ):

                def loss_at(step: float) -> float:
                    for name, state in scale_states(states, deltas, step).items():
                        set_tensors(deltas[name], state)
                    return self._loss(shown)

                losses = search_step(loss_at)
        finally:
            for name, delta in deltas.items():
                set_tensors(delta, kept[name])
        best = min(losses, key=losses.__getitem__)
        told = ", ".join(f"{step:.2g}: {loss:.4g}" for step, loss in sorted(losses.items()))
        if best:
            logger.info("first step of length %.2g; losses by length: %s", best, told)
        else:
            logger.warning("no first step lowers the loss, so the update starts at zero (%s)", told)
        return scale_states(states, deltas, best)

    def _loss(self, shown: Any) -> float:
        device = device_of(self.model)
        total = torch.zeros((), device=device)
        with processes.raise_in_all_processes(device, "searching the step"):
            for batch, weight in zip(self.batches.items, self.batches.weights, strict=True):
                total += self.loss_fn(self.model, send_to_device(batch, device)).detach().to(device) * weight
                shown.update()
        return float(processes.total(total)) / self.batches.total


def _move(states: States, deltas: Mapping[str, Update]) -> bool:
    """Whether a step has a length: anything that trains is not zero after it."""
    return any(
        bool(state[key].any())
        for name, state in states.items()
        for key in deltas[name].trained_shapes.keys() & state.keys()
    )


def scale_states(states: States, deltas: Mapping[str, Update], step: float) -> States:
    """New tensors for a step of a length, from those for length one."""
    trained = {name: dict(delta.named_parameters()) for name, delta in deltas.items()}
    return {
        name: {key: tensor * step if key in trained[name] else tensor for key, tensor in state.items()}
        for name, state in states.items()
    }


def set_tensors(delta: Update, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into an update, in place, and into what an engine keeps of them."""
    for name, value in state.items():
        write(getattr(delta, name), value)
