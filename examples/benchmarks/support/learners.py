"""How each method learns a sequence of tasks: what trains, and what happens between two tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

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
        penalty: What is added to the loss.
    """

    title: str
    rates: tuple[float, ...]
    start: Callable[[nn.Module, float], nn.Module]
    proceed: Callable[[nn.Module, int, float], nn.Module] = lambda model, task, preserve: model
    joint: bool = False
    penalty: Callable[[nn.Module], Tensor | float] = lambda model: 0.0


def with_trained_head(model: nn.Module) -> nn.Module:
    """The model, whose head every method trains in full."""
    for name, parameter in model.named_parameters():
        if any(f"{head}." in name for head in HEADS):
            parameter.requires_grad_(True)
    return model


def _frozen(base: nn.Module, preserve: float) -> nn.Module:
    return base.requires_grad_(False)


def _full(base: nn.Module, preserve: float) -> nn.Module:
    return base.requires_grad_(True)


def _lora(base: nn.Module, preserve: float) -> nn.Module:
    return peft.get_peft_model(base, _lora_config(), "task0")


def _lora_config() -> peft.LoraConfig:
    return peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)


def _lora_on_top(model: nn.Module, task: int, preserve: float) -> nn.Module:
    """O-LoRA: a new adapter for each task, over those of the earlier tasks, which stay active and frozen."""
    name = f"task{task}"
    model.add_adapter(name, _lora_config())
    model.base_model.set_adapter([*model.active_adapters, name])
    for path, parameter in model.named_parameters():
        if ".lora_" in path:
            parameter.requires_grad_(f".{name}." in path)
    return model


def _overlap(model: nn.Module) -> Tensor | float:
    """O-LoRA's `λ Σ |A_t A_iᵀ|`, over all layers and all earlier tasks `i`, with the authors' λ = 0.5.

    Reference: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning"
    (arXiv 2310.14152); the authors' code sums absolute values.
    """
    *earlier, current = model.active_adapters
    if not earlier:
        return 0.0
    return 0.5 * sum(
        (layer.lora_A[current].weight @ torch.cat([layer.lora_A[name].weight for name in earlier]).T)
        .abs()
        .sum()
        for layer in model.modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    )


def _osf(base: nn.Module, preserve: float) -> nn.Module:
    return peft.get_peft_model(base, peft.OSFConfig(effective_rank=preserve, target_modules=TARGETS))


def _continual_svd(r: int | None) -> Callable[[nn.Module, float], nn.Module]:
    def start(base: nn.Module, preserve: float) -> nn.Module:
        config = peft_subspace.ContinualSVDConfig(
            r=r, preserve=preserve, scaling="paper", target_modules=TARGETS
        )
        return peft.get_peft_model(base, config)

    return start


def _next_task(model: nn.Module, task: int, preserve: float) -> nn.Module:
    peft_subspace.continual.next_task(model, f"task{task}", keep="merge")
    return model


def _merge_and_wrap(model: nn.Module, task: int, preserve: float) -> nn.Module:
    """OSF as it has to be used: `unload()`, which PEFT's page shows, would throw the task away."""
    return _osf(model.merge_and_unload(), preserve)


LEARNERS = {
    "head": Learner("head alone", (1e-3, 3e-3, 1e-2), _frozen),
    "continual-svd": Learner(
        "Continual SVD, whole complement", (1e-4, 3e-4, 1e-3), _continual_svd(None), _next_task
    ),
    "continual-svd-16": Learner("Continual SVD, r=16", (1e-3, 3e-3, 1e-2), _continual_svd(16), _next_task),
    "lora": Learner("LoRA r=16, one after another", (3e-4, 1e-3, 3e-3), _lora),
    "o-lora": Learner("O-LoRA r=16", (3e-4, 1e-3, 3e-3), _lora, _lora_on_top, penalty=_overlap),
    "full": Learner("full fine-tuning, one after another", (3e-5, 1e-4, 3e-4), _full),
    "osf": Learner("PEFT's OSF, merged between tasks", (3e-5, 1e-4, 3e-4), _osf, _merge_and_wrap),
    "joint": Learner("full fine-tuning, all tasks at once", (3e-5, 1e-4, 3e-4), _full, joint=True),
}
