"""DeepSpeed's ZeRO-3 keeps a part of each weight in every process; a stand-in for it keeps none at all."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import integrations
from torch import nn

NUMBER = iter(range(10**6))


class Twice(nn.Module):
    """Two layers of one shape, which take the same place in memory when one is gathered after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def network():
    torch.manual_seed(0)
    return Twice()


class GatheredParameters:
    """Gives the weights back for as long as the context lasts, as DeepSpeed's does."""

    def __init__(self, parameters, modifier_rank=None, fwd_module=None):
        assert modifier_rank is None  # nothing is written
        self.parameters = [p for p in parameters if hasattr(p, "ds_id")]

    def __enter__(self):
        for parameter in self.parameters:
            parameter.data = parameter.whole.clone()

    def __exit__(self, *_):
        for parameter in self.parameters:
            parameter.data = torch.empty(0)


@contextmanager
def engine(model):
    """Run the model as the engine does, which gathers each module's weights around its forward."""
    handles = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
        if own:
            gathered = GatheredParameters(own)
            handles += [
                module.register_forward_pre_hook(lambda *_, g=gathered: g.__enter__()),
                module.register_forward_hook(lambda *_, g=gathered: g.__exit__()),
            ]
    yield model
    for handle in handles:
        handle.remove()


def partition(model):
    for parameter in model.parameters():
        parameter.whole, parameter.ds_shape = parameter.data.clone(), parameter.shape
        parameter.ds_id = next(NUMBER)
        parameter.data = torch.empty(0)
    return model


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch):
    module = ModuleType("deepspeed")
    module.zero = SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    monkeypatch.setattr(integrations, "check_deepspeed_zero3_enabled", lambda: True)


@pytest.mark.feature("DeepSpeed ZeRO-3")
@pytest.mark.parametrize("init_weights", [True, False])
def test_partitioned_weights_are_gathered_to_start_from(method, init_weights, tmp_path, record_property):
    record_property("not run", "DeepSpeed runs on accelerators; a stand-in that partitions alike is tested")
    config = method.config(target_modules=["first", "second"], init_weights=init_weights, seed=0)
    whole = get_peft_model(network(), config).eval()
    part = get_peft_model(partition(network()), config).eval()
    wanted = {name: tensor for name, tensor in whole.state_dict().items() if method.prefix in name}
    found = part.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert part.base_model.model.first.base_layer.weight.numel() == 0
    x = torch.randn(5, 12)
    with engine(part):
        torch.testing.assert_close(part(x), whole(x), rtol=1e-5, atol=1e-6)
    part.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(partition(network()), tmp_path)
    with engine(loaded):
        torch.testing.assert_close(loaded(x), whole(x), rtol=1e-5, atol=1e-6)
