"""Where an adapter's tensors are, and in which dtype, as PEFT is asked."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import peft_subspace


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv, self.last = nn.Linear(12, 12), nn.Conv1d(4, 6, 3), nn.Linear(6, 5)
        self.to(dtype)
        self.x = torch.linspace(-1, 1, 24, dtype=dtype).view(2, 12)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.conv(x.view(-1, 4, 3)).flatten(1))


def config(method, **options):
    return method.config(**{"target_modules": ["first", "conv", "last"], "init_weights": False, **options})


def tensors(model, name):
    """The adapter's tensors, shared ones included."""
    return {key: tensor for key, tensor in model.state_dict().items() if f".{name}." in key}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.feature("`low_cpu_mem_usage`")
def test_adapters_to_be_loaded_have_no_memory(method, tmp_path, dtype, autocast):
    saved = get_peft_model(Net(dtype), config(method)).eval()
    saved.save_pretrained(tmp_path)
    model = get_peft_model(Net(dtype), config(method), low_cpu_mem_usage=True)
    model.add_adapter("more", config(method), low_cpu_mem_usage=True)
    for name in ("default", "more"):
        found = tensors(model, name)
        assert found
        assert all(tensor.is_meta for tensor in found.values()), name
    options = {"autocast_adapter_dtype": autocast}
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        lean = load(Net(dtype), tmp_path, low_cpu_mem_usage=True, **options)
        plain = load(Net(dtype), tmp_path, **options)
        lean.load_adapter(tmp_path, "more", low_cpu_mem_usage=True, **options)
        for name in ("default", "more"):
            lean.set_adapter(name)
            assert torch.equal(lean.eval()(Net(dtype).x), plain.eval()(Net(dtype).x))
            for key, tensor in tensors(plain, "default").items():
                other = lean.state_dict()[key.replace(".default.", f".{name}.")]
                assert (other.dtype, other.device) == (tensor.dtype, tensor.device), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.feature("`autocast_adapter_dtype=False`: all that trains in the base's dtype")
def test_one_dtype_trains_where_peft_is_asked_not_to_cast(method, tmp_path, dtype):
    model = get_peft_model(Net(dtype), config(method), autocast_adapter_dtype=False)
    model.add_adapter("more", config(method), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    readers = (PeftModel.from_pretrained, peft_subspace.load)
    choices = itertools.product(readers, (True, False), (True, False))
    loaded = [
        load(Net(dtype), tmp_path, autocast_adapter_dtype=False, is_trainable=trains, low_cpu_mem_usage=lean)
        for load, trains, lean in choices
    ]
    rounding = 4 * torch.finfo(dtype).eps  # of factors that were confined in fp32
    for one in (model, *loaded):
        assert {p.dtype for p in one.parameters()} == {dtype}
        one.set_adapter("default")
        x = Net(dtype).x
        torch.testing.assert_close(
            one.eval()(x), model.set_adapter("default") or model.eval()(x), rtol=rounding, atol=rounding
        )
    model.train()(Net(dtype).x).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.grad.dtype for p in trained if p.grad is not None} == {dtype}
    cast = get_peft_model(Net(dtype), config(method))
    assert {p.dtype for p in cast.parameters() if p.requires_grad} == {torch.float32}
    layer = model.base_model.model.first
    for buffer in layer.deltas["default"].buffers():  # what is frozen stays exact
        assert buffer.dtype in (torch.float32, torch.int32)


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("constraint", ["both", "core", "input", "output"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_protection_is_that_of_fp32_with_less_in_the_parameters(constraint, r, dtype):
    config = peft_subspace.ContinualSVDConfig(
        r=r, target_modules=["first", "conv"], init_weights=False, constraint=constraint
    )
    model = get_peft_model(Net(dtype), config, autocast_adapter_dtype=False)
    assert peft_subspace.continual.subspace_leak(model)["max"] < 1e-5


def test_losses_are_taken_in_one_dtype():
    config = peft_subspace.EffortConfig(
        r=2, target_modules=["first", "conv"], init_weights=False, orthogonality_weight=1.0, energy_weight=1.0
    )
    model = get_peft_model(Net(torch.bfloat16), config, autocast_adapter_dtype=False)
    loss = peft_subspace.regularization_loss(model)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
