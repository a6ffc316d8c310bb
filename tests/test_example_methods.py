"""Methods of examples/methods: an update that is no chain of matrices lives like any other adapter."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import peft_subspace

FOLDER = Path(__file__).parent.parent / "examples" / "methods"


@pytest.fixture(scope="module")
def dora():
    sys.path.insert(0, str(FOLDER))
    yield __import__("dora")
    sys.path.remove(str(FOLDER))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.transposed = Conv1D(7, 8)
        self.linear = nn.Linear(7, 5)

    def forward(self, x):
        return self.linear(self.transposed(self.conv(x).mT.contiguous()))


NAMES = ["conv", "transposed", "linear"]
X = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(2))


def adapted(dora, **options):
    return get_peft_model(Network(), dora.DoRAConfig(r=3, target_modules=NAMES, seed=4, **options))


def dense(model, dora):
    """Outputs of the base model with weights made row by row."""
    state = {}
    for name in NAMES:
        layer = model.base_model.model.get_submodule(name)
        delta = layer.deltas["default"]
        weight = layer.get_base_layer().weight.detach()
        rows = (weight.T if name == "transposed" else weight).flatten(1) + delta.B @ delta.A
        new = torch.stack([m * row / row.square().sum().sqrt() for m, row in zip(delta.m, rows, strict=True)])
        state[f"{name}.weight"] = (new.T if name == "transposed" else new).reshape(weight.shape)
    return functional_call(Network(), state, (X,))


def test_starts_at_the_base_model_and_equals_the_loops_after_training(dora):
    model = adapted(dora)
    torch.testing.assert_close(model(X), Network()(X))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(X).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model(X), dense(model, dora))


def test_gradients_equal_those_of_the_loops(dora):
    model = adapted(dora, init_weights=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(y.sin().sum(), parameters) for y in (model(X), dense(model, dora)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_merges_unmerges_and_is_disabled_exactly(dora):
    model = adapted(dora, init_weights=False)
    expected, state = model(X), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with model.disable_adapter():
        assert torch.equal(model(X), Network()(X))
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_several_adapters_each_update_the_original_weight(dora):
    model = adapted(dora, init_weights=False)
    layer = model.base_model.model.linear
    model.add_adapter("other", dora.DoRAConfig(r=2, target_modules=NAMES, seed=5, init_weights=False))
    updates = [layer.get_delta_weight(name) for name in ("default", "other")]
    weight = layer.get_base_layer().weight.clone()
    layer.merge(adapter_names=["default"])
    torch.testing.assert_close(layer.get_delta_weight("other"), updates[1])
    layer.merge(adapter_names=["other"])
    torch.testing.assert_close(layer.get_base_layer().weight, weight + sum(updates))


def test_saved_adapter_loads_and_belongs_to_its_base(dora, tmp_path):
    model = adapted(dora, init_weights=False)
    model.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        torch.testing.assert_close(load(Network(), tmp_path)(X), model(X))
        other = Network()
        other.linear.weight.data += 0.1
        with pytest.raises(ValueError, match="linear: the base weight is not the one"):
            load(other, tmp_path)


def test_what_needs_factors_is_refused(dora, tmp_path):
    model = adapted(dora)
    with pytest.raises(ValueError, match="an update that is no chain of matrices"):
        peft_subspace.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with pytest.raises(ValueError, match="no adapter of this method is their sum"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


def test_files_are_short():
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
