"""Fine-tuning methods that are compared: what trains, at which rates, and how large."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

import peft_subspace
from support import device
from support.task import Task

LARGEST_SIZE = 512
"""Sizes that are tried to match a number of parameters."""

Batches = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Contestant:
    """One method.

    Attributes:
        title: Its name in tables.
        rates: Three neighboring learning rates that are tried in any case.
        config: Makes its config from target modules and size, a rank in most cases; None trains without PEFT.
        fit: Adjusts the config to a base model.
        before: Prepares a base model for its config, given training batches.
        after: Starts the adapter from training batches.
    """

    title: str
    rates: tuple[float, float, float]
    config: Callable[[Any, int], Any] | None = None
    fit: Callable[[nn.Module, Any], None] = lambda model, config: None
    before: Callable[[nn.Module, Any, Batches], None] = lambda model, config, batches: None
    after: Callable[[nn.Module, Batches], None] = lambda model, batches: None

    def config_for(self, base: nn.Module, targets: Any, size: int) -> Any:
        """Its config for a base model; None if it trains without PEFT."""
        if self.config is None:
            return None
        config = self.config(targets, size)
        self.fit(base, config)
        return config

    def adapt(self, task: Task, size: int, batches: Batches) -> nn.Module:
        """A model whose update and whose new head train."""
        base: nn.Module = task.make_base()
        base.to(device.best())
        config = self.config_for(base, task.target_modules, size)
        if config is None:
            for name, parameter in base.named_parameters():
                head = any(name.startswith(f"{module}.") for module in task.new_modules)
                parameter.requires_grad_(head or self is CONTESTANTS["full"])
            return base
        config.task_type = task.peft_task_type
        config.modules_to_save = list(task.new_modules) or None
        self.before(base, config, batches)
        return peft.get_peft_model(base, config)


def trainable(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def size_for(name: str, task: Task, wanted: int) -> int:
    """The size at which a method trains as nearly as possible the wanted number of parameters, head included.

    The count grows with the size, or falls with it, so that bisection finds it.
    """
    base, contestant = task.make_base(), CONTESTANTS[name]
    if contestant.config is None:
        raise ValueError(
            f"{name!r} has no size; only methods of PEFT can be matched to a number of parameters"
        )

    @functools.cache
    def count(size: int) -> int:
        config = contestant.config_for(base, task.target_modules, size)
        adapted = peft.get_peft_model(copy.deepcopy(base), config)
        head = sum(p.numel() for module in task.new_modules for p in base.get_submodule(module).parameters())
        return trainable(adapted) + head

    low, high = 1, LARGEST_SIZE
    grows = count(low) <= count(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (count(middle) <= wanted) == grows else (low, middle)
    return min((low, high), key=lambda size: abs(count(size) - wanted))


def _lora(**options: Any) -> Callable[[Any, int], peft.PeftConfig]:
    return lambda targets, r: peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **options)


def _lora_ga(targets: Any, r: int) -> peft.PeftConfig:
    ga = peft.LoraGAConfig()
    return _lora(init_lora_weights="lora_ga", lora_ga_config=ga)(targets, r)


def _gradients_for_lora_ga(model: nn.Module, config: peft.LoraConfig, batches: Batches) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    def pass_over() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, pass_over)


def _widest_vectors(model: nn.Module, config: peft.VBLoRAConfig) -> None:
    """The longest vectors, of at most 128, that make up the widths of all adapted layers."""
    layers = (m for name, m in model.named_modules() if check_target_module_exists(config, name))
    width = math.gcd(*(size for layer in layers for size in layer.weight.shape))
    config.vector_length = next(length for length in range(128, 0, -1) if width % length == 0)


def _start_lora_sb(model: nn.Module, batches: Batches) -> None:
    # a first step of full fine-tuning, when its rates have just begun to rise
    rate = CONTESTANTS["full"].rates[1] / 10
    peft_subspace.initialize_from_gradient(
        model, batches, learning_rate=rate, num_batches=None, progress=False
    )


CONTESTANTS = {
    "full": Contestant("full fine-tuning", (3e-5, 1e-4, 3e-4)),
    "probe": Contestant("head only", (3e-3, 1e-2, 3e-2)),
    "lora": Contestant("LoRA", (3e-4, 1e-3, 3e-3), _lora()),
    "rslora": Contestant("rsLoRA", (3e-4, 1e-3, 3e-3), _lora(use_rslora=True)),
    "pissa": Contestant("PiSSA", (1e-4, 3e-4, 1e-3), _lora(init_lora_weights="pissa_niter_4")),
    "lora-ga": Contestant("LoRA-GA", (1e-4, 3e-4, 1e-3), _lora_ga, before=_gradients_for_lora_ga),
    "vb-lora": Contestant(
        "VB-LoRA",
        (3e-3, 1e-2, 3e-2),
        lambda targets, vectors: peft.VBLoRAConfig(r=4, num_vectors=vectors, target_modules=targets),
        fit=_widest_vectors,
    ),
    "loha": Contestant(
        "LoHa",
        (3e-4, 1e-3, 3e-3),
        lambda targets, r: peft.LoHaConfig(r=r, alpha=2 * r, target_modules=targets),
    ),
    "lokr": Contestant(
        "LoKr",
        (1e-3, 3e-3, 1e-2),
        # factors of 2: with balanced ones no rank trains as many parameters as the others
        lambda targets, r: peft.LoKrConfig(r=r, alpha=2 * r, decompose_factor=2, target_modules=targets),
    ),
    "randlora": Contestant(
        "RandLoRA",
        (1e-3, 3e-3, 1e-2),
        lambda targets, r: peft.RandLoraConfig(r=r, randlora_alpha=2 * r, target_modules=targets),
    ),
    "tinylora": Contestant(
        "TinyLoRA",
        (3e-3, 1e-2, 3e-2),
        lambda targets, u: peft.TinyLoraConfig(r=2, u=u, target_modules=targets),
    ),
    "osf": Contestant(
        "OSF",
        (3e-5, 1e-4, 3e-4),
        lambda targets, r: peft.OSFConfig(effective_rank=r, target_modules=targets),
    ),
    "flora": Contestant(
        "FLoRA",
        (1e-3, 3e-3, 1e-2),
        lambda targets, r: peft_subspace.FLoRAConfig(
            r=r, init_weights="kaiming_uniform", scaling="paper", target_modules=targets
        ),
    ),
    "flora-zero": Contestant(
        "FLoRA from an output of zero",
        (1e-3, 3e-3, 1e-2),
        lambda targets, r: peft_subspace.FLoRAConfig(
            r=r, init_weights="zero_output", scaling="paper", target_modules=targets
        ),
    ),
    "flora-all": Contestant(
        "FLoRA on all convolutions",
        (1e-3, 3e-3, 1e-2),
        # grouped ones too, which the others cannot adapt
        lambda targets, r: peft_subspace.FLoRAConfig(
            r=r,
            init_weights="kaiming_uniform",
            scaling="paper",
            target_modules=rf"{targets}|.*\.convolution",
        ),
    ),
    "mos": Contestant(
        "MoS",
        (1e-3, 3e-3, 1e-2),
        lambda targets, e: peft_subspace.MoSConfig(
            r=4 * e, equivalent_r=e, scaling="paper", target_modules=targets
        ),
    ),
    "lora-sb": Contestant(
        "LoRA-SB",
        (3e-3, 1e-2, 3e-2),
        lambda targets, r: peft_subspace.LoRASBConfig(r=r, scaling="paper", target_modules=targets),
        after=_start_lora_sb,
    ),
    "effort": Contestant(
        "Effort",
        (3e-4, 1e-3, 3e-3),
        lambda targets, r: peft_subspace.EffortConfig(r=r, target_modules=targets),
    ),
    "continual-svd": Contestant(
        "Continual SVD",
        (1e-3, 3e-3, 1e-2),
        lambda targets, r: peft_subspace.ContinualSVDConfig(
            r=r, preserve=0.5, scaling="paper", target_modules=targets
        ),
    ),
}
