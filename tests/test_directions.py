"""Directions that data tell: against loops over rows, over several tasks, and what is refused."""

import copy
import re

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import peft_subspace
from layers import Net, distance
from models import bert, resnet
from peft_subspace import (
    ContinualSVDConfig,
    NextTaskCallback,
    continual,
    initialize_from_gradient,
    statistics,
)
from peft_subspace.continual import list_tasks, next_task, preset, protect, subspace_leak
from peft_subspace.continual.directions import extended
from peft_subspace.methods.continual_svd.model import ContinualSVDLayer
from peft_subspace.statistics.moment import Rows, SecondMoment
from processes import run_in_two_processes
from quantized import KINDS, WARNINGS, marked, quantized_model

TARGETS = ["query", "dense"]
SOURCES = ["inputs", "gradients", "weight+inputs"]


def batches(seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 37, (count, 16, 6), generator=generator)
    return [{"input_ids": each, "labels": torch.arange(16) % 3} for each in ids]


def first(directions="inputs", base=None, **options):
    options = {"target_modules": TARGETS, "modules_to_save": ["classifier"], "energy": 0.9, **options}
    if directions != "weight+inputs":
        options = {"preserve": 0, **options}
    return get_peft_model(base or bert(), ContinualSVDConfig(directions=directions, **options), "one")


def train(model, seed=0, steps=2):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    model.train()
    for _ in range(steps):
        for batch in batches(seed):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def gathered(model, seed=0):
    return statistics.collect(model, batches(seed), gradients=True)


def layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ContinualSVDLayer)
    }


def bases(model, task):
    """Protected directions of each layer, in double precision."""
    found = {}
    for name, layer in layers(model).items():
        ((side, held),) = layer.deltas[task].sides.items()
        found[name] = held.directions(getattr(layer.deltas[task], side))
    return found


