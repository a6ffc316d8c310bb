"""What is around a model: replicas, shards, functional calls, inference mode, transforms, compilers."""

import copy
import importlib
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from layers import BOTH, Net, activate, adapt, distance, trainables, tuner_layer, two_adapters
from methods import METHODS
from peft_subspace import (
    ContinualSVDConfig,
    EffortConfig,
    FLoRAConfig,
    LoRASBConfig,
    load,
    regularization_loss,
)
from peft_subspace.continual import next_task
from processes import losses_of, run_in_two_processes

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


@pytest.mark.typical("layers")
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


@pytest.mark.typical("layers")
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


@pytest.mark.typical("layers")
def test_functional_call_gives_the_same_output(method, case):
    model, x = adapt(method, case), case.inputs()
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = {mode: model.train(mode)(x) for mode in (True, False)}
    for values_of_its_own in (True, False):
        for mode, output in expected.items():
            assert distance(functional_call(model.train(mode), tensors, (x,)), output) < 1e-6
        if values_of_its_own:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()


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


TARGETS = ["patches", "blocks.0", "blocks.1"]


def network(method, all_train=False, **options):
    torch.manual_seed(0)
    if method is None:
        model = get_peft_model(Network(), LoraConfig(r=2, target_modules=TARGETS))
    else:
        model = get_peft_model(Network(), method.config(target_modules=TARGETS, seed=0, **options))
    return model.requires_grad_(True) if all_train else model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 4, 4, generator=generator), torch.randn(8, 4, generator=generator)


def train(model, x, y):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return losses_of(partial(model, x), optimizer, y, steps=3)


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


class Scaled(nn.Linear):
    """A layer with a forward of its own, which is called with `W + ΔW`."""

    def forward(self, x):
        return super().forward(2 * x)


class Expert(nn.Module):
    """Two parameters of one module."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 12) / 4)
        self.down = nn.Parameter(torch.randn(3, 12, 12) / 4)

    def forward(self, x):
        return torch.einsum("bi,eio,eoj->bj", x, self.up, self.down)


class Unusual(nn.Module):
    """Modules that are called with an updated weight."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2)
        self.recurrent = nn.GRU(12, 12)
        self.scaled = Scaled(12, 12)
        self.expert = Expert()

    def forward(self, x):
        x = self.recurrent(self.attention(x, x, x)[0])[0]
        return self.expert(self.scaled(x))


PLACES = {
    "attention": {"target_modules": ["attention"]},
    "recurrent": {"target_modules": ["recurrent"]},
    "scaled": {"target_modules": ["scaled"]},
    "parameter": {"target_parameters": ["expert.up"]},
    "parameters": {"target_parameters": ["expert.up", "expert.down"]},
}


def unusual(place, all_train):
    torch.manual_seed(0)
    config = FLoRAConfig(r=2, seed=0, init_weights=False, **PLACES[place])
    model = get_peft_model(Unusual(), config)
    return model.requires_grad_(True) if all_train else model


def run_in_shards(rank, folder):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    for place, original in product(PLACES, (True, False)):
        model = unusual(place, all_train=not original)
        result = model(x).detach()
        wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        torch.save(distance(wrapped(x).detach(), result), folder / f"{place}-{original}-{rank}.pt")


@pytest.fixture(scope="module")
def run_with_updated_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp1")
    run_in_two_processes(run_in_shards, folder)
    return folder


@pytest.mark.parametrize("original", [True, False], ids=["originals", "flat"])
@pytest.mark.parametrize("place", PLACES)
def test_no_update_of_a_weight_is_lost_in_shards(place, original, run_with_updated_weights):
    for rank in range(2):
        assert torch.load(run_with_updated_weights / f"{place}-{original}-{rank}.pt") < 1e-5


class Unit(nn.Module):
    """A module around another, which it passes for, as FSDP1's."""

    def __init__(self, module):
        super().__init__()
        self.inner = module

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("place", ["scaled", "parameter", "parameters"])
def test_no_update_is_lost_where_a_unit_is_inside_an_adapted_module(place):
    model = unusual(place, all_train=False)
    for layer in [module for module in model.modules() if hasattr(module, "base_layer")]:
        layer.base_layer = Unit(layer.base_layer)
    with pytest.raises(RuntimeError, match=r"is in a module of its own inside the adapted one.*not there"):
        model(torch.randn(8, 12))


