"""The length of the first step, found on the batches, and gradients weighted as a Trainer weights them."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import models
from peft_subspace import GradientInitCallback, LoRASBConfig, initialize_from_gradient
from peft_subspace.initialization.step_length import EVALUATIONS, FIRST, search_step
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


# ---------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("best", [1e-6, 3e-5, 2e-4, 1e-3, 0.02])
def test_parabola_is_found_within_the_evaluations(best):
    calls = []

    def loss(step):
        calls.append(step)
        return 1 + (step / best - 1) ** 2

    losses = search_step(loss)
    found = min(losses, key=losses.__getitem__)
    assert len(calls) == len(losses) <= EVALUATIONS
    assert losses[found] < losses[0.0]
    assert best / 4 < found < 4 * best
    if 1e-5 < best < 1e-2:
        assert found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("loss", [lambda s: s, lambda s: float("nan") if s else 1.0, lambda s: 1.0])
def test_nothing_lowers_the_loss(loss):
    losses = search_step(loss)
    assert min(losses, key=losses.__getitem__) == 0.0
    assert len(losses) <= EVALUATIONS


def test_a_cliff_behind_the_minimum_is_not_stepped_over():
    losses = search_step(lambda s: float("inf") if s > 3 * FIRST else 1 - s)
    found = min(losses, key=losses.__getitem__)
    assert 0 < found <= 3 * FIRST


# ------------------------------------------------------------------------------------- on an adapter


class Regression(nn.Module):
    """Least squares with one adapted layer, whose loss is a parabola of the step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 5)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


def data(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(4, 6, generator=generator), "labels": torch.randn(4, 5, generator=generator)}
        for _ in range(count)
    ]


def mean_loss(model, batches):
    with torch.no_grad():
        return sum(model(**batch)["loss"].item() for batch in batches) / len(batches)


def adapted(base=None, **options):
    base = Regression() if base is None else base
    return get_peft_model(base, LoRASBConfig(**{"r": 3, "target_modules": ["layer"], **options}))


def test_chosen_step_lowers_the_loss_more_than_its_neighbors(caplog):
    model, batches = adapted(), data()
    before = mean_loss(Regression(), batches)
    with caplog.at_level(logging.INFO, "peft_subspace"):
        initialize_from_gradient(model, batches, progress=False)
    found = mean_loss(model, batches)
    assert found < before
    (message,) = [r.getMessage() for r in caplog.records if "first step of length" in r.getMessage()]
    chosen = float(message.split("length ")[1].split(";")[0])
    for factor in (0.5, 2.0):
        other = adapted()
        initialize_from_gradient(other, batches, learning_rate=chosen * factor, progress=False)
        assert mean_loss(other, batches) > found
    fixed = adapted()
    initialize_from_gradient(fixed, batches, learning_rate=1.0, progress=False)
    ours, theirs = (m.base_model.model.layer.deltas["default"] for m in (model, fixed))
    assert torch.equal(ours.A, theirs.A)
    assert torch.equal(ours.B, theirs.B)
    ratio = ours.R.diagonal() / theirs.R.diagonal()
    torch.testing.assert_close(ratio, ratio[0].expand(3))
    assert ratio[0].item() == pytest.approx(chosen, rel=0.05)


def test_search_leaves_everything_but_the_adapter_and_fails_without_a_trace():
    model, batches = adapted().train(), data()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def failing(model, batch):
        calls.append(model)
        if len(calls) > len(batches) + 2:
            raise RuntimeError("in the search")
        return model(**batch)["loss"]

    generator = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the search"):
        initialize_from_gradient(model, batches, loss_fn=failing, progress=False)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.base_model.model.layer.deltas["default"].initialized
    initialize_from_gradient(model, iter(batches), progress=False)  # which can be read once
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training
    assert all(
        torch.equal(state[name], tensor)
        for name, tensor in model.state_dict().items()
        if "lorasb" not in name
    )


def test_start_is_at_zero_where_no_step_lowers_the_loss(caplog):
    model = adapted()

    def rising(model, batch):  # its gradient points down, and there the loss is higher
        loss = model(**batch)["loss"]
        return loss if torch.is_grad_enabled() else -loss

    with caplog.at_level(logging.WARNING, "peft_subspace"):
        initialize_from_gradient(model, data(), loss_fn=rising, progress=False)
    delta = model.base_model.model.layer.deltas["default"]
    assert not delta.R.any()
    assert delta.initialized
    assert "no first step lowers the loss" in caplog.text


