"""Fresh optimizer and schedule for the next task, in place, for the loops that hold on to them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def parameter_names(model: nn.Module, optimizer: Any) -> dict[int, str]:
    """Names of the model's parameters by identity, where there is an optimizer to take them over."""
    return {} if optimizer is None else {id(p): name for name, p in model.named_parameters()}


def restart_optimizer(
    optimizer: Any,
    model: nn.Module,
    names: dict[int, str],
    task: str,
    name: str,
    *,
    keep_state: bool = False,
) -> None:
    """Replace one task's parameters in an optimizer by another's, group by group, and forget its state.

    Args:
        optimizer: The optimizer, or accelerate's wrapper around one; None does nothing.
        model: Model with both tasks, or with the new one.
        names: Names of the parameters that the optimizer has.
        task: Task that is over.
        name: Task that begins.
        keep_state: Whether the state is that of the new task's parameters already, and kept for them.
    """
    if optimizer is None:
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters = dict(model.named_parameters())
    # The adapter's name stands behind the container's; elsewhere in a path it means something else.
    own = re.compile(rf"(continualsvd_delta|modules_to_save)\.{re.escape(task)}(?=\.|$)")
    state = dict(optimizer.state) if keep_state else {}
    optimizer.state.clear()
    for group in optimizer.param_groups:
        renamed = [
            own.sub(lambda found: f"{found[1]}.{name}", names[id(p)]) if id(p) in names else None
            for p in group["params"]
        ]
        pairs = [
            (old, old if new is None else parameters[new])
            for old, new in zip(group["params"], renamed, strict=True)
            if new is None or new in parameters
        ]
        group["params"] = [parameter for _, parameter in pairs]
        optimizer.state.update((parameter, state[old]) for old, parameter in pairs if old in state)


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
            "one for the optimizer"
        )
    if dry_run:
        return
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = group["initial_lr"] = rate
    scheduler.last_epoch = -1
    scheduler._initial_step()
