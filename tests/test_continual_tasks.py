"""Sequences of tasks: what `next_task` keeps, what it starts, and what it refuses."""

import copy
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import peft_subspace
from layers import distance
from models import bert, build, llama
from peft_subspace import ContinualSVDConfig, NextTaskCallback
from peft_subspace.continual import list_tasks, next_task, reopen, subspace_leak
from peft_subspace.methods.continual_svd.model import ContinualSVDLayer
from quantized import KINDS, WARNINGS, marked, quantized_model

TARGETS = ["query", "dense"]
LABELS = torch.tensor([0, 1, 2, 0])
FORMS = [("merge", None), ("merge", 3), ("stack", 3)]
forms = pytest.mark.parametrize(("keep", "r"), FORMS, ids=["merge", "merge-r", "stack"])


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 37, (4, 6), generator=generator), "labels": LABELS}


def first(r=3, base=None, **options):
    options = {"target_modules": TARGETS, "preserve": 0.25, "modules_to_save": ["classifier"], **options}
    return get_peft_model(base or bert(), ContinualSVDConfig(r=r, **options), "task1")


def trainables(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adamw(model, **options):
    return torch.optim.AdamW(trainables(model).values(), **{"lr": 1e-2, "weight_decay": 0.1, **options})


def train(model, seed=0, steps=5, optimizer=None, scheduler=None):
    optimizer = optimizer or adamw(model)
    torch.manual_seed(seed)  # of the model's dropout
    model.train()
    for _ in range(steps):
        model(**inputs(seed)).loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    model.eval()


def logits(model, seed=0):
    with torch.no_grad():
        return model(input_ids=inputs(seed)["input_ids"]).logits


def layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ContinualSVDLayer)
    }


def weights(model):
    return {name: layer.get_base_weight().detach().clone() for name, layer in layers(model).items()}


def updates(model, task):
    return {
        name: layer.get_delta_weight(task).clone()
        for name, layer in layers(model).items()
        if task in layer.deltas
    }


def head(model, task):
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if f"modules_to_save.{task}" in name
    }


def three_tasks(keep, r, **options):
    model = first(r, **options)
    train(model, 1)
    for number in (2, 3):
        next_task(model, f"task{number}", keep=keep)
        train(model, number)
    return model


# ------------------------------------------------------------------------------------- merge and stack


@forms
def test_next_task_starts_from_the_model_as_it_is(keep, r):
    model = first(r, modules_to_save=None)
    train(model)
    before = logits(model)
    next_task(model, "task2", keep=keep)
    assert distance(logits(model), before) < 1e-5
    assert trainables(model)
    assert all(".task2" in name for name in trainables(model))


@pytest.mark.parametrize("r", [None, 3])
def test_merge_adds_the_task_to_the_base_weights_in_fp32(r):
    model = first(r)
    train(model)
    base, update = weights(model), updates(model, "task1")
    next_task(model, "task2", keep="merge")
    for name, weight in weights(model).items():
        assert torch.equal(weight, base[name] + update[name])
    assert not any("task1" in layer.deltas or layer.kept_bytes for layer in layers(model).values())


def test_merge_into_bf16_weights_rounds_each_sum_once():
    model = first(3, bert().bfloat16(), modules_to_save=None)
    train(model)
    base, update = weights(model), updates(model, "task1")
    next_task(model, "task2", keep="merge")
    for name, weight in weights(model).items():
        assert torch.equal(weight, (base[name].float() + update[name]).bfloat16())


@pytest.mark.parametrize("r", [None, 3])
def test_disabled_adapter_gives_the_base_of_the_current_task(r):
    model = first(r, modules_to_save=None)
    train(model)
    before = logits(model)
    next_task(model, "task2", keep="merge")
    train(model, 2)
    assert distance(logits(model), before) > 1e-3
    with model.disable_adapter():
        assert distance(logits(model), before) < 1e-5


def test_stack_leaves_base_weights_and_earlier_tasks_alone():
    model = first()
    base = weights(model)
    train(model)
    before = updates(model, "task1")
    heads = {n: t.clone() for n, t in model.state_dict().items() if "modules_to_save.task1" in n}
    assert heads
    next_task(model, "task2", keep="stack")
    assert model.active_adapters == ["task1", "task2"]
    train(model, 2)
    next_task(model, "task3", keep="stack")
    train(model, 3)
    assert model.active_adapters == ["task1", "task2", "task3"]
    assert all(torch.equal(weight, base[name]) for name, weight in weights(model).items())
    for name, update in updates(model, "task1").items():
        assert torch.equal(update, before[name])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in heads.items())
    assert all(".task3" in name for name in trainables(model))