# --------------------------------------------------------------------------------- DDP with unused targets


class Routed(Network):
    """A network that sends no sample to one of its layers, or, with an argument, to two."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(12, 12)

    def forward(self, x, short=False):
        x = self.patches(x).flatten(2).mean(2)
        for block in self.blocks[: 1 if short else 2]:
            x = x + torch.tanh(block(x))
        return self.head(x)


WAYS = {"unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}


def routed(method):
    torch.manual_seed(0)
    targets = [*TARGETS, "spare"]
    config = LoraConfig(r=2, target_modules=targets) if method is None else None
    return get_peft_model(Routed(), config or method.config(target_modules=targets, seed=0))


def train_with_unused(rank, folder):
    x, y = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    for way, options in WAYS.items():
        for method in LORA_AND_METHODS:
            model = routed(method)
            wrapped = DistributedDataParallel(model, **options)
            short = rank == 1 and way == "unused"
            optimizer = torch.optim.SGD(trainables(model).values(), lr=0.1)
            losses = losses_of(partial(wrapped, x[mine], short=short), optimizer, y[mine], steps=3)
            torch.distributed.all_reduce(losses)
            torch.save(losses / 2, folder / f"{way}-{method}.pt")


@pytest.fixture(scope="module")
def trained_with_unused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    run_in_two_processes(train_with_unused, folder)
    return folder


@pytest.mark.feature("DDP with targets that are not used")
@pytest.mark.filterwarnings("ignore:adapter .* trains in bases taken from the base weight")
@pytest.mark.filterwarnings("ignore:adapter .* got no gradient .* in 1 of 4 layers. spare")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", LORA_AND_METHODS, ids=str)
def test_two_processes_train_as_one_where_layers_go_unused(method, way, trained_with_unused):
    x, y = batch()
    model = routed(method)
    optimizer = torch.optim.SGD(trainables(model).values(), lr=0.1)
    halves = [(x[:4], False), (x[4:], way == "unused")]
    call = lambda: torch.cat([model(half, short=short) for half, short in halves])  # noqa: E731
    losses = losses_of(call, optimizer, y, steps=3)
    assert losses[-1] < losses[0]
    found = torch.load(trained_with_unused / f"{way}-{method}.pt")
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- inference mode


def merge_for_good(model, method, folder):
    return model.merge_and_unload().requires_grad_(True)


def merge_and_go_back(model, method, folder):
    model.merge_adapter()
    model.unmerge_adapter()


def merge_and_disable(model, method, folder):
    model.merge_adapter()
    with model.disable_adapter():
        model(batch()[0])


def add_another(model, method, folder):
    model.add_adapter("other", method.config(target_modules=TARGETS, init_weights=False))
    model.set_adapter("other")


def wrap_another(model, method, folder):
    return get_peft_model(model.unload(), method.config(target_modules=TARGETS, init_weights=False))


def save_and_load(model, method, folder):
    model.save_pretrained(folder)
    return load(model.unload(), folder, is_trainable=True)


def go_on_to_the_next_task(model, method, folder):
    if isinstance(method.config(), ContinualSVDConfig):
        next_task(model, "two")


INSIDE = [
    merge_for_good, merge_and_go_back, merge_and_disable, add_another, wrap_another, save_and_load,
    go_on_to_the_next_task,
]  # fmt: skip


def check_that_it_trains(model):
    caches = [cache.basis for module in model.modules() if (cache := getattr(module, "_range", None))]
    tensors = [*trainables(model).values(), *model.buffers(), *caches]
    assert not any(tensor.is_inference() for tensor in tensors)
    before = {name: parameter.detach().clone() for name, parameter in trainables(model).items()}
    train(model, *batch())
    assert any(not torch.equal(before[name], now) for name, now in trainables(model).items())


@pytest.mark.filterwarnings("ignore:adapter .* trains in bases taken from the base weight")
@pytest.mark.parametrize("action", INSIDE, ids=lambda action: action.__name__)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_is_written_in_inference_mode_can_be_trained_with(method, action, tmp_path):
    model = network(method, init_weights=False)
    with torch.inference_mode():
        model = action(model, method, tmp_path) or model
    check_that_it_trains(model)


def test_an_adapter_of_a_mixed_batch_in_inference_mode_trains_afterwards():
    for config in (LoRASBConfig, FLoRAConfig):
        base = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 6))
        model = get_peft_model(base, config(r=3, target_modules=["0", "2"], init_weights=False))
        with torch.inference_mode():  # frozen tensors move together, and apart again
            model.eval()(torch.ones(2, 20), adapter_names=["default", "__base__"])
            model.train()
        assert not any(tensor.is_inference() for tensor in model.state_dict().values())
        model(torch.ones(2, 20)).sum().backward()


@pytest.mark.parametrize("config", [EffortConfig, ContinualSVDConfig])
def test_a_start_that_waits_for_the_weight_may_be_in_inference_mode(config):
    method = next(method for method in METHODS if method.config_cls is config)
    with torch.device("meta"):
        model = network(method)
    there = network(method)
    base = {name: tensor for name, tensor in there.state_dict().items() if "delta" not in name}
    model.load_state_dict(base, strict=False, assign=True)
    with torch.inference_mode():
        model(batch()[0])
    for (name, buffer), expected in zip(model.named_buffers(), there.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)
    check_that_it_trains(model)


def test_loss_terms_that_are_looked_at_in_inference_mode_train_as_without():
    gradients = []
    for look in (regularization_loss, lambda model: None):
        config = EffortConfig(
            r=2, target_modules=["head"], orthogonality_weight=1.0, init_weights=False, seed=0
        )
        torch.manual_seed(0)
        model = get_peft_model(Network(), config)
        with torch.inference_mode():
            look(model)
        regularization_loss(model).backward()
        gradients.append(
            torch.stack([p.grad.norm() for p in trainables(model).values() if p.grad is not None])
        )
        check_that_it_trains(model)
    assert torch.equal(*gradients)


# ------------------------------------------------------------------------------------------- optimizers


class Sharpness(torch.optim.Optimizer):
    """A wrapper that has parameters of its own, by name, by identity and in a tuple, beside one inside."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.inner = [torch.optim.SGD(parameters, lr=0.1, momentum=0.9)]
        self.own, self.named = tuple(parameters), {f"p{i}": p for i, p in enumerate(parameters)}
        self.sizes, self.all = {id(p): 0.01 for p in parameters}, set(parameters)

    def step(self, closure=None):
        loss = closure()
        for parameter in self.own:
            parameter.data += self.sizes[id(parameter)] * parameter.grad
        assert self.all == set(self.own)
        closure()
        for parameter in self.named.values():
            parameter.data -= 0.01 * parameter.grad
        self.inner[0].step()
        return loss


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=4),
    "line search": lambda parameters: torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe"),
    "wrapper": Sharpness,
    "accelerate": lambda parameters: AcceleratedOptimizer(torch.optim.LBFGS(parameters, max_iter=4)),
}


