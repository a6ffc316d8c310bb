"""The worked example of docs/developer/adding_a_method.md does what the text says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import nn

import peft_subspace

GUIDE = Path(__file__).parent.parent / "docs" / "developer" / "adding_a_method.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Names that the example defines, from a file as a contributor would have it."""
    found = re.search(r"<!-- example: method -->\n```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert found
    file = tmp_path_factory.mktemp("method") / "lorafa.py"
    file.write_text(found[1])
    assert len(found[1].splitlines()) < 60
    yield runpy.run_path(str(file), run_name="lorafa")
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        mapping.pop(PeftType["LORAFA"], None)  # other tests count the registered methods


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(11, 6)
        self.convolution = nn.Conv1d(6, 8, 3)
        self.linear = nn.Linear(8, 5)

    def forward(self, ids):
        return self.linear(self.convolution(self.embedding(ids).mT).mT)


TARGETS = ["embedding", "convolution", "linear"]
IDS = torch.arange(10).view(2, 5)


@pytest.fixture
def model(example):
    config = example["LoRAFAConfig"](r=3, target_modules=TARGETS, init_weights=False, seed=2)
    return peft.get_peft_model(Network(), config)


def test_update_is_the_equation(model):
    layer = model.base_model.model.linear
    delta = layer.deltas["default"]
    scaling = layer.scaling["default"]
    assert torch.allclose(layer.get_delta_weight("default"), scaling * delta.B @ delta.A, atol=1e-6)
    assert scaling == model.peft_config["default"].paper_alpha / 3


def test_only_b_trains_and_moves(model):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name.split(".")[-1] for name in trained] == ["B"] * 3
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model(IDS).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in trained.items())


def test_merge_and_unmerge_are_exact(model):
    base = {name: p.clone() for name, p in model.named_parameters()}
    wanted = model(IDS)
    model.merge_adapter()
    assert torch.allclose(model(IDS), wanted, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())


def test_saved_adapter_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    for load in (peft.PeftModel.from_pretrained, peft_subspace.load):
        assert torch.equal(load(Network(), str(tmp_path))(IDS), model(IDS))


def test_lora_export_is_exact(model, tmp_path):
    peft_subspace.export_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(Network(), str(tmp_path))
    assert torch.allclose(lora(IDS), model(IDS), atol=1e-5)