@forms
def test_each_task_is_confined_by_the_weight_before_it(keep, r):
    model = first(r, preserve=3)
    train(model)
    for number in (2, 3):
        before = weights(model)
        for task in [f"task{i}" for i in range(1, number)]:
            for name, update in updates(model, task).items():
                before[name] += update
        next_task(model, f"task{number}", keep=keep)
        train(model, number)
        for name, update in updates(model, f"task{number}").items():
            U, _, Vh = torch.linalg.svd(before[name].double())
            assert (U[:, :3].T @ update.double()).norm() < 1e-5 * update.norm()
            assert (update.double() @ Vh[:3].T).norm() < 1e-5 * update.norm()
        assert subspace_leak(model, f"task{number}", from_weight=True)["max"] < 1e-5


@forms
def test_what_to_preserve_can_change_with_the_task(keep, r):
    model = first(r, preserve_pattern={"query": 2})
    assert {layer.deltas["task1"].directions for layer in layers(model).values()} == {2, 4}
    next_task(model, "task2", keep=keep, preserve=0.5)
    assert {layer.deltas["task2"].directions for layer in layers(model).values()} == {8}
    next_task(model, "task3", keep=keep, preserve={"query": 5})
    assert {layer.deltas["task3"].directions for layer in layers(model).values()} == {5, 8}
    next_task(model, "task4", keep=keep)
    assert {layer.deltas["task4"].directions for layer in layers(model).values()} == {5, 8}


@forms
def test_tasks_can_be_listed(keep, r):
    model = three_tasks(keep, r)
    assert list_tasks(model) == {"task1": keep, "task2": keep, "task3": "open"}


def test_a_stacked_task_can_be_disabled_and_deleted():
    model = three_tasks("stack", 3)
    everything = logits(model)
    below = [name for name in model.active_adapters if name != "task1"]
    model.base_model.set_adapter(below)
    without = logits(model)
    assert distance(without, everything) > 1e-4
    assert all(".task3" in name for name in trainables(model))
    model.set_adapter("task3")
    assert torch.equal(logits(model), everything)
    model.delete_adapter("task1")
    assert model.active_adapters == ["task2", "task3"]
    assert torch.equal(logits(model), without)
    assert list_tasks(model) == {"task2": "stack", "task3": "open"}
    assert all(".task3" in name for name in trainables(model))


def test_a_deleted_task_leaves_the_one_before_to_go_on_from():
    model = three_tasks("stack", 3)
    before = updates(model, "task2")
    deleted = adamw(model)
    model.delete_adapter("task3")
    assert model.active_adapters == ["task1", "task2"]
    refused(model, ValueError, "optimizer has no parameter of the current task, 'task2'", optimizer=deleted)
    next_task(model, "again", preserve=0.5)
    assert list_tasks(model) == {"task1": "stack", "task2": "stack", "again": "open"}
    assert model.active_adapters == ["task1", "task2", "again"]
    train(model, 3)
    assert all(torch.equal(before[name], update) for name, update in updates(model, "task2").items())
    assert max(update.norm() for update in updates(model, "again").values()) > 1e-3
    assert subspace_leak(model, "again")["max"] < 1e-5
    for name in ("again", "task2"):
        model.delete_adapter(name)
    next_task(model, "second")
    assert list_tasks(model) == {"task1": "stack", "second": "open"}


