"""What a training step dispatches for one adapted layer: on a GPU, small steps cost what they launch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "reshape",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view",
}  # fmt: skip
FURTHER = {  # beyond LoRA's, by the equation: why no fewer would do
    "lora_sb": 0,
    "continual_svd": 0,
    "flora": 2,  # a third factor: three more products, less LoRA's addition by itself
    "mos": 3,  # four look-ups in the pools
    "continual_svd_r": 7,  # both factors are projected, forward and backward
    "effort": 12,  # the triples are sums of what they were and what has changed
    "composition": 3,  # coefficients are spread over components
}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(self.first(x))


def operations(model):
    """Operations of one step, after those that prepare for it."""
    x = torch.randn(4, 16, 64, requires_grad=True)
    for _ in range(2):
        model(x).square().sum().backward()
        model.zero_grad()
    with Operations() as counted:
        model(x).square().sum().backward()
    return counted.found.total()


@pytest.mark.filterwarnings("ignore:adapter .* trains (in bases|coefficients of)")
def test_a_step_dispatches_little_more_than_loras(method):
    base = operations(Two().requires_grad_(False))
    lora = operations(get_peft_model(Two(), LoraConfig(r=4, target_modules=["layer"]))) - base
    config = method.config(init_weights=True)
    ours = operations(get_peft_model(Two(), config)) - base
    assert ours <= lora + FURTHER[method.name]