def orthonormal(basis, limit=1e-6):
    return (basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max() < limit


def by_loops(known, rows, energy):
    """GPM's rule with explicit SVDs: new directions one by one, until all hold enough of the rows."""
    total, basis = rows.square().sum(), [*known.T]
    while True:
        held = sum((rows @ vector).square().sum() for vector in basis)
        if held >= energy * total * (1 - 1e-12):
            return torch.stack(basis, 1) if basis else known
        rest = rows - sum((torch.outer(rows @ v, v) for v in basis), torch.zeros_like(rows))
        basis.append(torch.linalg.svd(rest, full_matrices=False).Vh[0])


def same_span(one, two, tolerance):
    return one.shape == two.shape and (one @ one.T - two @ two.T).norm() < tolerance


# ------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("known", [0, 4])
def test_directions_are_the_fewest_that_hold_the_energy(energy, known):
    torch.manual_seed(0)
    rows = torch.randn(60, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    rows = rows @ torch.linalg.qr(torch.randn(14, 12, dtype=torch.float64)).Q.T
    known = torch.linalg.qr(torch.randn(14, known, dtype=torch.float64)).Q
    moment = SecondMoment.empty(14)
    moment.add(Rows(rows))
    found, lacking = extended(known, moment, energy)
    expected = by_loops(known, rows, energy)[:, :13]
    assert orthonormal(found)
    assert torch.allclose(found[:, : known.shape[1]], known)
    assert same_span(found, expected, 1e-8)
    assert lacking == max(0, by_loops(known, rows, energy).shape[1] - 13)
    if found.shape[1] > known.shape[1] and not lacking:
        assert (rows @ found[:, :-1]).square().sum() < energy * rows.square().sum()
    assert extended(found, moment, energy * 0.999)[0] is found  # covered: nothing is added


def test_a_sketch_gives_directions_that_hold_enough_or_says_so():
    torch.manual_seed(0)
    rows = torch.randn(200, 40, dtype=torch.float64) * torch.logspace(0, -2, 40, dtype=torch.float64)
    moment = SecondMoment.empty(40, 12)
    moment.add(Rows(rows))
    found, _ = extended(torch.zeros(40, 0, dtype=torch.float64), moment, 0.7)
    assert (rows @ found).square().sum() >= 0.7 * rows.square().sum()
    with pytest.raises(ValueError, match=r"the sketch of width 12 holds 0\.\d+ of the energy"):
        extended(torch.zeros(40, 0, dtype=torch.float64), moment, 0.9999)


def test_inputs_are_those_of_all_rows_of_the_task():
    model = first(base=bert().double(), energy=0.95)
    rows = {name: [] for name in layers(model)}
    handles = [
        layer.register_forward_hook(lambda _, a, y, name=name: rows[name].append(a[0].flatten(0, -2)))
        for name, layer in layers(model).items()
    ]
    found = gathered(model)
    for handle in handles:
        handle.remove()
    next_task(model, "two", statistics=found)
    for name, basis in bases(model, "two").items():
        stacked = torch.cat(rows[name])
        none = torch.zeros(stacked.shape[1], 0, dtype=torch.float64)
        assert same_span(basis, by_loops(none, stacked, 0.95), 1e-5)  # kept in fp32
        exact, _ = extended(none, found.inputs[name], 0.95)
        assert same_span(exact, by_loops(none, stacked, 0.95), 1e-8)


def test_gradients_are_those_of_each_batch_side_by_side():
    model = first("gradients", energy=0.98)
    found = gathered(model)
    columns = {name: [] for name in layers(model)}
    for batch in batches():
        plain = copy.deepcopy(model).eval()
        for layer in layers(plain).values():
            layer.get_base_layer().weight.requires_grad_()
        plain(**batch).loss.backward()
        for name, layer in layers(plain).items():
            columns[name].append(layer.get_base_layer().weight.grad.double())
    next_task(model, "two", statistics=found)
    for name, basis in bases(model, "two").items():
        stacked = torch.cat(columns[name], 1).T
        none = torch.zeros(stacked.shape[1], 0, dtype=torch.float64)
        assert same_span(basis, by_loops(none, stacked, 0.98), 1e-3)


def test_weight_comes_first_and_inputs_after_it():
    model = first("weight+inputs", energy=0.95, weight_energy=0.6)
    weights = {name: layer.get_base_weight().double().clone() for name, layer in layers(model).items()}
    found = gathered(model)
    protect(model, found)
    for name, basis in bases(model, "one").items():
        none = torch.zeros(weights[name].shape[1], 0, dtype=torch.float64)
        known = by_loops(none, weights[name], 0.6)
        root = torch.linalg.eigh(found.inputs[name].dense())
        rows = root.eigenvalues.clamp(min=0).sqrt()[:, None] * root.eigenvectors.T
        assert same_span(basis, by_loops(known, rows, 0.95), 1e-3)
    alone = first("weight+inputs", weight_energy=0.6)
    protect(alone)
    for name, basis in bases(alone, "one").items():
        none = torch.zeros(weights[name].shape[1], 0, dtype=torch.float64)
        assert same_span(basis, by_loops(none, weights[name], 0.6), 1e-4)


# ----------------------------------------------------------------------------------------- over tasks


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("keep", "r"), [("merge", None), ("merge", 3), ("stack", 3)])
def test_what_is_protected_grows_and_nothing_leaks(source, keep, r):
    model = first(source, r=r)
    if source == "weight+inputs":
        protect(model)
    train(model)
    known = bases(model, "one")
    for number, name in enumerate(("two", "three")):
        next_task(model, name, keep=keep, statistics=gathered(model, number))
        own = bases(model, name)
        for layer, basis in own.items():
            before = known[layer]
            assert orthonormal(basis)
            assert (before - basis @ (basis.T @ before)).norm() < 1e-5
        assert any(basis.shape[1] > known[layer].shape[1] for layer, basis in own.items())
        train(model, number + 1)
        leak = subspace_leak(model, name)
        assert leak["max"] < 1e-6
        for layer, module in layers(model).items():
            update = module.get_delta_weight(name).double()
            assert update.norm() > 1e-4
            inside = own[layer].T @ update if source == "gradients" else update @ own[layer]
            assert inside.norm() < 1e-6 * update.norm()
        known = own


def test_old_inputs_keep_their_outputs_up_to_the_energy_left_out():
    model = first(r=3, energy=0.999, modules_to_save=None)
    train(model)
    found = gathered(model)
    next_task(model, "two", statistics=found)
    train(model, 1)
    for name, layer in layers(model).items():
        update, moment = layer.get_delta_weight("two").double(), found.inputs[name].dense()
        changed = ((update @ moment) * update).sum()
        assert changed <= 0.001 * update.norm() ** 2 * moment.trace() * 1.001


def test_nothing_is_added_for_data_that_are_covered():
    model = first(r=3)
    found = gathered(model)
    next_task(model, "two", keep="stack", statistics=found)
    next_task(model, "three", keep="stack", statistics=found)
    two, three = bases(model, "two"), bases(model, "three")
    for name, basis in two.items():
        assert same_span(basis, three[name], 1e-5)


def test_a_deleted_task_takes_its_directions_with_it():
    model = first(r=3)
    next_task(model, "two", keep="stack", statistics=gathered(model, 0))
    kept = bases(model, "two")
    next_task(model, "three", keep="stack", statistics=gathered(model, 1))
    model.delete_adapter("three")
    next_task(model, "four", keep="stack", statistics=gathered(model, 0))
    for name, basis in bases(model, "four").items():
        assert same_span(basis, kept[name], 1e-5)


def test_energy_can_change_with_the_task():
    model = first(r=3)
    next_task(model, "two", keep="stack", statistics=gathered(model), energy=0.5)
    few = bases(model, "two")
    next_task(model, "three", keep="stack", statistics=gathered(model), energy=0.999)
    for name, basis in bases(model, "three").items():
        assert basis.shape[1] > few[name].shape[1]


@pytest.mark.parametrize("source", ["inputs", "gradients"])
def test_the_weight_is_never_read(source, monkeypatch):
    def read(self):
        raise NotImplementedError("its packed values can only be run")

    model = bert()
    monkeypatch.setattr("peft_subspace.base_weights.weight.BaseWeight.read", read)
    model = first(source, model, r=3)
    train(model)
    next_task(model, "two", keep="stack", statistics=gathered(model))
    train(model, 1)
    assert subspace_leak(model, "two")["max"] < 1e-6
    assert not any(layer.deltas["two"].fingerprint.any() for layer in layers(model).values())


@WARNINGS
@pytest.mark.parametrize("kind", marked(KINDS))
def test_quantized_bases_are_stacked_on(kind):
    model = first(r=3, base=quantized_model(bert(), kind, ("query", "dense")))
    train(model)
    next_task(model, "two", statistics=gathered(model))
    assert list_tasks(model) == {"one": "stack", "two": "open"}
    train(model, 1)
    assert subspace_leak(model, "two")["max"] < 1e-6


@pytest.mark.parametrize("r", [None, 3])
def test_bf16_bases_leak_nothing_before_a_merge(r):
    model = first(r=r, base=bert().bfloat16())
    train(model)
    next_task(model, "two", statistics=gathered(model))
    train(model, 1)
    assert subspace_leak(model, "two")["max"] < 1e-6


def test_convolutions_are_protected_as_well():
    options = {"target_modules": ["convolution"], "modules_to_save": None, "energy": 0.5}
    model = first(base=resnet(), **options)
    images = [{"pixel_values": torch.randn(8, 3, 16, 16), "labels": torch.arange(8) % 3} for _ in range(2)]
    next_task(model, "two", statistics=statistics.collect(model, images))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    for batch in images:
        model(**batch).loss.backward()
        optimizer.step()
    assert subspace_leak(model, "two")["max"] < 1e-6
    assert all(layer.get_delta_weight("two").any() for layer in layers(model).values())


# ------------------------------------------------------------------------------------------- a frozen A


def frozen(**options):
    options = {"r": 3, "freeze_a": True, "weight_energy": 0.6, **options}
    model = first("weight+inputs", **options)
    protect(model, gathered(model))
    return model


def mean_gradients(model, data):
    """Mean over samples, one by one, of the gradients of the weights."""
    plain = copy.deepcopy(model).eval()
    for layer in layers(plain).values():
        layer.get_base_layer().weight.requires_grad_()
    count = 0
    for batch in data:
        for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
            plain(input_ids=ids[None], labels=label[None]).loss.backward()
            count += 1
    return {n: layer.get_base_layer().weight.grad.double() / count for n, layer in layers(plain).items()}


def test_a_is_frozen_at_the_first_gradient_outside_what_is_protected():
    model = frozen()
    known, gradients = bases(model, "one"), mean_gradients(model, batches(1))
    initialize_from_gradient(model, batches(1), adapter_name="one", progress=False)
    for name, layer in layers(model).items():
        delta, rest = layer.deltas["one"], gradients[name].clone()
        for row in rest:
            for vector in known[name].T:
                row -= (row @ vector) * vector
        rank = int((torch.linalg.svdvals(rest) > 1e-6 * rest.norm()).sum().clamp(max=3))
        assert rank
        assert same_span(delta.A[:rank].T.double(), torch.linalg.svd(rest).Vh[:rank].T, 1e-3)
        assert orthonormal(delta.A[:rank].T.double(), 1e-5)  # in fp32; processors differ about 1e-6
        assert not delta.B.any()
        assert {n for n, _ in delta.named_parameters()} == {"B"}


def test_a_stays_while_b_trains_and_nothing_leaks(tmp_path):
    model = frozen()
    initialize_from_gradient(model, batches(1), adapter_name="one", progress=False)
    train(model, 1)
    next_task(model, "two", keep="stack", statistics=gathered(model, 1))
    initialize_from_gradient(model, batches(2), adapter_name="two", progress=False)
    drawn = {name: layer.deltas["two"].A.clone() for name, layer in layers(model).items()}
    train(model, 2)
    assert subspace_leak(model, "two")["max"] < 1e-6
    for name, layer in layers(model).items():
        assert torch.equal(layer.deltas["two"].A, drawn[name])
        assert layer.get_delta_weight("two").any()
    model.save_pretrained(tmp_path)
    again = peft_subspace.load(bert_like(model), tmp_path / "one", "one")
    again = peft_subspace.load(again, tmp_path / "two", "two", is_trainable=True)
    again.set_adapter("two")
    ids = batches(5)[0]["input_ids"]
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    train(again, 3)
    assert subspace_leak(again, "two")["max"] < 1e-6


def bert_like(model):
    fresh, own = bert(), model.get_base_model().state_dict()
    names = {name.replace(".base_layer", "").replace(".original_module", ""): name for name in own}
    fresh.load_state_dict({name: own[names[name]] for name in fresh.state_dict()})
    return fresh


def test_random_rows_do_until_a_gradient_is_taken_and_sums_stay_exact():
    model = frozen(modules_to_save=None)
    train(model, steps=1)
    assert subspace_leak(model, "one")["max"] < 1e-6
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        3 * layer.get_base_layer().weight.shape[0] for layer in layers(model).values()
    )
    model.base_model.add_weighted_adapter(["one"], [0.5], "scaled")
    for layer in layers(model).values():
        torch.testing.assert_close(layer.get_delta_weight("scaled"), 0.5 * layer.get_delta_weight("one"))


