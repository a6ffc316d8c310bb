"""How each method learns a sequence of tasks: what trains, and what happens between two tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peft
from torch import nn

import peft_subspace

TARGETS = r".*\.(query|key|value|dense|[qkvo]_proj|(gate|up|down)_proj)"
"""Linear layers of BERT's blocks and pooler, and of Llama's blocks."""

HEADS = ("classifier", "score")
"""What BERT and Llama call the head."""


@dataclass(frozen=True)
class Learner:
    """One method.

    Attributes:
        title: Its name in tables.
        rates: Learning rates to choose from.
        start: Makes the model that trains the first task of a base model, given the share to preserve.
        proceed: Makes the model that trains the next task of the one that trained the last.
        joint: Whether it learns all tasks at once.
    """

    title: str
    rates: tuple[float, ...]
    start: Callable[[nn.Module, float], nn.Module]
    proceed: Callable[[nn.Module, int, float], nn.Module] = lambda model, task, preserve: model
    joint: bool = False


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the update and of the head, which is trained in full by every method."""
    for name, parameter in model.named_parameters():
        if any(f"{head}." in name for head in HEADS):
            parameter.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _full(base: nn.Module, preserve: float) -> nn.Module:
    return base.requires_grad_(True)


def _lora(base: nn.Module, preserve: float) -> nn.Module:
    return peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))


def _osf(base: nn.Module, preserve: float) -> nn.Module:
    return peft.get_peft_model(base, peft.OSFConfig(effective_rank=preserve, target_modules=TARGETS))


def _continual_svd(r: int | None) -> Callable[[nn.Module, float], nn.Module]:
    def start(base: nn.Module, preserve: float) -> nn.Module:
        config = peft_subspace.ContinualSVDConfig(r=r, preserve=preserve, target_modules=TARGETS)
        return peft.get_peft_model(base, config)

    return start


def _next_task(model: nn.Module, task: int, preserve: float) -> nn.Module:
    peft_subspace.next_task(model, f"task{task}", keep="merge")
    return model


def _merge_and_wrap(model: nn.Module, task: int, preserve: float) -> nn.Module:
    """OSF as it has to be used: `unload()`, which PEFT's page shows, would throw the task away."""
    return _osf(model.merge_and_unload(), preserve)


LEARNERS = {
    "continual-svd": Learner(
        "Continual SVD, whole complement", (1e-4, 3e-4, 1e-3), _continual_svd(None), _next_task
    ),
    "continual-svd-16": Learner("Continual SVD, r=16", (1e-3, 3e-3, 1e-2), _continual_svd(16), _next_task),
    "lora": Learner("LoRA r=16, one after another", (3e-4, 1e-3, 3e-3), _lora),
    "full": Learner("full fine-tuning, one after another", (3e-5, 1e-4, 3e-4), _full),
    "osf": Learner("PEFT's OSF, merged between tasks", (3e-5, 1e-4, 3e-4), _osf, _merge_and_wrap),
    "joint": Learner("full fine-tuning, all tasks at once", (3e-5, 1e-4, 3e-4), _full, joint=True),
}
