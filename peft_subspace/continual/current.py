"""Which task is the current one, and which are closed."""

from __future__ import annotations

from peft import PeftModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from peft_subspace.core.modes import lasting
from peft_subspace.methods.continual_svd.config import ContinualSVDConfig
from peft_subspace.methods.continual_svd.model import ContinualSVDModel
from peft_subspace.runtime.engines import check_no_engine
from peft_subspace.tuner.apart import compute_again
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer


@lasting()
def reopen(model: nn.Module, name: str) -> None:
    """Make a closed task the current one again: it trains on from where it was, heads included.

    The tasks below it stay closed, and `next_task` closes it as before. An optimizer that went on to later
    tasks has not its parameters: make a new one.

    Args:
        model: Model with Continual SVD adapters.
        name: Name of the task.

    Raises:
        TypeError: If `model` is none that this works on.
        ValueError: If there is no such task, its update is in the base weights, adapters are merged or
            disabled, or other tasks build on it, which started from what the task was when it was closed.
            Nothing has been changed then.
    """
    tuner = tuner_of(model)
    check_tasks_run(tuner)
    if name not in tuner.peft_config:
        raise ValueError(f"name={name!r} is no adapter of the model, which has {list(tuner.peft_config)}")
    if is_merged(tuner, name):
        raise ValueError(
            f"the update of {name!r} is in the base weights, so it cannot go on; start a new task"
        )
    later = followers(tuner, name)
    if later:
        raise ValueError(
            f"the tasks {later} build on {name!r} as it is; delete them first, with model.delete_adapter(…)"
        )
    _open(tuner, name)
    model.set_adapter(name)


def tuner_of(model: nn.Module) -> ContinualSVDModel:
    """The tuner of a model with Continual SVD adapters.

    Raises:
        TypeError: If there is none, or DDP wraps it.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "DistributedDataParallel knows the parameters that it was made with only; call next_task before "
            "wrapping the model"
        )
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ContinualSVDModel):
        raise TypeError(
            f"{type(model).__name__} is no PeftModel with Continual SVD adapters; make one with "
            "get_peft_model(model, ContinualSVDConfig(…))"
        )
    return model.base_model


def check_tasks_run(tuner: ContinualSVDModel) -> None:
    """Raise unless the adapters are enabled, none is merged, and no training engine has taken them over.

    Raises:
        ValueError: If not.
        RuntimeError: If an engine has.
    """
    layers = [module for module in tuner.modules() if isinstance(module, ContinualSVDModel.tuner_layer_cls)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(f"adapters {merged} are merged; call unmerge_adapter() first")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "the adapters are disabled; leave disable_adapter(), or call enable_adapter_layers()"
        )
    trained = (p for layer in layers for delta in layer.deltas.values() for p in delta.parameters())
    check_no_engine(trained, "a change of tasks")


def current_task(tuner: ContinualSVDModel) -> str:
    """The one active adapter that is not closed; if that is deleted, the last task before it.

    Raises:
        ValueError: If there is none, or several.
    """
    check_tasks_run(tuner)
    active = tuner.active_adapters
    tasks = [name for name in active if not tuner.peft_config[name].closed]
    last = [name for name in active if not followers(tuner, name) and not is_merged(tuner, name)]
    if len(tasks or last) != 1:
        raise ValueError(
            "one task must be active and open, or the last of the closed ones, but of the active adapters "
            f"{active} these are open: {tasks}; activate the one to close with model.set_adapter(…)"
        )
    return (tasks or last)[0]


def task_to_replace(tuner: ContinualSVDModel, optimizer: object) -> ContinualSVDConfig | None:
    """Config of the open task that was deleted, if that left no other to follow: one takes its place.

    Raises:
        ValueError: If an optimizer is to go on, which can have none of its parameters then, or the task had
            directions from data, which nothing else has.
    """
    check_tasks_run(tuner)
    left = [name for name in tuner.active_adapters if not is_merged(tuner, name)]
    deleted = None if left else tuner.deleted_task
    if deleted is not None and optimizer is not None:
        raise ValueError(
            "the task that the optimizer trained has been deleted, so it cannot take those of another in "
            "their place; leave it out, and make a new one afterwards"
        )
    if deleted is not None and deleted.directions != "weight":
        raise ValueError(
            "the directions that all tasks so far use are gone with the task that has been deleted; load it "
            "again with model.load_adapter(…), or add an adapter and call peft_subspace.continual.protect"
        )
    return deleted


def followers(tuner: ContinualSVDModel, task: str) -> list[str]:
    """Tasks that build on this one."""
    return [name for name, config in tuner.peft_config.items() if task in config.earlier_tasks]


def is_merged(tuner: ContinualSVDModel, task: str) -> bool:
    """Whether the task's update is in the base weights, and only heads are left of it."""
    return tuner.peft_config[task].target_modules == DUMMY_TARGET_MODULES


def close(tuner: ContinualSVDModel, task: str) -> None:
    """Freeze a task for good; what only its training needs is given up."""
    tuner.peft_config[task].closed = True
    for layer in adapted_layers(tuner, task, SubspaceLayer).values():
        layer.deltas[task].frozen = True
        layer.deltas[task].make_lean()


def _open(tuner: ContinualSVDModel, task: str) -> None:
    """Let a closed task train again, with directions from the weights where it has none any more."""
    config, layers = tuner.peft_config[task], adapted_layers(tuner, task, SubspaceLayer)
    lean = {f"{name}.": layer for name, layer in layers.items() if layer.deltas[task].lean}
    tensors = compute_again(lean, task, config) if lean else {}
    config.closed = config.inference_mode = False
    for start, layer in lean.items():
        update = layer.deltas[task]
        for name in update.training_only:
            setattr(update, name, tensors[f"{start}{name}"].to(update.fingerprint.device))
    for layer in layers.values():
        layer.deltas[task].frozen = False