def test_a_of_two_processes_is_one(tmp_path):
    run_in_two_processes(_started, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = frozen(modules_to_save=None)
    initialize_from_gradient(model, [*batches(0), *batches(1)], adapter_name="one", num_batches=None)
    for name, layer in layers(model).items():
        assert torch.equal(one[name], two[name])
        assert same_span(one[name].T, layer.deltas["one"].A.T, 1e-3)


def _started(rank, folder):
    model = frozen(modules_to_save=None)
    initialize_from_gradient(model, batches(rank), adapter_name="one", num_batches=None)
    torch.save({name: layer.deltas["one"].A for name, layer in layers(model).items()}, folder / f"{rank}.pt")


def test_what_does_not_go_with_a_frozen_a_is_refused():
    for options in ({}, {"r": 3, "constraint": "core"}):
        with pytest.raises(ValueError, match="freeze_a=True needs a rank, such as r=16, and another constr"):
            ContinualSVDConfig(freeze_a=True, **options)
    with pytest.raises(TypeError, match="freeze_a=1 must be"):
        ContinualSVDConfig(freeze_a=1, r=3)
    model = first("weight+inputs", r=3, freeze_a=True)
    with pytest.raises(ValueError, match=r"old data, which are not known; call .*continual\.protect"):
        initialize_from_gradient(model, batches(), adapter_name="one")
    protect(model)
    initialize_from_gradient(model, batches(), adapter_name="one", progress=False)
    with pytest.raises(ValueError, match="the frozen A of task 'one' is known already; protect before"):
        protect(model, gathered(model))
    with pytest.raises(ValueError, match="of a method that does not start from gradients"):
        initialize_from_gradient(first(r=3), batches(), adapter_name="one")


# ------------------------------------------------------------------------------------------- protect


@pytest.mark.parametrize("r", [None, 3])
def test_protect_comes_before_training(r):
    model = first(r=r, preserve=0.5)
    config = model.peft_config["one"]
    for _ in range(2):  # not only the first time
        with pytest.raises(RuntimeError, match=r"directions='inputs' of old data.*continual\.protect"):
            train(model)
    model.eval()(**batches()[0])  # what does not train runs
    protect(model, gathered(model))
    assert not config.preserve_pattern  # the one that was given stays as it was
    with pytest.raises(ValueError, match="gather them on its data"):
        protect(model)
    train(model)
    assert subspace_leak(model, "one")["max"] < 1e-6
    assert any(basis.shape[1] for basis in bases(model, "one").values())
    with pytest.raises(ValueError, match="has been trained already"):
        protect(model, gathered(model))
    counted = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "delta" in n)
    assert model.peft_config["one"].trained == counted