def test_a_closed_task_can_be_opened_again(tmp_path):
    model = three_tasks("stack", 3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, message in (
        ("task2", r"tasks \['task3'\] build on 'task2'"),
        ("task1", r"tasks \['task2', 'task3'\] build on 'task1'"),
        ("nope", r"name='nope' is no adapter of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            reopen(model, name)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert list_tasks(model) == {"task1": "stack", "task2": "stack", "task3": "open"}
    model.delete_adapter("task3")
    here = logits(model)
    reopen(model, "task2")
    assert distance(logits(model), here) < 1e-5  # projected once more
    assert list_tasks(model) == {"task1": "stack", "task2": "open"}
    names = trainables(model)
    assert all(".task2" in name for name in names)
    assert {"continualsvd_delta", "modules_to_save"} <= {part for name in names for part in name.split(".")}
    train(model, 2)
    assert distance(logits(model), here) > 1e-4
    next_task(model, "task3b", keep="stack")
    assert list_tasks(model) == {"task1": "stack", "task2": "stack", "task3b": "open"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "task1", "task1")
    assert not trainables(loaded)
    reopen(loaded, "task1")
    assert trainables(loaded)


def test_a_task_that_was_opened_in_inference_mode_trains():
    model = first()
    next_task(model, "task2", keep="stack")
    model.delete_adapter("task2")
    before = updates(model, "task1")
    with torch.inference_mode():
        reopen(model, "task1")
    train(model)
    assert all(distance(update, before[name]) > 1e-3 for name, update in updates(model, "task1").items())


def test_merged_tasks_cannot_be_opened_again():
    model = three_tasks("merge", 3)
    with pytest.raises(ValueError, match="the update of 'task2' is in the base weights"):
        reopen(model, "task2")


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("new_heads", [True, False])
def test_a_task_takes_the_place_of_a_deleted_one_above_merged_ones(heads, new_heads):
    model = three_tasks("merge", 3, modules_to_save=["classifier"] if heads else None)
    weights = {name: t.clone() for name, t in model.state_dict().items() if "base_layer" in name}
    optimizer = adamw(model)
    model.delete_adapter("task3")
    assert list_tasks(model) == ({"task1": "merge", "task2": "merge"} if heads else {})
    refused(model, ValueError, "task that the optimizer trained has been deleted", optimizer=optimizer)
    next_task(model, "again", preserve=0.25, new_heads=new_heads)
    assert list_tasks(model) == {"task1": "merge", "task2": "merge", "again": "open"}
    assert model.active_adapters == ["again"]
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())
    if heads:
        head = model.get_submodule("base_model.model.classifier")
        start = head.original_module if new_heads else head.modules_to_save["task2"]
        assert torch.equal(head.modules_to_save["again"].weight, start.weight)
    train(model, 3)
    assert max(update.norm() for update in updates(model, "again").values()) > 1e-3
    assert subspace_leak(model, "again")["max"] < 1e-5
    next_task(model, "fourth")
    assert list_tasks(model) == {"task1": "merge", "task2": "merge", "again": "merge", "fourth": "open"}


def test_the_first_task_can_be_begun_again():
    model = first()
    model.delete_adapter("task1")
    next_task(model, "once more")
    assert list_tasks(model) == {"once more": "open"}
    assert trainables(model)
    assert all(".once more" in name for name in trainables(model))
    next_task(model, "second", keep="stack")
    for name in ("second", "once more"):
        model.delete_adapter(name)
    refused(model, ValueError, "of the active adapters .* these are open: ")


class Signs(torch.optim.SGD):
    """An optimizer that steps along a list of its own."""

    def __init__(self, params, lr):
        super().__init__(list(params), lr)
        self.mine = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure):
        closure()
        for parameter in self.mine:
            parameter.data.sub_(self.param_groups[0]["lr"] * parameter.grad.sign())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
        lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
        lambda p: Signs(p, lr=0.01),
    ],
    ids=["lbfgs", "line-search", "list"],
)
def test_an_optimizer_with_a_list_of_its_own_trains_the_next_task(make):
    model = first(3, modules_to_save=None)
    optimizer = make(trainables(model).values())

    def closure():
        optimizer.zero_grad()
        loss = model(**inputs()).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    closed = updates(model, "task1")
    next_task(model, "task2", keep="stack", optimizer=optimizer)
    optimizer.step(closure)
    assert all(torch.equal(closed[name], update) for name, update in updates(model, "task1").items())
    assert max(update.norm() for update in updates(model, "task2").values()) > 1e-4


def test_finished_tasks_stay_frozen_whatever_peft_enables():
    model = three_tasks("stack", 3)
    names = trainables(model).keys()
    with model.disable_adapter():
        pass
    assert trainables(model).keys() == names
    model.base_model.set_adapter(["task1", "task2"])
    assert not trainables(model)
    model.set_adapter("task1")
    with model.disable_adapter():
        pass
    assert not trainables(model)
    model.set_adapter("task3")
    assert trainables(model).keys() == names


