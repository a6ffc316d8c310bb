"""Directions to protect that come from data: those that old tasks use, gathered over tasks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.continual.current import current_task, tuner_of
from peft_subspace.core.errors import error_context
from peft_subspace.core.linalg import orthonormal
from peft_subspace.core.modes import lasting
from peft_subspace.core.validation import invalid
from peft_subspace.methods.continual_svd.config import SOURCES, ContinualSVDConfig
from peft_subspace.methods.continual_svd.model import ContinualSVDModel
from peft_subspace.runtime.progress import progress
from peft_subspace.statistics import SecondMoment, Statistics
from peft_subspace.statistics.moment import Rows
from peft_subspace.statistics.record import GRADIENTS, INPUTS
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.patterns import patterns_of

Directions = dict[str, dict[str, Tensor]]
"""Orthonormal directions `(d, k)` by module and side."""

_MOST_OF_ROWS = 0.75
"""New directions as a part of the rows; beyond it almost each row has its own, unlike the rows to come."""

_ROUNDING = 1e-12


@lasting()
def protect(model: nn.Module, statistics: Statistics | None = None) -> None:
    """Protect what data use from the task that is about to train, beside what is protected already.

    The current task takes other parameters by this: make the optimizer afterwards.

    Args:
        model: Model with Continual SVD adapters whose `directions` are from data.
        statistics: Statistics of that data, gathered by `peft_subspace.statistics.collect`. For
            `"weight+inputs"` they may be left out: the weight's own directions are then all.

    Raises:
        TypeError: If `model` is none that this works on.
        ValueError: If `directions` are those of the weight, the current task has been trained, or the
            statistics are of another model, have too few rows, or leave nothing to train. Nothing has been
            changed then.

    Warns:
        UserWarning: If some layers have no room for all that the statistics ask for.
    """
    tuner = tuner_of(model)
    task = current_task(tuner)
    if tuner._has_update(task):
        raise ValueError(f"task {task!r} has been trained already; protect before, or start one by next_task")
    config = copy.copy(tuner.peft_config[task])
    layers = adapted_layers(tuner.model, task, SubspaceLayer)
    if config.freeze_a and any(layer.deltas[task].initialized for layer in layers.values()):
        raise ValueError(f"the frozen A of task {task!r} is known already; protect before it is initialized")
    if config.directions == "weight":
        raise invalid("directions", config.directions, "are no data's; set directions='inputs', or another")
    directions = gather(tuner, task, config, statistics)
    tuner.peft_config[task] = config
    for name, layer in layers.items():
        layer.update_layer(task, config, config.spec_for(name, layer.kind.shape))
    fill(tuner, task, directions)
    starts = [layer.deltas[task] for layer in layers.values()]
    config.trained = sum(p.numel() for delta in starts for p in delta.parameters())


def gather(
    tuner: ContinualSVDModel, task: str, config: ContinualSVDConfig, statistics: Statistics | None
) -> Directions:
    """Directions of a task, and new ones of statistics; their numbers go into the config of the next task.

    Args:
        tuner: The tuner.
        task: Task whose directions are kept.
        config: Config of the task that is to protect all.
        statistics: What there is to protect; None where the directions are those of the weight.

    Raises:
        ValueError: If the statistics do not fit.
    """
    source = config.directions
    if source == "weight":
        if statistics is not None:
            raise invalid("directions", source, "take no statistics; set directions='inputs', or another")
        return {}
    first = source == "weight+inputs" and not config.earlier_tasks and not config.preserve_pattern
    if statistics is None and not first:
        raise ValueError(
            f"directions={source!r} need statistics of the task that ends; gather them on its data, with the "
            "model as it is, by peft_subspace.statistics.collect(model, dataloader), and give statistics=…"
        )
    side = SOURCES[source]
    layers = adapted_layers(tuner.model, task, SubspaceLayer)
    moments = None if statistics is None else _moments(layers, source, statistics)
    directions: Directions = {}
    full: dict[str, int] = {}
    for name, layer in progress(layers.items(), len(layers), "gathering directions"):
        kept = layer.deltas[task].sides[side].directions(getattr(layer.deltas[task], side))
        with error_context(name):
            if first:
                weight = layer.read_weight().flatten(1)
                moment = SecondMoment.empty(weight.shape[1], device=weight.device)
                moment.add(Rows(weight))
                kept, _ = extended(kept, moment, config.weight_energy, checked=False)
            if moments is not None:
                kept, lacking = extended(kept, moments[name], config.energy)
                full |= {name: lacking} if lacking else {}
        directions[name] = {side: kept}
    _check_room(full, directions)
    counts = {name: own[side].shape[1] for name, own in directions.items()}
    pairs = {name: [count, 0] if side == "U" else [0, count] for name, count in counts.items()}
    config.preserve_pattern = patterns_of(pairs)
    return directions


def fill(tuner: ContinualSVDModel, task: str, directions: Directions) -> None:
    """Have a task protect directions."""
    layers = adapted_layers(tuner.model, task, SubspaceLayer)
    for name, own in directions.items():
        layers[name].deltas[task].protect(own)


def extended(
    known: Tensor, moment: SecondMoment, energy: float, *, checked: bool = True
) -> tuple[Tensor, int]:
    """Orthonormal directions `(d, k)` with the fewest new ones that make them hold a part of the energy.

    What the known ones hold of it counts. No more than `d − 1` are returned.

    Args:
        known: The known ones, orthonormal in double precision.
        moment: Second moment of the data.
        energy: Part of the sum of all squares to hold.
        checked: Whether too few rows are an error.

    Returns:
        Known and new ones, and how many more it would take.

    Raises:
        ValueError: If there are too few rows for the new ones, or a sketch does not hold enough.
    """
    moment = moment.to(known.device)
    target = energy * moment.energy * (1 - _ROUNDING)
    held = moment.held_by(known)
    if held >= target:
        return known, 0
    values, vectors = moment.outside(known)
    sums = held + values.cumsum(0)
    count = int((sums < target).sum()) + 1
    if count > len(values):
        raise ValueError(
            f"the sketch of width {moment.width} holds {sums[-1] / moment.energy:.3f} of the energy, and "
            f"energy={energy} is asked for; give more max_memory, or lower energy"
        )
    if checked and count > _MOST_OF_ROWS * moment.rows:
        raise ValueError(
            f"energy={energy} takes {count} new directions, and {moment.rows} rows are too few to tell them: "
            "almost every row has its own; gather more rows, or lower energy"
        )
    room = min(count, len(known) - 1 - known.shape[1])
    new = vectors[:, :room]
    new = new - known @ (known.T @ new)
    return torch.cat([known, orthonormal(torch.cat([known, new], 1))[:, known.shape[1] :]], 1), count - room


def _moments(layers: Mapping[str, Any], source: str, statistics: Statistics) -> dict[str, SecondMoment]:
    """Moments of the layers, of the kind that the directions are from."""
    kind = GRADIENTS if source == GRADIENTS else INPUTS
    moments = {}
    for name, layer in layers.items():
        shape = layer.kind.shape
        moments[name] = statistics.moment(kind, name, shape.columns if kind == INPUTS else shape.out_features)
    return moments


def _check_room(full: Mapping[str, int], directions: Directions) -> None:
    if not full:
        return
    if len(full) == len(directions):
        raise ValueError(
            "the data use all directions of every layer, so that nothing would be left to train; lower energy"
        )
    worst = max(full, key=lambda name: full[name])
    warnings.warn(
        f"{len(full)} of {len(directions)} layers have no room for all that the data use, such as {worst}, "
        f"which lacks {full[worst]} directions: old tasks are not wholly protected there, and one direction "
        "is left to train; lower energy, or exclude the layers",
        stacklevel=4,
    )