def test_protect_adds_to_what_is_protected():
    model = first(r=3, preserve=0.5)
    protect(model, gathered(model, 0))
    known = bases(model, "one")
    protect(model, gathered(model, 1))
    for name, basis in bases(model, "one").items():
        assert (known[name] - basis @ (basis.T @ known[name])).norm() < 1e-5


# --------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("r", [None, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_files_load_without_data(source, r, tmp_path):
    model = first(source, r=r, base=bert(), preserve=0.5)
    base = copy.deepcopy(model.get_base_model())
    protect(model, gathered(model))
    train(model)
    model.save_pretrained(tmp_path)
    fresh = bert()
    fresh.load_state_dict(
        {k: v for k, v in base.state_dict().items() if k in fresh.state_dict()}, strict=False
    )
    state = {
        name.replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in base.state_dict().items()
        if "continualsvd" not in name and "modules_to_save" not in name
    }
    fresh.load_state_dict(state)
    again = peft_subspace.load(fresh, tmp_path / "one", "one", is_trainable=True)
    ids = batches(5)[0]["input_ids"]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    known = bases(model, "one")
    train(again, 1)
    for name, layer in layers(again).items():
        update = layer.get_delta_weight("one").double()
        inside = known[name].T @ update if source == "gradients" else update @ known[name]
        assert inside.norm() < 1e-6 * update.norm()
    next_task(again, "two", statistics=gathered(again))
    assert list_tasks(again)["two"] == "open"