def test_one_adapter_per_sample_refuses_tasks_that_build_on_others():
    model = three_tasks("stack", 3)
    ids = inputs()["input_ids"]
    with pytest.raises(ValueError, match=r"'task2' the adapters that it builds on, \['task1', 'task2'\]"):
        model(input_ids=ids, adapter_names=["task1", "task2", "task1", "__base__"])
    result = model(input_ids=ids, adapter_names=["task1", "__base__", "task1", "__base__"]).logits
    model.set_adapter("task1")
    assert distance(result[[0, 2]], logits(model)[[0, 2]]) < 1e-5


def test_wrapped_models_are_refused():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    with pytest.raises(TypeError, match="call next_task before wrapping the model"):
        next_task(Wrapped(), "task2")


# ------------------------------------------------------------------------------------------------ heads


@forms
def test_heads_are_kept_and_come_back_with_their_task(keep, r):
    model = first(r)
    untrained = head(model, "task1")
    train(model)
    kept, before = head(model, "task1"), logits(model)
    next_task(model, "task2", keep=keep)
    for (_, fresh), (_, start) in zip(head(model, "task2").items(), untrained.items(), strict=True):
        assert torch.equal(fresh, start)
    model.set_adapter("task1")
    assert distance(logits(model), before) < 1e-5
    model.set_adapter("task2")
    train(model, 2)
    model.set_adapter("task1")
    assert all(torch.equal(tensor, head(model, "task1")[name]) for name, tensor in kept.items())
    # a stacked task is what it was; a merged one lives in the model as it is now
    assert (distance(logits(model), before) < 1e-5) == (keep == "stack")


@forms
def test_one_shared_head_goes_on_where_it_was(keep, r):
    model = first(r)
    train(model)
    before, trained = logits(model), head(model, "task1")
    next_task(model, "task2", keep=keep, new_heads=False)
    assert distance(logits(model), before) < 1e-5
    for (_, new), (_, old) in zip(head(model, "task2").items(), trained.items(), strict=True):
        assert torch.equal(new, old)


# --------------------------------------------------------------------------------------- saving, loading


def test_stacked_tasks_are_saved_and_loaded_one_by_one(tmp_path):
    model = three_tasks("stack", 3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path / "task2", "task2")
    again = peft_subspace.load(again, tmp_path / "task1", "task1")
    again.load_adapter(str(tmp_path / "task3"), "task3")
    for task in ("task1", "task2", "task3"):
        model.set_adapter(task)
        again.set_adapter(task)
        assert again.active_adapters == model.active_adapters
        assert torch.equal(logits(again.eval()), logits(model))
    assert list_tasks(again) == list_tasks(model)
    assert not [name for name in trainables(again) if ".task1" in name or ".task2" in name]


@pytest.mark.parametrize("r", [None, 3])
def test_merged_model_is_a_plain_one_and_its_tasks_load_onto_it(r, tmp_path):
    model = three_tasks("merge", r)
    model.save_pretrained(tmp_path / "adapters")
    with pytest.warns(UserWarning, match=r"drops the updates of the tasks \['task3'\]"):
        plain = copy.deepcopy(model).unload()
    plain.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert base.state_dict().keys() == bert().state_dict().keys()
    again = peft_subspace.load(base, tmp_path / "adapters" / "task3", "task3")
    again = peft_subspace.load(again, tmp_path / "adapters" / "task1", "task1")
    assert list_tasks(again) == list_tasks(model)
    for task in ("task3", "task1"):
        model.set_adapter(task)
        again.set_adapter(task)
        assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, peft_subspace.load], ids=["peft", "own"])
def test_task_after_a_merge_is_refused_on_the_original_base(load, tmp_path):
    three_tasks("merge", 3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the base weight is not the one.*tasks that were merged before"):
        load(bert(), tmp_path / "task3", adapter_name="task3")


def test_stack_is_refused_on_another_base(tmp_path):
    model = three_tasks("stack", 3)
    model.save_pretrained(tmp_path)
    other = bert()
    for parameter in other.parameters():
        parameter.data *= 1.001
    with pytest.raises(ValueError, match="the base weight is not the one"):
        PeftModel.from_pretrained(other, tmp_path / "task2", "task2")


def test_merge_and_unload_takes_the_whole_stack():
    model = three_tasks("stack", 3)
    before = logits(model)
    assert distance(logits(model.merge_and_unload()), before) < 1e-5


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_unload_does_not_lose_a_task_silently(form):
    keep, r = form
    model = first(r)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model).unload()
    train(model)
    with pytest.warns(UserWarning, match=r"\['task1'\].*merge_and_unload\(\)"):
        copy.deepcopy(model).unload()
    next_task(model, "task2", keep=keep)
    if keep == "merge":  # nothing is lost
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            copy.deepcopy(model).unload()


