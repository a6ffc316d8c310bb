"""Starts under `init_weights=False`: as large as LoRA's, whatever the rank and the scaling."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from layers import Net, delta_weight, tuner_layer
from methods import METHODS

LAYERS = {
    "linear": lambda: nn.Linear(96, 64),
    "transposed": lambda: Conv1D(64, 96),
    "embedding": lambda: nn.Embedding(300, 64),
    "conv": lambda: nn.Conv2d(24, 32, 3),
    "grouped": lambda: nn.Conv1d(48, 32, 5, groups=2),
}


def ratio(model, method):
    """`‖ΔW‖` by the norm that a weight has when torch initializes a linear layer, `U(±1/√fan_in)`."""
    update, weight = delta_weight(model, method), tuner_layer(model).base_layer.weight
    fan_in = weight.shape[1] if isinstance(tuner_layer(model).base_layer, nn.Embedding) else update[0].numel()
    return update.pow(2).mean().sqrt().item() * (3 * fan_in) ** 0.5


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_random_starts_are_as_large_as_that_of_lora(method, kind):
    ranks = [{}] if "r" not in method.options else [{"r": 1}, {"r": 8}]
    scalings = [{"alpha": 1}, {"alpha": 64}] if method.has_alpha else [{}]
    for options in ({**rank, **scaling} for rank in ranks for scaling in scalings):
        torch.manual_seed(0)
        config = method.config(**options, seed=0, init_weights=False)
        assert 0.1 < ratio(get_peft_model(Net(LAYERS[kind]()), config), method) < 1.5, options