def test_passes_of_the_search_are_less_than_three():
    model, batches, counts = adapted(), data(5), {True: 0, False: 0}

    def counting(model, batch):
        counts[torch.is_grad_enabled()] += 1
        return model(**batch)["loss"]

    initialize_from_gradient(model, batches, loss_fn=counting, progress=False)
    assert counts[True] == len(batches)
    assert counts[False] <= 8 * len(batches)  # a pass forward and backward is worth three forward


def test_cached_gradients_are_searched_on_the_data_again(tmp_path):
    results = []
    for _ in range(2):
        model = adapted()
        initialize_from_gradient(model, data(), cache=tmp_path / "gradients", progress=False)
        results.append(model.base_model.model.layer.deltas["default"].R.detach())
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------ in a Trainer


class Lengths(torch.utils.data.Dataset):
    """Texts with very different numbers of labels."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.arange(12) * (i + 3) % 30 + 3
        labels = ids.clone()
        labels[: (i * 5) % 11] = -100
        return {"input_ids": ids, "labels": labels}


class FirstGradient(TrainerCallback):
    """Keeps the first gradient of the trained tensors."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Halved(Trainer):
    """A Trainer with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.logits.float().square().mean() * len(inputs["input_ids"])
        return (loss, outputs) if return_outputs else loss


class NoLabels(nn.Module):
    """A model that knows nothing of numbers of items, so that the Trainer divides by batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(12, 12)

    def forward(self, input_ids, labels):
        return {"loss": (self.q_proj(input_ids.float() / 30) - labels.float() / 30).square().mean()}


def arguments(folder, **options):
    return TrainingArguments(
        str(folder), max_steps=1, learning_rate=1e-3, max_grad_norm=0.0, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=0, save_strategy="no", per_device_train_batch_size=2, **options,
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 3, 8])
@pytest.mark.parametrize("kind", ["labels", "own-loss", "batches"])
def test_gradient_is_the_trainers_first(accumulate, kind, tmp_path, monkeypatch):
    def build():
        return NoLabels() if kind == "batches" else models.llama()

    trainer_cls = Halved if kind == "own-loss" else Trainer
    base = build()
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    first = FirstGradient()
    options = {"gradient_accumulation_steps": accumulate}
    trainer_cls(base, arguments(tmp_path, **options), train_dataset=Lengths(), callbacks=[first]).train()

    from peft_subspace.initialization import gradients

    found = {}
    means = gradients.GradientEstimate.means

    def kept(self, *args, **kwargs):
        for name, mean in means(self, *args, **kwargs):
            found[name] = mean.clone()
            yield name, mean

    monkeypatch.setattr(gradients.GradientEstimate, "means", kept)
    model = get_peft_model(build(), LoRASBConfig(r=4, target_modules=["q_proj"]))
    callback = GradientInitCallback(num_batches=accumulate)
    trainer_cls(model, arguments(tmp_path, **options), train_dataset=Lengths(), callbacks=[callback]).train()
    assert found
    assert all(
        layer.deltas["default"].initialized
        for layer in adapted_layers(model, "default", SubspaceLayer).values()
    )
    for name, mean in found.items():
        truth = first.found[f"{name}.weight"]
        assert (mean - truth).norm() < 1e-5 * truth.norm()


def test_default_reads_whole_steps(tmp_path, monkeypatch):
    read = []
    from peft_subspace.initialization import trainer_batches

    original = trainer_batches.read_batches

    def counted(dataloader, count):
        read.append(count)
        return original(dataloader, count)

    monkeypatch.setattr(trainer_batches, "read_batches", counted)
    for accumulate in (1, 3, 16):
        model = get_peft_model(models.llama(), LoRASBConfig(r=4, target_modules=["q_proj"]))
        options = arguments(tmp_path, gradient_accumulation_steps=accumulate)
        Trainer(model, options, train_dataset=Lengths(), callbacks=[GradientInitCallback()]).train()
    assert read == [8, 9, 16]