def test_a_file_saved_before_anything_is_protected_cannot_be_trained_either(tmp_path):
    model = first(r=3, preserve=0.5, base=bert())
    model.save_pretrained(tmp_path)
    again = peft_subspace.load(bert(), tmp_path / "one", "one", is_trainable=True)
    with pytest.raises(RuntimeError, match=r"continual\.protect"):
        train(again)


# -------------------------------------------------------------------------------- refused, and warned


def _without(found, name):
    del found.inputs[name]
    return found


REFUSED = {
    "none": (lambda m: None, "directions='inputs' need statistics of the task that ends"),
    "other": (
        lambda m: statistics.collect(bert(), batches(), target_modules=["query"]),
        r"no inputs of .*, but of 2 other layers",
    ),
    "gradients": (
        lambda m: statistics.collect(m, batches(), inputs=False, gradients=True),
        "with inputs=True",
    ),
    "sizes": (lambda m: _of_size(m, 5), r"are of 5 inputs, and the layer has 16"),
    "rows": (
        lambda m: statistics.collect(m, [{"input_ids": batches()[0]["input_ids"][:2, :2]}]),
        r"energy=0.9 takes \d+ new directions, and \d rows are too few",
    ),
    "norms": (lambda m: statistics.collect(m, batches(), inputs="norms"), "norms of columns alone"),
    "full": (lambda m: _white(m), "nothing would be left to train; lower energy"),
}


def _of_size(model, size):
    found = gathered(model)
    for name in found.inputs:
        found.inputs[name] = SecondMoment.empty(size)
    return found


def _white(model, but=()):
    """Statistics of inputs that use all directions alike."""
    found = gathered(model)
    for name, moment in found.inputs.items():
        if name not in but:
            found.inputs[name] = SecondMoment.empty(moment.size)
            found.inputs[name].add(Rows(torch.eye(moment.size).repeat(4, 1)))
    return found


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("call", ["next_task", "protect"])
def test_statistics_that_do_not_fit_are_refused_before_anything_changes(case, call):
    make, message = REFUSED[case]
    preserve = 0.5 if call == "protect" else 0
    model = first(r=3, preserve=preserve, energy=1.0 if case == "full" else 0.9)
    given = make(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.peft_config["one"].to_dict())
    refused = {
        "protect": lambda: protect(model, given),
        "next_task": lambda: next_task(model, "two", statistics=given),
    }
    with pytest.raises(ValueError, match=message):
        refused[call]()
    assert list(model.peft_config) == ["one"]
    assert model.peft_config["one"].to_dict() == config
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in after.items())


