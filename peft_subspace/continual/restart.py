"""Fresh optimizer and schedule for the next task, in place, for the loops that hold on to them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

Swaps = dict[int, tuple[Tensor, Tensor | None]]
"""Old parameters, by identity, and those that take their places."""


def parameter_names(model: nn.Module, optimizer: Any, task: str) -> dict[int, str]:
    """Names of the model's parameters by identity, where there is an optimizer to take them over.

    Raises:
        ValueError: If the optimizer has none of the task's.
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
    """Replace one task's parameters in an optimizer by another's, in place, and forget its state.

    Some optimizers keep lists of parameters besides their groups, or other optimizers that have them.

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
    parameters = dict(model.named_parameters())
    own = _parameters_of(task)
    swaps: Swaps = {}
    optimizers = _inside(optimizer)
    for group in (group for one in optimizers for group in one.param_groups):
        for old in (p for p in group["params"] if id(p) in names):
            new = own.sub(lambda found: f"{found[1]}.{name}", names[id(old)])
            swaps[id(old)] = old, parameters.get(new)
    seen: set[int] = set()
    for one in optimizers:
        if not keep_state:
            getattr(one, "state", {}).clear()
        if hasattr(one, "_numel_cache"):  # of LBFGS
            one._numel_cache = None
        for attribute in vars(one).values():
            _swap(attribute, swaps, seen)


def _inside(optimizer: Any) -> list[Any]:
    """An optimizer and those that it, as a wrapper, has inside."""
    found: list[Any] = []
    to_see = [optimizer]
    while to_see:
        one = to_see.pop()
        if isinstance(one, list | tuple):
            to_see.extend(one)
        elif hasattr(one, "param_groups") and not any(one is other for other in found):
            found.append(one)
            to_see.extend(vars(one).values())
    return found


def _swap(container: Any, swaps: Swaps, seen: set[int]) -> None:
    """Put new parameters, if there are any, in the place of old ones in lists and dictionaries."""
    if not isinstance(container, list | dict) or id(container) in seen:
        return
    seen.add(id(container))

    def new(value: Any) -> Any:
        return swaps[id(value)][1] if id(value) in swaps else value

    def stays(value: Any) -> bool:
        return id(value) not in swaps or swaps[id(value)][1] is not None

    if isinstance(container, list):
        container[:] = [new(value) for value in container if stays(value)]
    elif any(id(value) in swaps for pair in container.items() for value in pair):
        entries = [(new(key), new(value)) for key, value in container.items() if stays(key) and stays(value)]
        container.clear()
        container.update(entries)
    for value in container if isinstance(container, list) else container.values():
        _swap(value, swaps, seen)


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