def take_steps(model, optimizer, shift=0.0):
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y + shift)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_next_task_trains_as_with_a_fresh_optimizer(optimizer, r):
    Accelerator(cpu=True)
    config = ContinualSVDConfig(r=r, preserve=2, target_modules=TARGETS, seed=0, init_weights=r is None)
    model = get_peft_model(Network(), config, "one")
    lasting = optimizer(trainables(model).values())
    take_steps(model, lasting)
    next_task(model, "two", optimizer=lasting)
    twin = copy.deepcopy(model)
    start = {name: parameter.detach().clone() for name, parameter in trainables(model).items()}
    take_steps(model, lasting, shift=1.0)
    take_steps(twin, optimizer(trainables(twin).values()), shift=1.0)
    for parameter, expected in zip(trainables(model).values(), trainables(twin).values(), strict=True):
        assert torch.equal(parameter, expected)
    assert any(not torch.equal(parameter, start[name]) for name, parameter in trainables(model).items())


def test_rows_of_tokens_go_on_with_the_optimizer():
    for keep in ("merge", "stack"):
        base = nn.Sequential(OrderedDict(words=nn.Embedding(5, 6), body=nn.Linear(6, 4)))
        options = {"target_modules": ["body"], "trainable_token_indices": {"words": [1, 2]}}
        model = get_peft_model(base, ContinualSVDConfig(r=2, preserve=2, **options), "one")
        optimizer = torch.optim.SGD(trainables(model).values(), lr=0.1)
        next_task(model, "two", keep=keep, optimizer=optimizer)
        start = {name: p.detach().clone() for name, p in trainables(model).items()}
        for _ in range(2):  # in the first step B is zero
            model(torch.arange(5)).square().sum().backward()
            optimizer.step()
        assert any("trainable_tokens_delta.two" in name for name in start)
        assert all(not torch.equal(start[name], p) for name, p in trainables(model).items())