def test_a_task_that_does_not_fit_everywhere_says_so():
    model = first(r=3, energy=1.0)
    name = next(iter(layers(model)))
    found = _white(model, but=[name])
    found.inputs[name] = SecondMoment.empty(16)
    found.inputs[name].add(Rows(torch.eye(16)[:3].repeat(4, 1)))
    with pytest.warns(UserWarning, match=r"8 of 9 layers have no room .*lacks 1 directions"):
        next_task(model, "two", statistics=found)
    left = list_tasks(model).left
    assert left[name] == {"inputs": (13, 16)}
    assert {own["inputs"][0] for other, own in left.items() if other != name} == {1}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"directions": "rows"}, ValueError, r"directions='rows' must be one of"),
        ({"directions": "inputs", "energy": 0}, ValueError, "energy=0 must be above 0 and at most 1"),
        ({"directions": "inputs", "energy": 1.1}, ValueError, "energy=1.1 must be above 0 and at most 1"),
        ({"directions": "inputs", "energy": True}, TypeError, "energy=True must be a number"),
        ({"directions": "inputs", "energy": "all"}, TypeError, "energy='all' must be a number"),
        ({"weight_energy": float("nan")}, ValueError, "weight_energy=nan"),
        ({"directions": "inputs", "constraint": "output"}, ValueError, "constraint='output' must be 'input'"),
        ({"directions": "gradients", "constraint": "core"}, ValueError, "constraint='core' must be 'output'"),
        ({"preserve_pattern": {"a": [1, 2, 3]}}, TypeError, r"preserve_pattern\['a'\]"),
        ({"preserve_pattern": {"a": [1, -2]}}, ValueError, r"preserve_pattern\['a'\]=-2"),
    ],
)
def test_impossible_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ContinualSVDConfig(**options)


def test_calls_that_do_not_fit_the_directions_are_refused():
    model = first(r=3)
    with pytest.raises(ValueError, match=r"preserve=0.5 is not for directions='inputs'; give energy"):
        next_task(model, "two", statistics=gathered(model), preserve=0.5)
    with pytest.raises(ValueError, match="from_weight=True is of the weight"):
        subspace_leak(model, "one", from_weight=True)
    config = ContinualSVDConfig(r=3, target_modules=TARGETS)
    plain = get_peft_model(bert(), config, "one")
    with pytest.raises(ValueError, match="directions='weight' take no statistics"):
        next_task(plain, "two", statistics=gathered(plain))
    with pytest.raises(ValueError, match="directions='weight' are no data's"):
        protect(plain, gathered(plain))
    with pytest.raises(ValueError, match="must be below 16"):
        first(preserve_pattern={"query": [0, 16]})


# -------------------------------------------------------------------- presets, listing, Trainer, DDP


def test_presets_are_the_papers_settings():
    assert preset("gpm", target_modules=TARGETS) == preset("fot", target_modules=TARGETS)
    fot, coso, keep = (preset(name, target_modules=TARGETS) for name in ("fot", "coso", "keep-lora"))
    assert (fot.directions, fot.constraint, fot.energy, fot.r, fot.preserve) == (
        "inputs",
        "input",
        0.95,
        None,
        0,
    )
    assert (coso.directions, coso.constraint, coso.energy) == ("gradients", "output", 0.98)
    assert (keep.directions, keep.constraint, keep.energy, keep.weight_energy, keep.r, keep.freeze_a) == (
        *("weight+inputs", "input"),
        *(0.99, 0.85, 16, True),
    )
    assert preset("fot", energy=0.9).energy == 0.9
    with pytest.raises(ValueError, match="name='gdm' must be one of"):
        preset("gdm")
    for config in (fot, coso):  # a first task trains without anything before it
        train(get_peft_model(bert(), config, "one"), steps=1)
    model = get_peft_model(bert(), keep, "one")
    protect(model)
    initialize_from_gradient(model, batches(), adapter_name="one", progress=False)
    train(model, steps=1)