# -------------------------------------------------------------------------------- optimizer, schedule


@forms
def test_optimizer_and_schedule_begin_anew(keep, r):
    model = first(r)
    decayed, others = [], []
    for parameter in trainables(model).values():
        (decayed if parameter.ndim > 1 else others).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}],
        lr=1e-2,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    train(model, 1, 5, optimizer, scheduler)
    next_task(model, "task2", keep=keep, optimizer=optimizer, scheduler=scheduler)
    assert not optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 3e-3])
    expected = [[], []]
    for parameter in trainables(model).values():
        expected[parameter.ndim == 1].append(parameter)
    for group, parameters in zip(optimizer.param_groups, expected, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
    twin = copy.deepcopy(model)
    train(model, 2, 3, optimizer, scheduler)
    fresh = torch.optim.AdamW(
        [
            {"params": [p for p in trainables(twin).values() if p.ndim > 1], "weight_decay": 0.1},
            {
                "params": [p for p in trainables(twin).values() if p.ndim == 1],
                "weight_decay": 0.0,
                "lr": 3e-3,
            },
        ],
        lr=1e-2,
    )
    train(twin, 2, 3, fresh, torch.optim.lr_scheduler.LambdaLR(fresh, lambda step: 1 - step / 20))
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in fresh.param_groups]
    for parameter, expected_parameter in zip(
        trainables(model).values(), trainables(twin).values(), strict=True
    ):
        assert torch.equal(parameter, expected_parameter)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ],
    ids=["exponential", "cosine"],
)
def test_schedules_that_go_on_from_the_last_rate_begin_anew(make):
    model = first()
    optimizer = adamw(model)
    scheduler = make(optimizer)

    def rates(seed):
        found = []
        for _ in range(3):
            found.append(optimizer.param_groups[0]["lr"])
            train(model, seed, 1, optimizer, scheduler)
        return found

    expected = rates(1)
    assert len(set(expected)) == 3
    next_task(model, "task2", optimizer=optimizer, scheduler=scheduler)
    assert rates(2) == pytest.approx(expected)


def test_schedules_that_cannot_be_restarted_are_refused_before_anything_changes():
    model = first()
    optimizer = adamw(model)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    chained = torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ConstantLR(optimizer)])
    for scheduler in (plateau, chained):
        with pytest.raises(TypeError, match="cannot be started again"):
            next_task(model, "task2", optimizer=optimizer, scheduler=scheduler)
    assert list_tasks(model) == {"task1": "open"}


class Rows(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return {"input_ids": torch.randint(3, 37, (6,), generator=generator), "labels": i % 3}


@forms
def test_trainer_runs_through_several_tasks(keep, r, tmp_path):
    model = first(r)
    rates, active = [], []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])
            active.append(model.active_adapters[-1])

    arguments = TrainingArguments(
        tmp_path, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    callback = NextTaskCallback({4: "task2"}, keep=keep)
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback, Watch()])
    trainer.train()
    assert active == ["task1"] * 4 + ["task2"] * 4
    assert rates[4:] == pytest.approx(rates[:4])
    assert list_tasks(model) == {"task1": keep, "task2": "open"}
    assert all(update.any() for update in updates(model, "task2").values())
    assert subspace_leak(model, "task2", from_weight=True)["max"] < 1e-5


def test_callback_starts_a_task_before_the_first_step_and_only_once(tmp_path):
    model = first()
    callback = NextTaskCallback({0: "task2"}, keep="stack", preserve=0.5)
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    for _ in range(2):
        Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback]).train()
    assert list_tasks(model) == {"task1": "stack", "task2": "open"}
    with pytest.raises(TypeError, match=r"starts=0\.5"):
        NextTaskCallback({0.5: "task2"})


# ----------------------------------------------------------------------------------------- quantized


QUANTIZED = [kind for kind in KINDS if str(kind) in ("bnb-nf4", "bnb-8bit", "torchao-int8", "hqq-4bit")]


def quantized(model, kind):
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return quantized_model(model, kind, tuple(names - {"classifier"}))


def wide_bert():
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return build(transformers.BertForSequenceClassification, config)