class Lookahead(torch.optim.SGD):
    """An optimizer with slow copies of its parameters."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


def test_an_optimizer_with_copies_of_the_parameters_is_refused():
    model = get_peft_model(Network(), ContinualSVDConfig(r=2, preserve=2, target_modules=TARGETS), "one")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Lookahead has, as 'slow', copies .* make a new one afterwards"):
        next_task(model, "two", optimizer=Lookahead(trainables(model).values()))
    assert list(model.peft_config) == ["one"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------ transforms, exports


class Nested(nn.Module):
    """Parameters that are no layers' weights, of two and three axes, beside weights of modules of torch."""

    def __init__(self):
        super().__init__()
        self.experts = Experts()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.across = nn.ConvTranspose1d(4, 3, 2, stride=2)

    def forward(self, x):
        x = self.normed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.experts(x.mean(1)).mean(1)[:, None, :4]
        return self.across(x.transpose(1, 2))


def nested(method):
    torch.manual_seed(1)
    options = {
        "target_modules": ["out_proj", "normed", "across"],
        "target_parameters": ["experts.stack", "attention.in_proj_weight"],
    }
    return get_peft_model(Nested(), method.config(init_weights=False, seed=3, **options))


def adapted(method, case, adapters):
    return adapt(method, case) if adapters == 1 else activated(two_adapters(method, case))


def activated(model):
    activate(model, *BOTH)
    return model


def tensors_of(model):
    return {name: parameter.detach().clone() for name, parameter in trainables(model).items()}


def check_gradients_per_sample(model, inputs):
    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).square().sum()

    x = inputs(batch=4)
    found = vmap(grad(loss), in_dims=(None, 0))(tensors_of(model), x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        for name, parameter in trainables(model).items():
            assert distance(found[name][i], parameter.grad) < 1e-3


def check_forward_mode(model, inputs):
    x = inputs(batch=4)
    if not x.is_floating_point():
        x = x.clamp_min(4)  # beyond all padding, which torch keeps from training in reverse mode only
    point = tensors_of(model)
    tangent = {name: torch.randn_like(tensor) for name, tensor in point.items()}
    y, moved = jvp(lambda tensors: functional_call(model, tensors, (x,)), (point,), (tangent,))
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(tensor, tangent[name]) for name, tensor in point.items()}
        again = forward_ad.unpack_dual(functional_call(model, dual, (x,))).tangent
    assert distance(y, model(x)) < 1e-5
    assert distance(again, moved) < 1e-5
    direction = torch.randn_like(y)
    model.zero_grad()
    model(x).backward(direction)
    back = sum((parameter.grad * tangent[name]).sum() for name, parameter in trainables(model).items())
    assert abs(back - (direction * moved).sum()) < 1e-4 * direction.norm() * moved.norm()


def check_export(model, inputs, has_length=False):
    sizes = {0: torch.export.Dim("batch", min=2, max=1024)}
    if has_length:
        sizes[1] = torch.export.Dim("length", min=2, max=1024)
    program = torch.export.export(model, (inputs(batch=4),), dynamic_shapes={"args": (sizes,)}).module()
    for batch, length in ((2, 9), (300, 3)):  # few samples, for which a dense update pays, and many
        x = inputs(batch=batch)
        x = x[:, :1].repeat_interleave(length, 1) if has_length else x
        assert distance(program(x), model(x)) < 1e-5


@pytest.mark.feature("gradients per sample, by vmap(grad)")
def test_gradients_per_sample_are_those_of_each_sample_alone(method, case):
    for adapters in (1, 2):
        check_gradients_per_sample(adapted(method, case, adapters), case.inputs)


@pytest.mark.typical("layers")
@pytest.mark.feature("forward-mode differentiation, by jvp")
def test_forward_mode_is_the_transpose_of_reverse_mode(method, case):
    check_forward_mode(adapt(method, case), case.inputs)