def test_what_is_left_is_drawn(tmp_path):
    model = first(r=3)
    next_task(model, "two", keep="stack", statistics=gathered(model))
    list_tasks(model).save_plot(tmp_path / "one.svg")
    merged = get_peft_model(bert(), ContinualSVDConfig(preserve=0.25, target_modules=["query"]), "one")
    list_tasks(merged).save_plot(tmp_path / "both.svg")
    sizes = [
        re.findall(r'width="([\d.]+)pt"', (tmp_path / f"{name}.svg").read_text()) for name in ("both", "one")
    ]
    assert float(sizes[0][0]) == 2 * float(sizes[1][0])  # a map for each side
    tasks = list_tasks(merged)
    tasks.left = {}
    with pytest.raises(ValueError, match="no layer has directions to be drawn"):
        tasks.save_plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_what_is_left_is_listed():
    model = first("gradients", r=3)
    assert all(own == {"outputs": (own["outputs"][1],) * 2} for own in list_tasks(model).left.values())
    next_task(model, "two", keep="stack", statistics=gathered(model))
    listed = list_tasks(model)
    for name, basis in bases(model, "two").items():
        assert listed.left[name] == {"outputs": (len(basis) - basis.shape[1], len(basis))}
    lines = str(listed).splitlines()
    assert lines[0] == "one (stack), two (open)"
    assert lines[1].split() == ["directions", "left", "outputs"]
    name, (left, size) = next((n, own["outputs"]) for n, own in listed.left.items())
    assert lines[2].split() == [name, str(left), "of", str(size)]
    assert len(lines) == 2 + len(listed.left)
    both = get_peft_model(bert(), ContinualSVDConfig(preserve=0.25, target_modules=["query"]), "one")
    assert list_tasks(both).left["bert.encoder.layer.0.attention.self.query"] == {
        "outputs": (12, 16),
        "inputs": (12, 16),
    }


def test_callback_gathers_when_a_task_ends(tmp_path):
    model = first(r=3)
    rows = [{key: value[i] for key, value in batches()[0].items()} for i in range(16)]
    callback = NextTaskCallback({2: "two"}, keep="stack", statistics=gathered)
    arguments = TrainingArguments(tmp_path, max_steps=4, report_to=[], disable_tqdm=True, use_cpu=True)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert list_tasks(model) == {"one": "stack", "two": "open"}
    assert subspace_leak(model, "two")["max"] < 1e-6
    assert any(basis.shape[1] for basis in bases(model, "two").values())


def _trained(rank, folder):
    torch.manual_seed(0)
    model = first(r=3, modules_to_save=None)
    next_task(model, "two", keep="stack", statistics=gathered(model, rank))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    for batch in batches(rank + 2):
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save([subspace_leak(model, "two")["max"], bases(model, "two")], folder / f"{rank}.pt")


def test_two_processes_protect_what_both_have_seen(tmp_path):
    run_in_two_processes(_trained, tmp_path)
    (leak, one), (other, two) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert max(leak, other) < 1e-6
    torch.manual_seed(0)
    model = first(r=3, modules_to_save=None)
    next_task(model, "two", keep="stack", statistics=gathered(model, 0) + gathered(model, 1))
    for name, basis in bases(model, "two").items():
        assert torch.equal(one[name], two[name])
        assert same_span(basis, one[name], 1e-3)


def test_sums_keep_what_is_protected():
    torch.manual_seed(0)
    config = ContinualSVDConfig(r=2, directions="inputs", preserve=0.5, target_modules=["layer"], energy=0.9)
    model = get_peft_model(Net(nn.Linear(9, 7)), config, "one")
    rows = [torch.randn(40, 9) * torch.logspace(0, -2, 9)]
    found = statistics.collect(model, rows, loss_fn=lambda m, x: m(x))
    protect(model, found)
    layer = next(iter(layers(model).values()))
    layer.deltas["one"].reset_parameters(False, torch.Generator().manual_seed(0))
    model.base_model.add_weighted_adapter(["one"], [2.0], "sum")
    assert distance(layer.get_delta_weight("sum"), 2 * layer.get_delta_weight("one")) < 1e-5
    assert model.peft_config["sum"].preserve_pattern == {"layer": [0, layer.deltas["one"].sides["V"].count]}
    assert continual.subspace_leak(model, "sum")["max"] < 1e-6
