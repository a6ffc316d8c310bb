"""Fresh optimizer and schedule for the next task, in place, for the loops that hold on to them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_GROUPS = {"param_groups", "state", "defaults"}


def parameter_names(model: nn.Module, optimizer: Any, task: str) -> dict[int, str]:
    """Names of the model's parameters by identity, where there is an optimizer to take them over.

    Raises:
        ValueError: If the optimizer has none of the task's, or copies of them all, which would be mixed with
            those of the next task.
    """
    if optimizer is None:
        return {}
    names, own = {id(p): name for name, p in model.named_parameters()}, _parameters_of(task)
    shapes = Counter(p.shape for p in _parameters(optimizer) if own.search(names.get(id(p), "")))
    if not shapes:
        raise ValueError(
            f"the optimizer has no parameter of the current task, {task!r}, so it cannot take those of "
            "another in their place; leave it out, and make a new one afterwards"
        )
    for one in _inside(optimizer):
        for name in (name for name in vars(one) if name not in _GROUPS):
            leaves = tree_leaves(vars(one)[name])
            found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in names]
            if shapes <= Counter(leaf.shape for leaf in found):
                raise ValueError(
                    f"{type(one).__name__} has, as {name!r}, copies of the parameters of the current task, "
                    f"{task!r}, and would mix them with those of another; leave optimizer= out, and make a "
                    "new one afterwards"
                )
    return names


def _parameters_of(task: str) -> re.Pattern[str]:
    # The adapter's name stands behind the container's; elsewhere in a path it means something else.
    held = "continualsvd_delta|modules_to_save|trainable_tokens_delta"
    return re.compile(rf"({held})\.{re.escape(task)}(?=\.|$)")


def restart_optimizer(
    optimizer: Any,
    model: nn.Module,
    names: Mapping[int, str],
    task: str,
    name: str,
    *,
    keep_state: bool = False,
) -> None:
    """Hand one task's parameters in an optimizer over to another task, and forget their state.

    They become those of the task that begins, with its values, and the task that is over gets others: what
    an optimizer, a wrapper or a hook knows parameters by stays right, whatever that is.

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
    parameters, own = dict(model.named_parameters()), _parameters_of(task)
    swaps: dict[Tensor, Tensor] = {}
    for old in _parameters(optimizer):
        new = parameters.get(own.sub(lambda found: f"{found[1]}.{name}", names.get(id(old), "")))
        if new is not None and new is not old:
            swaps |= {old: new, new: old}
            _exchange(old, new)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            module._parameters[key] = swaps.get(parameter, parameter)
    for one in _inside(optimizer):
        if not keep_state:
            getattr(one, "state", {}).clear()
        if hasattr(one, "_numel_cache"):  # of LBFGS
            one._numel_cache = None


def _exchange(first: Tensor, second: Tensor) -> None:
    """Exchange the values of two parameters, and whether they train."""
    first.data, second.data = second.data, first.data
    train = first.requires_grad
    first.requires_grad_(second.requires_grad)
    second.requires_grad_(train)
    first.grad = second.grad = None


def _parameters(optimizer: Any) -> list[Tensor]:
    """Parameters of an optimizer and of those inside, each once."""
    groups = (group for one in _inside(optimizer) for group in one.param_groups)
    return list(dict.fromkeys(p for group in groups for p in group["params"]))


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