@pytest.mark.typical("layers")
@pytest.mark.parametrize(("adapters", "mode"), [(1, True), (2, False)], ids=["training", "two"])
@pytest.mark.feature("torch.export with dynamic sizes")
def test_exported_program_is_right_at_other_sizes(method, case, adapters, mode):
    has_length = case.kind == "embedding" or (case.kind != "conv" and len(case.size) == 2)
    check_export(adapted(method, case, adapters).train(mode), case.inputs, has_length)


@pytest.mark.parametrize("check", [check_gradients_per_sample, check_forward_mode, check_export])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_weights_that_are_read_go_through_transforms_too(method, check):
    with sdpa_kernel(SDPBackend.MATH):  # the others know no transforms
        check(nested(method), lambda batch: torch.randn(batch, 3, 4))


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_layers_in_place(model):
    for block in model.blocks:
        block.compile(backend="eager")
    return model


@pytest.mark.feature("wrapping a compiled model")
@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_layers_in_place])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_compiled_before_it_is_wrapped_is_adapted(method, compiled):
    torch._dynamo.reset()
    config = method.config(target_modules=["patches", "0", "1"], seed=0, init_weights=False)
    model, (x, y) = get_peft_model(compiled(Network()), config), batch()
    losses = train(model, x, y)
    assert losses[-1] < losses[0]
    trained = model(x)
    with model.disable_adapter():
        assert distance(model(x), trained) > 1e-3
    base = model.merge_and_unload()
    assert distance(base(x), trained) < 1e-5


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_adapter_of_a_compiled_model_is_loaded_by_key_mapping(method, tmp_path):
    config = method.config(target_modules=["patches", "0", "1"], seed=0, init_weights=False)
    plain, x = Network(), batch()[0]
    model = get_peft_model(compiled_whole(copy.deepcopy(plain)), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="_orig_mod"):
        load(copy.deepcopy(plain), tmp_path)
    again = load(copy.deepcopy(plain), tmp_path, key_mapping={r"^_orig_mod\.": ""})
    assert distance(again(x), model(x)) < 1e-6


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_layer_that_a_compiler_holds_is_refused_or_left_out(method):
    def holding():
        model = Network()
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
        return model

    with pytest.raises(TypeError, match=r"blocks\.0\._orig_mod: torch\.compile holds this layer"):
        get_peft_model(holding(), method.config(target_modules=["_orig_mod"]))
    model = get_peft_model(holding(), method.config(target_modules="all-linear"))
    assert not any("blocks.0" in name for name, _ in model.named_modules() if name.endswith("base_layer"))


def test_an_adapted_layer_that_a_compiler_holds_takes_another_adapter(method):
    model, x = network(method), batch()[0]
    model.base_model.model.blocks[0] = torch.compile(model.base_model.model.blocks[0], backend="eager")
    model.add_adapter("other", method.config(target_modules=["_orig_mod"], init_weights=False))
    with torch.no_grad():
        expected = model(x)
        model.set_adapter("other")
        assert distance(model(x), expected) > 1e-3


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_merged_adapter_is_out_before_what_is_disabled_is_traced(method):
    model, x = network(method, init_weights=False), batch()[0]
    with model.disable_adapter():
        expected = model(x)
    merged = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert distance(jvp(model, (x,), (x,))[0], expected) < 1e-6
    assert distance(model(x), merged) < 1e-5
    model.merge_adapter()
    with model.disable_adapter():
        check_export(model, lambda batch: torch.randn(batch, 3, 4, 4))
    assert distance(model(x), merged) < 1e-5


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_mixed_batch_goes_through_transforms_and_keeps_nothing_of_them(method):
    model, x = network(method, init_weights=False), batch()[0][:2]
    model.add_adapter("other", method.config(target_modules=TARGETS, init_weights=False, seed=1))
    names = {"adapter_names": ["default", "other"]}
    twin = copy.deepcopy(model).eval()
    point = tensors_of(model)  # of one adapter, the other might be kept
    tangent = {name: torch.randn_like(tensor) for name, tensor in point.items()}
    y, _ = jvp(lambda tensors: functional_call(model.eval(), tensors, (x,), names), (point,), (tangent,))
    for _ in range(2):
        assert distance(model(x, **names), twin(x, **names)) < 1e-6
    assert distance(y, twin(x, **names)) < 1e-5
