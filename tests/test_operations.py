"""Operations that a training step dispatches for an adapted layer: what small steps cost on a GPU."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_subspace
from layers import Net

LAYERS = {
    "linear": (lambda: nn.Linear(256, 256), (4, 64, 256)),
    "convolution": (lambda: nn.Conv2d(64, 64, 3, padding=1), (8, 64, 14, 14)),
}
CONFIGS = {
    "flora": peft_subspace.FLoRAConfig(),
    "mos": peft_subspace.MoSConfig(),
    "lora_sb": peft_subspace.LoRASBConfig(),
    "continual_svd": peft_subspace.ContinualSVDConfig(),
    "continual_svd_r": peft_subspace.ContinualSVDConfig(r=8),
    "effort": peft_subspace.EffortConfig(),
}
BEYOND = {  # what an equation has beyond LoRA's two factors, forward and backward
    ("flora", "linear"): 3,  # one factor more: its product, and two gradients
    ("mos", "linear"): 4,  # two factors that are read out of pools, and two gradients put back
    ("continual_svd_r", "linear"): 8,  # two factors that are projected, by two products each, and back
    (
        "effort",
        "linear",
    ): 11,  # the trained part minus the frozen one: two chains, scaled and put side by side
    # Convolutions run with W + ΔW where that takes less arithmetic, and then the update is multiplied up.
    ("flora", "convolution"): 20,
    ("mos", "convolution"): 12,
    ("continual_svd", "convolution"): 4,
    ("continual_svd_r", "convolution"): 14,
    ("effort", "convolution"): 19,
}


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views apart."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        views = "_unsafe_view" in str(function) or any(
            r.alias_info and not r.alias_info.is_write for r in returns
        )
        self.count += not views
        return function(*args, **(kwargs or {}))


def operations(layer, config, size):
    """Operations of a step, forward and backward, with the gradient of the input."""
    torch.manual_seed(0)
    model = Net(layer()).requires_grad_(False)
    if config is not None:
        config.target_modules = ["layer"]
        model = get_peft_model(model, config)
    x = torch.randn(size).requires_grad_()
    output = model.train()(x)
    with Operations() as counted:
        model(x).backward(torch.ones_like(output.detach()))
    return counted.count


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_dispatches_little_more_than_with_lora(name, kind):
    layer, size = LAYERS[kind]
    alone = operations(layer, None, size)
    lora, ours = (operations(layer, config, size) - alone for config in (LoraConfig(), CONFIGS[name]))
    assert ours <= int(1.15 * lora) + BEYOND.get((name, kind), 0), f"{ours}, LoRA {lora}"
