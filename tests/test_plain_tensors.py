"""Parameters replaced by plain tensors, as FSDP1 without `use_orig_params` and `DataParallel` do it."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

import peft_subspace
from layers import Net, outputs
from methods import METHODS

CONSTRAINTS = [
    peft_subspace.ContinualSVDConfig(r=r, constraint=constraint, preserve=3, target_modules=["layer"])
    for constraint in ("both", "core", "input", "output")
    for r in (None, 2)
]
CONFIGS = [*(method.config(init_weights=False) for method in METHODS), *CONSTRAINTS]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.peft_type.value)
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(12, 10), lambda: nn.Conv2d(4, 6, 3)], ids=["linear", "conv"]
)
def test_updates_are_made_of_plain_tensors_too(config, layer):
    torch.manual_seed(0)
    model = get_peft_model(Net(layer()), config)
    for name, parameter in model.named_parameters():
        if name.partition(".layer.")[2].partition("_")[0] != "base":
            parameter.data.normal_(generator=torch.Generator().manual_seed(0), std=0.1)
    x = (
        torch.randn(2, 12)
        if isinstance(model.base_model.model.layer.base_layer, nn.Linear)
        else torch.randn(2, 4, 9, 9)
    )
    expected = outputs(model, x)
    tensors = []
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                setattr(module, name, parameter.detach().clone().requires_grad_(parameter.requires_grad))
                tensors.append(getattr(module, name))
    result = model(x)
    assert torch.equal(result, expected)
    result.sum().backward()
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    assert trained
    assert all(tensor.grad is not None for tensor in trained)
