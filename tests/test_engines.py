"""What training engines leave of tensors, and what they keep: stand-ins that need no engine.

DeepSpeed's ZeRO-3 keeps a part of each weight in every process; the stand-in keeps none where the weight was.
Its optimizers keep copies in fp32, which overwrite the parameters. `tests/engines` runs the real ones.
"""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_subspace import (
    ContinualSVDConfig,
    EffortConfig,
    LoRASBConfig,
    NextTaskCallback,
    RegularizationCallback,
    initialize_from_gradient,
    load_trainable_state_dict,
    regularization_loss,
    trainable_state_dict,
)
from peft_subspace.continual import list_tasks, next_task
from peft_subspace.core.delta import Update
from peft_subspace.runtime import distributed

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

    def __init__(self, parameters, modifier_rank=None):
        self.parameters, self.keeps = [p for p in parameters if hasattr(p, "ds_id")], modifier_rank == 0

    def __enter__(self):
        for parameter in self.parameters:
            parameter.data = parameter.whole.clone()

    def __exit__(self, *_):
        for parameter in self.parameters:
            if self.keeps:
                parameter.whole = parameter.data.clone()
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
    utils = ModuleType("deepspeed.utils")
    utils.safe_set_full_fp32_param = lambda p, value: p._hp_mapping.copy_(value)
    utils.safe_set_local_fp32_param = lambda p, value: p._z3_optimizer.copy_(value)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)


@pytest.mark.parametrize("init_weights", [True, False])
def test_partitioned_weights_are_gathered_to_start_from(method, init_weights, tmp_path):
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


# ------------------------------------------------------------------------------ writing what an engine holds

MODULES = ["first", "second"]


@pytest.fixture
def group():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def updates(model):
    return [module for module in model.modules() if isinstance(module, Update)]


def trained(model):
    return [parameter for update in updates(model) for parameter in update.parameters()]


def keep_masters(model):
    """What ZeRO-2 does with the parameters that train."""
    for parameter in trained(model):
        parameter._hp_mapping = parameter.detach().clone()


def split(model, group):
    """What ZeRO-3 does with them; the part of one process is all of it, and here padded by one number."""
    for parameter in trained(model):
        part = nn.functional.pad(parameter.detach().flatten(), (0, 1))
        parameter.ds_tensor, parameter._z3_optimizer, parameter.ds_process_group = part, part.clone(), group
        parameter.whole, parameter.ds_id = parameter.data.clone(), next(NUMBER)
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)


def started(prepare=None):
    model = get_peft_model(network(), LoRASBConfig(r=3, target_modules=MODULES))
    if prepare is not None:
        prepare(model)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(4, 12, generator=generator) for _ in range(2)]
    with engine(model):
        initialize_from_gradient(model, batches, loss_fn=lambda m, x: m(x).square().mean(), progress=False)
    return model


def test_a_gradient_start_reaches_master_copies():
    wanted, model = started(), started(keep_masters)
    for parameter, expected in zip(trained(model), trained(wanted), strict=True):
        assert expected.any()
        assert torch.equal(parameter, expected)
        assert torch.equal(parameter._hp_mapping, expected)


def test_a_gradient_start_reaches_partitions(group):
    wanted, model = started(), started(lambda model: split(model, group))
    for parameter, expected in zip(trained(model), trained(wanted), strict=True):
        assert parameter.numel() == 0
        torch.testing.assert_close(parameter.whole, expected)
        torch.testing.assert_close(parameter._z3_optimizer, nn.functional.pad(expected.flatten(), (0, 1)))
    for update, expected in zip(updates(model), updates(wanted), strict=True):
        torch.testing.assert_close(update.B, expected.B)


def flatten(model):
    for parameter in trained(model):
        parameter._fsdp_flattened = True


def test_a_gradient_start_that_would_be_lost_is_refused():
    with pytest.raises(RuntimeError, match="so the gradient start must come before"):
        started(flatten)


def penalized():
    weights = {"orthogonality_weight": 0.5, "energy_weight": 0.25}
    model = get_peft_model(network(), EffortConfig(r=2, target_modules=MODULES, **weights))
    generator = torch.Generator().manual_seed(3)
    for parameter in trained(model):
        parameter.data.normal_(generator=generator)
    return model


def test_loss_terms_gather_what_is_split(group):
    model, wanted = penalized(), regularization_loss(penalized())
    split(model, group)
    partition(model.base_model.model.first.base_layer)
    assert torch.equal(regularization_loss(model), wanted)
    assert all(parameter.numel() == 0 for parameter in trained(model))
    flatten(model := penalized())
    trained(model)[0].data = torch.zeros(3)
    with pytest.raises(RuntimeError, match="need whole tensors"):
        regularization_loss(model)


def call(callback, event, tmp_path, model, step=0, **options):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    state = TrainerState(global_step=step)
    getattr(callback, event)(arguments, state, TrainerControl(), model=model, **options)


def test_gradients_that_come_too_late_for_deepspeed_are_refused(tmp_path):
    model = penalized()
    keep_masters(model)
    with pytest.raises(RuntimeError, match="what RegularizationCallback adds for adapter 'default' is lost"):
        call(RegularizationCallback(), "on_pre_optimizer_step", tmp_path, model)
    assert all(parameter.grad is None for parameter in trained(model))


@pytest.mark.parametrize("prepare", [keep_masters, flatten])
def test_tasks_cannot_follow_once_an_engine_is_made(prepare):
    model = get_peft_model(network(), ContinualSVDConfig(target_modules=MODULES), "one")
    prepare(model)
    with pytest.raises(RuntimeError, match="so a change of tasks must come before"):
        next_task(model, "two")
    assert list_tasks(model) == {"one": "open"}


def test_tasks_cannot_follow_within_a_training_of_several_processes(monkeypatch, tmp_path):
    model = get_peft_model(network(), ContinualSVDConfig(target_modules=MODULES), "one")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="train each task by a Trainer of its own"):
        call(NextTaskCallback({4: "two"}), "on_step_end", tmp_path, model, step=4)
    assert list_tasks(model) == {"one": "open"}


def test_weights_that_come_late_cannot_start_an_adapter_of_an_engine():
    with torch.device("meta"):
        base = network()
    model = get_peft_model(base, EffortConfig(r=2, target_modules=MODULES))
    base.to_empty(device="cpu")
    keep_masters(model)
    with pytest.raises(
        RuntimeError, match="what initializes adapter 'default' from loaded weights must come before"
    ):
        model(torch.randn(2, 12))


def test_split_weights_are_not_merged_into(group):
    model = get_peft_model(partition(network()), EffortConfig(r=2, target_modules=MODULES))
    with pytest.raises(RuntimeError, match="merging needs whole weights, of which DeepSpeed's ZeRO-3 leaves"):
        model.merge_adapter()


def test_what_trains_is_handed_over_whole_and_reaches_partitions_and_copies(group):
    wanted = trainable_state_dict(started())
    for prepare in (keep_masters, lambda model: split(model, group)):
        model = started(prepare)
        state = trainable_state_dict(model)
        assert state.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
        load_trainable_state_dict(model, {name: tensor + 1 for name, tensor in state.items()})
        again = trainable_state_dict(model)
        assert all(torch.equal(again[name], tensor + 1) for name, tensor in wanted.items())
        for parameter in trained(model):
            kept = getattr(parameter, "_hp_mapping", getattr(parameter, "_z3_optimizer", None))
            values = next(t for t in again.values() if torch.equal(t.flatten(), kept.flatten()[: t.numel()]))
            assert values.any()