@WARNINGS
@pytest.mark.parametrize("kind", marked(QUANTIZED))
def test_quantized_weights_are_stacked_by_default(kind, tmp_path):
    model = first(3, quantized(wide_bert(), kind), target_modules=["query", "value"])
    before = weights(model)
    train(model)
    next_task(model, "task2")
    train(model, 2)
    assert list_tasks(model) == {"task1": "stack", "task2": "open"}
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert subspace_leak(model, "task2", from_weight=True)["max"] < 1e-5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(wide_bert(), kind), tmp_path / "task1", "task1")
    again.load_adapter(str(tmp_path / "task2"), "task2")
    again.set_adapter("task2")
    assert torch.equal(logits(again.eval()), logits(model))


@WARNINGS
@pytest.mark.parametrize("kind", marked(QUANTIZED))
def test_quantized_weights_can_be_merged_into_when_asked_to(kind):
    model = first(3, quantized(wide_bert(), kind), target_modules=["query", "value"], modules_to_save=None)
    train(model)
    base, update, before = weights(model), updates(model, "task1"), logits(model)
    next_task(model, "task2", keep="merge")
    for name, layer in layers(model).items():
        wanted = base[name] + update[name]
        found = layer.get_base_weight()
        assert distance(found, wanted) < 1.25 * kind.requantized
        assert distance(found, wanted) < distance(base[name], wanted)
        assert torch.equal(
            layer.deltas["task2"].fingerprint, layer.base_weight.fingerprint(layer.kind.from_layout)
        )
    assert distance(logits(model), before) < 0.2
    assert subspace_leak(model, "task2", from_weight=True)["max"] < 1e-5


# ------------------------------------------------------------------------------------------- bad input


def refused(model, error, message, **options):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tasks, active = list_tasks(model), list(model.active_adapters)
    with pytest.raises(error, match=message):
        next_task(model, **{"name": "task9", **options})
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert (tasks, active) == (list_tasks(model), list(model.active_adapters))


def test_names_are_used_once():
    model = three_tasks("merge", 3, modules_to_save=None)
    for name in ("task1", "task3"):
        refused(model, ValueError, f"name='{name}' is the name of a task already", name=name)


def test_merged_disabled_and_closed_tasks_cannot_be_followed():
    model = three_tasks("stack", 3)
    model.merge_adapter()
    refused(model, ValueError, r"are merged; call unmerge_adapter\(\) first")
    model.unmerge_adapter()
    model.set_adapter("task2")
    refused(model, ValueError, r"active adapters \['task1', 'task2'\] these are open: \[\]")
    model.set_adapter("task3")
    with model.disable_adapter(), pytest.raises(ValueError, match="are disabled"):
        next_task(model, "task9")


@pytest.mark.parametrize(
    ("r", "options", "message"),
    [
        (None, {"keep": "stack"}, "query: keep='stack' needs small adapters, but r is None; set r"),
        (3, {"keep": "drop"}, "keep='drop' must be one of"),
        (3, {"preserve": 16}, "query: preserve=16 must be below 16"),
        (3, {"preserve": 1.5}, r"preserve=1\.5"),
        (3, {"preserve": {"dense": 99}}, "dense: preserve=99 must be below"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(r, options, message):
    model = first(r)
    train(model)
    refused(model, ValueError, message, **options)


def test_a_broken_task_is_not_merged():
    model = first(3)
    train(model)
    layer = list(layers(model).values())[-1]
    layer.deltas["task1"].B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        next_task(model, "task2", keep="merge")
    assert list_tasks(model) == {"task1": "open"}


def test_a_stack_cannot_be_continued_by_merging():
    model = three_tasks("stack", 3)
    refused(model, ValueError, r"below the stacked tasks \['task1', 'task2'\]", keep="merge")


def test_merged_tasks_can_be_followed_by_stacked_ones():
    model = first(3)
    train(model)
    next_task(model, "task2", keep="merge")
    train(model, 2)
    next_task(model, "task3", keep="stack")
    assert list_tasks(model) == {"task1": "merge", "task2": "stack", "task3": "open"}
    assert model.active_adapters == ["task2", "task3"]


def test_models_without_such_adapters_are_refused():
    with pytest.raises(TypeError, match="BertForSequenceClassification is no PeftModel with Continual SVD"):
        next_task(bert(), "task2")
    lora_sb = get_peft_model(
        llama(), peft_subspace.LoRASBConfig(init_weights="svd", target_modules=["q_proj"])
    )
    with pytest.raises(TypeError, match="no PeftModel with Continual SVD adapters"):
        next_task(lora_sb, "task2")
