"""Learned merges: coefficients of adapters, of three granularities, that train with and without labels."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.func import functional_call
from transformers import Trainer, TrainingArguments

import peft_subspace
from compositions import Network, X, logits, saved_and_exported, saved_sources, summed
from layers import distance
from methods import METHODS
from peft_subspace.merging import merge


@pytest.fixture
def sources(tmp_path):
    return saved_sources(tmp_path)


def composed(sources, **options):
    return peft_subspace.compose(Network(), sources, **options)


def coefficients(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("per", ["task", "module", "component"])
def test_composition_is_the_weighted_sum_of_what_the_folders_hold(per, sources):
    model = composed(sources, per=per)
    assert torch.equal(logits(model), Network()(X)["logits"])
    weights = [0.7, -0.4, 1.3]
    for module in model.modules():
        if hasattr(module, "ranks"):
            shares = [[w] * r for w, r in zip(weights, module.spec.ranks, strict=True)]
            values = weights if per != "component" else [w for share in shares for w in share]
            held = module.shared_tensors if per == "task" else module
            held.coefficients.data.copy_(torch.tensor(values))
    assert distance(logits(model), summed(sources, weights)) < 1e-5
    counts = {"task": 3, "module": 9, "component": sum(p.numel() for p in coefficients(model).values())}
    assert sum(p.numel() for p in coefficients(model).values()) == counts[per]


@pytest.mark.parametrize("per", ["task", "module"])
def test_gradient_of_a_coefficient_is_the_inner_product_of_gradient_and_update(per, sources):
    model = composed(sources, per=per, start=0.3)
    loss = model(X)["logits"].square().sum()
    loss.backward()
    merged = merge(sources, weights=[0.3] * 3, base=Network())
    state = {name: p.detach().clone().requires_grad_() for name, p in Network().state_dict().items()}
    added = {
        f"{m}.weight": state[f"{m}.weight"] + merged.update(m).reshape(state[f"{m}.weight"].shape)
        for m in merged.modules
    }
    functional_call(Network(), {**state, **added}, (X,))["logits"].square().sum().backward()
    expected = {}
    for module, stack in merged.stacks():
        gradient = state[f"{module}.weight"].grad.flatten(1)
        expected[module] = torch.stack([(gradient * stack.dense(t)).sum() for t in range(len(stack))])
    deltas = {m.spec.name: m for m in model.modules() if hasattr(m, "ranks")}
    assert set(deltas) == set(expected)
    if per == "task":
        found = next(iter(deltas.values())).shared_tensors.coefficients.grad
        assert distance(found, sum(expected.values())) < 1e-5
    else:
        for name, delta in deltas.items():
            assert distance(delta.coefficients.grad, expected[name]) < 1e-5


@pytest.mark.parametrize("per", ["task", "module", "component"])
def test_composition_trains_is_saved_loaded_and_exported(per, sources, tmp_path):
    model = composed(sources, per=per)
    optimizer = torch.optim.AdamW(coefficients(model).values(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(X, labels=torch.arange(5) % 4)["loss"].backward()
        optimizer.step()
    assert distance(logits(model), Network()(X)["logits"]) > 1e-3
    again, _ = saved_and_exported(model, tmp_path)
    assert distance(logits(model.merge_and_unload()), logits(again)) < 1e-5


def test_adapters_of_all_methods_are_composed(tmp_path):
    folders, expected = [], 0.0
    for method in METHODS:
        config = method.config(target_modules="layer|conv", init_weights=False, seed=1)
        get_peft_model(Network(), config).save_pretrained(tmp_path / method.name)
        folders.append(tmp_path / method.name)
    model = composed(folders, start=0.1)
    expected = summed(folders, [0.1] * len(folders))
    assert distance(logits(model), expected) < 1e-4
    assert model.peft_config["default"].adapters == [str(folder) for folder in folders]


class Rows(torch.utils.data.Dataset):
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"input_ids": X[i]} | ({"labels": i % 4} if self.labels else {})


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize(("labels", "mask"), [(False, None), (True, None), (False, "structured")])
def test_trainer_lowers_the_entropy_without_labels_and_the_loss_with_them(labels, mask, sources, tmp_path):
    model = composed(sources, per="module", start=0.3, mask=mask)
    at_first = {name: p.detach().clone() for name, p in coefficients(model).items()}

    @torch.no_grad()
    def value():
        if labels:
            return float(model(X, labels=torch.arange(5) % 4)["loss"])
        return float(peft_subspace.entropy_loss(model(X)))

    before = value()
    arguments = TrainingArguments(
        tmp_path, max_steps=10, learning_rate=0.05, report_to=[], disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    options = {} if labels else {"compute_loss_func": peft_subspace.entropy_loss}
    Trainer(model, arguments, train_dataset=Rows(labels), **options).train()
    assert value() < before
    assert not any(torch.equal(p, at_first[name]) for name, p in coefficients(model).items())


def test_entropy_is_that_of_the_predictions():
    values = torch.randn(4, 3, dtype=torch.float64)
    p = values.softmax(-1)
    expected = sum(-(q * q.log()).sum() for q in p) / 4
    assert torch.isclose(peft_subspace.entropy_loss({"logits": values}).double(), expected, rtol=1e-5)
    uniform = peft_subspace.entropy_loss(torch.zeros(2, 7, 8))
    assert torch.isclose(uniform, torch.tensor(8.0).log())


def test_bad_input_is_refused_before_the_model_is_touched(sources):
    with pytest.raises(ValueError, match=r"per='layer'.* must be one of"):
        composed(sources, per="layer")
    with pytest.raises(TypeError, match="start"):
        composed(sources, start="high")
    model = composed(sources)
    with pytest.raises(ValueError, match=r"adapter_name='default' exists"):
        peft_subspace.compose(model, sources)
    peft_subspace.compose(model, sources[:1], adapter_name="two")
    assert model.active_adapter == "two"


def test_training_what_was_never_composed_warns():
    config = peft_subspace.CompositionConfig(r=2, target_modules=["conv"])
    model = get_peft_model(Network(), config).train()
    with pytest.warns(UserWarning, match="coefficients of random factors"):
        model(X)
