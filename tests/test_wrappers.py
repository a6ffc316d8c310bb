"""Models whose parameters are plain tensors while they run: in replicas, in shards, in functional calls."""

import importlib
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy
from torch.func import functional_call

from layers import Net, adapt, distance, trainables, tuner_layer
from methods import METHODS
from peft_subspace import EffortConfig, FLoRAConfig, regularization_loss
from processes import run_in_two_processes

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

replication = importlib.import_module("torch.nn.parallel.replicate")


class Experts(nn.Module):
    """A module with a parameter that is no layer's weight."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.stack, x)


@pytest.fixture
def replicate(monkeypatch):
    """`nn.DataParallel`'s replicas, two of them, sent to a device that is there."""

    def copies(tensors, devices, *_, detach=False):
        return [[tensor.to(device, copy=True) for tensor in tensors] for device in devices]

    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replication.comm, "broadcast_coalesced", copies)
    monkeypatch.setattr(replication, "_get_device_index", lambda device, *_: device)
    return lambda model, device="cpu": replication.replicate(model, ["cpu", device])


@pytest.mark.feature("nn.DataParallel")
def test_replicas_give_the_same_output_and_gradients(method, case, replicate):
    model, x = adapt(method, case), case.inputs()
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in trainables(model).items()}
    model.zero_grad()
    halves = [replica(half) for replica, half in zip(replicate(model), x.chunk(2), strict=True)]
    assert distance(torch.cat(halves), model(x)) < 1e-6
    torch.cat(halves).square().sum().backward()
    for name, parameter in trainables(model).items():
        assert distance(parameter.grad, expected[name]) < 1e-5


@pytest.fixture
def meta_autocast(monkeypatch):
    """The meta device, which computes nothing on no other device, has no autocast of its own."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.where(method="alone")
def test_replicas_use_nothing_of_another_device(method, case, replicate, meta_autocast):
    model = adapt(method, case)
    assert replicate(model, "meta")[1](case.inputs().to("meta")).is_meta


def test_replicas_of_a_parameter_of_its_own_use_nothing_of_another_device(replicate, meta_autocast):
    config = FLoRAConfig(r=2, target_parameters=["layer.stack"], init_weights=False)
    model, x = get_peft_model(Net(Experts()), config), torch.randn(2, 4)
    here, there = replicate(model, "meta")
    assert there(x.to("meta")).is_meta
    assert distance(here(x), model(x)) < 1e-6


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_functional_call_gives_the_same_output(method, case, mode):
    model, x = adapt(method, case).train(mode), case.inputs()
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert distance(functional_call(model, tensors, (x,)), model(x)) < 1e-6
    with torch.no_grad():
        expected = model(x)
        for parameter in model.parameters():
            parameter.zero_()
    assert distance(functional_call(model, tensors, (x,)), expected) < 1e-6


class Returning(nn.Module):
    """A model that returns its loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


@pytest.mark.filterwarnings("error")
def test_replicas_add_the_loss_terms_once_and_tell_the_adapter(replicate):
    config = EffortConfig(r=2, target_modules=["layer"], orthogonality_weight=0.5, energy_weight=0.5)
    model, x = get_peft_model(Returning(), config), torch.randn(4, 7)
    delta = tuner_layer(model).deltas["default"]
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for _ in range(2):  # beyond the first step there are loss terms, and a look whether they have arrived
        torch.stack([replica(x)["loss"] for replica in replicate(model)]).mean().backward()
        optimizer.step()
        gradients = [parameter.grad.clone() for parameter in delta.parameters()]
        assert delta.penalized_at is not None
        optimizer.zero_grad()
    for parameter in delta.parameters():
        parameter.data += 0.1
    replicas = replicate(model)
    torch.stack([replica(x)["loss"] for replica in replicas]).mean().backward()
    gradients = [parameter.grad.clone() for parameter in delta.parameters()]
    model.zero_grad()
    (model(x)["loss"]).backward()
    for parameter, gradient in zip(delta.parameters(), gradients, strict=True):
        assert distance(gradient, parameter.grad) < 1e-5
    assert regularization_loss(model) > 0


# ------------------------------------------------------------------------------------------------- FSDP1


class Network(nn.Module):
    """A convolution and linear layers, so that methods can share between them."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 2, stride=2)
        self.blocks = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).mean(2)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def network(method, all_train):
    torch.manual_seed(0)
    targets = ["patches", "blocks.0", "blocks.1"]
    if method is None:
        model = get_peft_model(Network(), LoraConfig(r=2, target_modules=targets))
    else:
        model = get_peft_model(Network(), method.config(target_modules=targets, seed=0))
    return model.requires_grad_(True) if all_train else model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 4, 4, generator=generator), torch.randn(8, 4, generator=generator)


def train(model, x, y):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def whole(model):
    return None


def by_layer(model):
    return ModuleWrapPolicy({type(module) for module in model.modules() if hasattr(module, "base_layer")})


def by_size(model):
    return partial(size_based_auto_wrap_policy, min_num_params=8)


UNITS = [whole, by_layer, fsdp_auto_wrap_policy, by_size]
LORA_AND_METHODS = [None, *METHODS]


def shard_and_train(rank, folder):
    x, y = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    for units in UNITS:
        for original in (True, False):
            for method in LORA_AND_METHODS:
                mixed = original or units is fsdp_auto_wrap_policy
                model = network(method, all_train=not mixed)
                wrapped = FullyShardedDataParallel(
                    model, auto_wrap_policy=units(model), use_orig_params=original,
                    device_id=torch.device("cpu"),
                )  # fmt: skip
                losses = train(wrapped, x[mine], y[mine])
                torch.distributed.all_reduce(losses)
                torch.save(losses / 2, folder / f"{units.__name__}-{original}-{method}.pt")


@pytest.fixture(scope="module")
def trained_in_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp1")
    run_in_two_processes(shard_and_train, folder)
    return folder


@pytest.mark.feature("FSDP1, use_orig_params either way")
@pytest.mark.filterwarnings("ignore:adapter .* trains in bases taken from the base weight")
@pytest.mark.parametrize("original", [True, False], ids=["originals", "flat"])
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("method", LORA_AND_METHODS, ids=str)
def test_two_processes_with_shards_train_as_one_does(method, units, original, trained_in_shards):
    model = network(method, all_train=not (original or units is fsdp_auto_wrap_policy))
    losses = train(model, *batch())
    assert losses[-1] < losses[0]
    found = torch.load(trained_in_shards / f"{units.__name__}-{original}-{method}.pt")
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
