"""Fresh optimiser and schedule for the next task, in place, for the loops that hold on to them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def parameter_names(model: nn.Module, optimizer: Any) -> dict[int, str]:
    """Names of the model's parameters by identity, where there is an optimiser to take them over."""
    return {} if optimizer is None else {id(p): name for name, p in model.named_parameters()}


def restart_optimizer(optimizer: Any, model: nn.Module, names: dict[int, str], task: str, name: str) -> None:
    """Forget an optimiser's state and replace one task's parameters by another's, group by group.

    Args:
        optimizer: The optimiser, or accelerate's wrapper around one; None does nothing.
        model: Model with both tasks, or with the new one.
        names: Names of the parameters that the optimiser has.
        task: Task that is over.
        name: Task that begins.
    """
    if optimizer is None:
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters = dict(model.named_parameters())
    # The adapter's name stands behind the container's; elsewhere in a path it means something else.
    own = re.compile(rf"(continualsvd_delta|modules_to_save)\.{re.escape(task)}(?=\.|$)")
    optimizer.state.clear()
    for group in optimizer.param_groups:
        renamed = [
            own.sub(lambda found: f"{found[1]}.{name}", names[id(p)]) if id(p) in names else None
            for p in group["params"]
        ]
        group["params"] = [
            parameter if new is None else parameters[new]
            for parameter, new in zip(group["params"], renamed, strict=True)
            if new is None or new in parameters
        ]


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
