"""Fresh optimiser and schedule for the next task, in place, for the loops that hold on to them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def parameter_names(model: nn.Module, optimizer: Any, task: str) -> dict[int, str]:
    """Names of the model's parameters by identity, where there is an optimiser to take them over.

    Raises:
        ValueError: If the optimiser has none of the task's.
    """
    if optimizer is None:
        return {}
    names, own = {id(p): name for name, p in model.named_parameters()}, _parameters_of(task)
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    if not any(own.search(names.get(id(p), "")) for group in groups for p in group["params"]):
        raise ValueError(
            f"the optimizer has no parameter of the current task, {task!r}, so it cannot take those of "
            "another in their place; leave it out, and make a new one afterwards"
        )
    return names


def _parameters_of(task: str) -> re.Pattern[str]:
    # The adapter's name stands behind the container's; elsewhere in a path it means something else.
    return re.compile(rf"(continualsvd_delta|modules_to_save)\.{re.escape(task)}(?=\.|$)")


def restart_optimizer(
    optimizer: Any,
    model: nn.Module,
    names: dict[int, str],
    task: str,
    name: str,
    *,
    keep_state: bool = False,
) -> None:
    """Replace one task's parameters in an optimiser by another's, group by group, and forget its state.

    Args:
        optimizer: The optimiser, or accelerate's wrapper around one; None does nothing.
        model: Model with both tasks, or with the new one.
        names: Names of the parameters that the optimiser has.
        task: Task that is over.
        name: Task that begins.
        keep_state: Whether the state is that of the new task's parameters already, and kept for them.
    """
    if optimizer is None:
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters, own = dict(model.named_parameters()), _parameters_of(task)
    taken: dict[int, nn.Parameter | None] = {}
    for old in (p for group in optimizer.param_groups for p in group["params"]):
        key = own.sub(lambda found: f"{found[1]}.{name}", names.get(id(old), ""))
        taken[id(old)] = old if key == names.get(id(old), "") else parameters.get(key)
    state = {taken.get(id(old)): value for old, value in optimizer.state.items()} if keep_state else {}
    optimizer.state.clear()
    optimizer.state.update((new, value) for new, value in state.items() if new is not None)
    # In place, and wherever the optimizer keeps lists of its own, as LBFGS does, which counts them as well.
    for held in [group["params"] for group in optimizer.param_groups] + list(vars(optimizer).values()):
        if isinstance(held, list):
            new = [taken.get(id(item), item) for item in held]
            held[:] = [item for item, old in zip(new, held, strict=True) if item is not None or old is None]
    if hasattr(optimizer, "_numel_cache"):
        optimizer._numel_cache = None


def restart_scheduler(scheduler: Any, *, dry_run: bool = False) -> None:
    """Put a scheduler, or accelerate's wrapper around one, back to its first step.

    Raises:
        TypeError: If it is made of other schedulers, or keeps no learning rates to go back to.
    """
    if scheduler is None:
        return
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not hasattr(scheduler, "base_lrs") or hasattr(scheduler, "_schedulers"):
        raise TypeError(
            f"{type(scheduler).__name__} cannot be started again; leave out scheduler= and make a new "
            "one for the optimiser"
        )
    if dry_run:
        return
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = group["initial_lr"] = rate
    scheduler.last_epoch = -1
    scheduler._initial_step()
