"""Sequences of tasks: close one, keep it, and start the next outside what is known by then."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_subspace.continual.current import close, current_task, task_to_replace, tuner_of
from peft_subspace.continual.directions import fill, gather
from peft_subspace.continual.restart import parameter_names, restart_optimizer, restart_scheduler
from peft_subspace.core.errors import error_context
from peft_subspace.core.modes import lasting
from peft_subspace.core.validation import check_choice, invalid
from peft_subspace.methods.continual_svd.config import ContinualSVDConfig
from peft_subspace.methods.continual_svd.model import ContinualSVDModel
from peft_subspace.runtime.progress import progress
from peft_subspace.statistics import Statistics
from peft_subspace.tuner.history import HISTORIES
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.merging import check_finite, merge_permanently


@lasting()
def next_task(
    model: nn.Module,
    name: str,
    *,
    keep: str | None = None,
    preserve: float | Mapping[str, float] | None = None,
    statistics: Statistics | None = None,
    energy: float | None = None,
    optimizer: Any = None,
    scheduler: Any = None,
    new_heads: bool = True,
) -> None:
    """Close the current task and start the next one, outside the leading directions of the weight by then.

    With `keep="merge"` the task goes into the base weights, summed in fp32: the model stays as large as it
    was, and from then on `disable_adapter()` gives the base model with that task in it. Save that model too
    (`model.unload().save_pretrained(…)`): the next adapter fits no other. With `keep="stack"` the base
    weights are untouched, and the task's adapter stays as it is, frozen and active below the next ones; it
    can be disabled (`model.base_model.set_adapter([…])`), deleted, saved and shared by itself. The current
    task is the one that trains; its heads (`modules_to_save`) remain under its name either way, and
    `model.set_adapter(task)` brings them back. If the current task is deleted, the one before it is followed;
    where that is in the base weights, or there is none, the new task takes the place of the deleted one.

    Args:
        model: Model with Continual SVD adapters, as `get_peft_model` returns it.
        name: Name of the new task and of its adapter.
        keep: `"merge"` or `"stack"`; by default `"stack"` on quantized base weights, which a merge would
            round, and for a task that is kept so already.
        preserve: What to protect from the new task, as in the config: a number for all modules, or one for
            each by name or regular expression (the config's `preserve` for others). By default as before.
        statistics: What the task that ends uses, as `peft_subspace.statistics.collect` gathers it on its data
            with the model as it is now, where `directions` of the config are from data. What is new in it is
            protected from now on, beside what was before.
        energy: Part of it to protect, if another than before.
        optimizer: Optimizer to go on with: it forgets its state and takes the new adapter's parameters.
        scheduler: Learning-rate scheduler to start again.
        new_heads: Whether the heads start again from those of the base model, rather than where they are.

    Raises:
        TypeError: If `model`, or the scheduler, is none that this works on.
        ValueError: If there is no current task, it is merged, the name is taken, the optimizer has none of
            its parameters, `keep` or `preserve` does not fit, or `statistics` are missing, of another model,
            or leave nothing to train. Nothing has been changed then.

    Warns:
        UserWarning: If some layers have no room for all that the statistics ask for.

    Reference:
        Nayak et al. (arXiv 2504.07097), section 4, for merging.
    """
    tuner = tuner_of(model)
    if (deleted := task_to_replace(tuner, optimizer)) is not None:
        _replace_task(model, name, _fresh(deleted, preserve, energy), scheduler, new_heads)
        return
    task = current_task(tuner)
    layers = adapted_layers(tuner, task, SubspaceLayer).values()
    quantized = any(layer.quantization_backend is not None for layer in layers)
    keep = keep or ("stack" if quantized or tuner.peft_config[task].closed else "merge")
    _check_name(tuner, name)
    _check_keep(tuner, task, keep)
    history = {**tuner.peft_config[task].earlier_tasks, task: keep}
    config = _fresh(tuner.peft_config[task], preserve, energy, earlier_tasks=history)
    directions = gather(tuner, task, config, statistics)
    tuner.plan(tuner.model, copy.deepcopy(config))
    restart_scheduler(scheduler, dry_run=True)
    names = parameter_names(model, optimizer, task)
    if keep == "merge":
        _merge(layers, task)
    model.add_adapter(name, config)
    fill(tuner, name, directions)
    if not new_heads:
        _continue_heads(tuner, task, name)
    close(tuner, task)
    model.set_adapter(name)
    if keep == "merge":
        _reduce_to_heads(tuner, task)
    restart_optimizer(optimizer, model, names, task, name)
    restart_scheduler(scheduler)


def _merge(layers: Collection[SubspaceLayer], task: str) -> None:
    for layer in progress(layers, len(layers), "checking updates"):
        check_finite(layer, [task])
    for layer in progress(layers, len(layers), "merging"):
        merge_permanently(layer, task)


def _replace_task(model: Any, name: str, config: ContinualSVDConfig, scheduler: Any, new_heads: bool) -> None:
    """Start a task in the place of one that has been deleted, of which only the config is left."""
    tuner = tuner_of(model)
    _check_name(tuner, name)
    tuner.plan(tuner.model, copy.deepcopy(config))
    restart_scheduler(scheduler, dry_run=True)
    model.add_adapter(name, config)
    before = [task for task in config.earlier_tasks if task in tuner.peft_config]
    if before and not new_heads:
        _continue_heads(tuner, before[-1], name)
    model.set_adapter(name)
    restart_scheduler(scheduler)


def continue_task(model: nn.Module, name: str, optimizer: Any) -> None:
    """Make a task that has been loaded the current one, and hand it the optimizer's state, which is its own.

    A Trainer that resumes loads all adapters, but leaves the one active that the model was made with.
    """
    tuner = tuner_of(model)
    task = current_task(tuner)
    names = parameter_names(model, optimizer, task)
    source = tuner.peft_config[name].source
    if (
        source is not None and tuner.peft_config[name].for_inference
    ):  # as PEFT loads adapters beside the active
        model.delete_adapter(name)
        model.load_adapter(str(source), name, is_trainable=True)
    for earlier in tuner.peft_config[name].lower_adapters:
        close(tuner, earlier)
    model.set_adapter(name)
    restart_optimizer(optimizer, model, names, task, name, keep_state=True)


def _check_name(tuner: ContinualSVDModel, name: str) -> None:
    taken = {task for config in tuner.peft_config.values() for task in config.earlier_tasks}
    if name in taken | set(tuner.peft_config):
        raise ValueError(f"name={name!r} is the name of a task already; choose a new one")


def _check_keep(tuner: ContinualSVDModel, task: str, keep: str) -> None:
    check_choice("keep", keep, HISTORIES)
    config = tuner.peft_config[task]
    stacked = [name for name in config.lower_adapters if name in tuner.peft_config]
    if keep == "merge" and stacked:
        raise ValueError(
            f"keep='merge' would change the base weights below the stacked tasks {stacked}; use "
            "keep='stack', or merge all with merge_and_unload()"
        )
    for module_name, layer in tuner.model.named_modules():
        if isinstance(layer, ContinualSVDModel.tuner_layer_cls) and task in layer.deltas:
            with error_context(module_name):
                if keep == "stack" and not layer.deltas[task].low_rank:
                    raise ValueError(
                        "keep='stack' needs small adapters, but r is None; set r, such as r=16, or use "
                        "keep='merge'"
                    )
                if keep == "merge" and not _can_merge(layer):
                    raise ValueError("these quantized weights cannot be rewritten; use keep='stack'")


def _can_merge(layer: SubspaceLayer) -> bool:
    return layer.quantization_backend is None or layer.quantization_backend.supports_merge


def _fresh(
    config: ContinualSVDConfig,
    preserve: float | Mapping[str, float] | None,
    energy: float | None,
    **changes: Any,
) -> ContinualSVDConfig:
    """Config of a task that starts, given that of another."""
    if energy is not None:
        changes["energy"] = energy
    if preserve is not None and config.directions != "weight":
        raise invalid("preserve", preserve, f"is not for directions={config.directions!r}; give energy")
    if isinstance(preserve, Mapping):
        changes |= {"preserve_pattern": dict(preserve)}
    elif preserve is not None:
        changes |= {"preserve": preserve, "preserve_pattern": {}}
    config = copy.deepcopy(config)
    return replace(
        config, **changes, initialized=False, closed=False, inference_mode=False, init_weights=True
    )


def _continue_heads(tuner: ContinualSVDModel, task: str, name: str) -> None:
    for module in tuner.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and {task, name} <= module._get_available_adapters():
            old, new = (_head_state(module, n) for n in (task, name))
            with torch.no_grad():
                for key, tensor in new.items():
                    tensor.copy_(old[key])


def _head_state(module: Any, name: str) -> dict[str, Tensor]:
    return module.adapter_state_dict(name, module.state_dict())


def _reduce_to_heads(tuner: ContinualSVDModel, task: str) -> None:
    """Delete the update of a merged task; an adapter without any keeps its heads, if it has some."""
    for module in tuner.modules():
        if isinstance(module, ContinualSVDModel.tuner_layer_cls):
            module.delete_adapter(task)
    config = tuner.peft_config[task]
    if not config.modules_to_save:
        tuner.delete_adapter(task)
        return
    tuner.peft_config[task] = replace(
        config,
        target_modules=DUMMY_TARGET_MODULES,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
