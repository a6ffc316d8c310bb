"""The scaling with which AdamW moves an update as fast as PEFT's LoRA with its defaults."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_subspace
from layers import Net, tuner_layer

OURS = {
    "continual_svd": peft_subspace.ContinualSVDConfig(),
    "continual_svd some": peft_subspace.ContinualSVDConfig(preserve=0.2, constraint="input"),
    "continual_svd core": peft_subspace.ContinualSVDConfig(constraint="core"),
    "continual_svd_r": peft_subspace.ContinualSVDConfig(r=16),
    "continual_svd_r output": peft_subspace.ContinualSVDConfig(r=4, preserve=0.7, constraint="output"),
    "flora": peft_subspace.FLoRAConfig(),
    "flora 32": peft_subspace.FLoRAConfig(r=[16, 32]),
    "lora_sb": peft_subspace.LoRASBConfig(),
    "lora_sb 4": peft_subspace.LoRASBConfig(r=4),
    "mos": peft_subspace.MoSConfig(r=16, equivalent_r=16, private_r=16),
}
LAYERS = {
    "square": lambda: nn.Linear(96, 96),
    "wide": lambda: nn.Linear(64, 192),
    "tall": lambda: nn.Linear(192, 64),
    "convolution": lambda: nn.Conv2d(48, 64, 3),
}


def adapted(layer, config, **options):
    torch.manual_seed(0)
    config.target_modules = ["layer"]
    return get_peft_model(Net(layer), config)


def first_step(model, rate=1e-3):
    """Norm of what a step of `rate`, up or down, in every trainable parameter does to the update."""
    layer = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
    before = layer.get_delta_weight("default").detach().clone()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += rate * torch.randn(parameter.shape, generator=generator).sign()
    return (layer.get_delta_weight("default") - before).norm().item()


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_first_step_is_as_long_as_that_of_lora(config, build):
    wanted = first_step(adapted(build(), LoraConfig()))
    assert first_step(adapted(build(), config)) == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        (peft_subspace.FLoRAConfig(r=4, scaling="paper"), 2),
        (peft_subspace.MoSConfig(r=4, private_r=4, equivalent_r=4, scaling="paper"), 4),
        (peft_subspace.LoRASBConfig(scaling="paper"), 1),
        (peft_subspace.ContinualSVDConfig(scaling="paper"), 1),
        (peft_subspace.EffortConfig(), 1),
        (peft_subspace.EffortConfig(scaling=0.5), 0.5),
        (peft_subspace.LoRASBConfig(scaling=3), 3),
        (peft_subspace.FLoRAConfig(r=4, alpha=2), 0.5),
        (peft_subspace.FLoRAConfig(scale=0.25), 0.25),
        (peft_subspace.MoSConfig(alpha=16, scaling=0.5), 0.5),
    ],
)
def test_constants_of_the_authors_and_numbers_are_taken_as_they_are(config, scaling, tmp_path):
    model = adapted(nn.Linear(48, 32), config)
    assert tuner_layer(model).scaling["default"] == scaling
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(nn.Linear(48, 32)), tmp_path)
    assert tuner_layer(loaded).scaling["default"] == scaling


@pytest.mark.parametrize("config_cls", [type(config) for config in OURS.values()], ids=OURS)
@pytest.mark.parametrize(
    ("scaling", "error", "message"),
    [
        ("fast", ValueError, r'scaling=\'fast\' must be "auto", "paper", or a number'),
        (float("nan"), ValueError, "scaling=nan must be finite"),
        (None, TypeError, "scaling=None must be a number"),
    ],
)
def test_other_values_are_refused(config_cls, scaling, error, message):
    with pytest.raises(error, match=message):
        config_cls(scaling=scaling)


def test_files_of_version_1_keep_the_scaling_that_they_were_made_with():
    assert peft_subspace.LoRASBConfig(format_version=1).scaling == "paper"
    assert peft_subspace.FLoRAConfig(format_version=1, alpha=8, scale=0.5).scaling == 0.5
