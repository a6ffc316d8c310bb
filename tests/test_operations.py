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
    "effort": 11,  # the triples are sums of what they were and what has changed
    "composition": 3,  # coefficients are spread over components
}
FURTHER_CONVOLUTION = {  # the same beside LoRA's 8, where the layer runs once with `W + ΔW`
    "lora_sb": 0,
    "continual_svd": 4,  # three factors, multiplied up
    "flora": 11,  # three factors, one of them of a core and a factor for each axis of the kernel
    "mos": 2,
    "continual_svd_r": 6,  # both factors are projected
    "effort": 10,  # the triples are sums
    "composition": 2,
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


class TwoConvolutions(Two):
    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3, padding=1)


def operations(model):
    """Operations of one step, after those that prepare for it."""
    linear = isinstance(next(m for n, m in model.named_modules() if n.endswith("first")), nn.Linear)
    x = torch.randn(*((4, 16, 64) if linear else (2, 8, 9, 9)), requires_grad=True)
    for _ in range(2):
        model(x).square().sum().backward()
        model.zero_grad()
    with Operations() as counted:
        model(x).square().sum().backward()
    return counted.found.total()


@pytest.mark.parametrize(("build", "further"), [(Two, FURTHER), (TwoConvolutions, FURTHER_CONVOLUTION)])
@pytest.mark.filterwarnings("ignore:adapter .* trains (in bases|coefficients of)")
def test_a_step_dispatches_little_more_than_loras(method, build, further):
    base = operations(build().requires_grad_(False))
    lora = operations(get_peft_model(build(), LoraConfig(r=4, target_modules=["layer"]))) - base
    ours = operations(get_peft_model(build(), method.config(init_weights=True))) - base
    assert ours <= lora + further[method.name]
