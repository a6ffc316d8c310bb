"""Steps that can take more than two seconds show their progress then, and nothing before."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import peft_subspace
from methods import METHODS
from models import llama
from peft_subspace.runtime import distributed as processes
from peft_subspace.runtime.progress import bar
from peft_subspace.tools.inspection import layer_overlaps, layer_updates

BY_NAME = {method.name: method for method in METHODS}
IDS = torch.arange(3, 18).reshape(3, 5)
BATCHES = [{"input_ids": IDS, "labels": IDS}] * 2


def adapted(name, **options):
    config = BY_NAME[name].config(target_modules=["q_proj"], **options)
    return get_peft_model(llama(), config)


def start_from_weights(folder):
    adapted("effort")


def start_from_gradients(folder):
    model = adapted("lora_sb", init_weights=True)
    peft_subspace.initialize_from_gradient(model, BATCHES, learning_rate=1e-3)


def merge(folder):
    adapted("mos").merge_adapter()


def merge_and_unload(folder):
    adapted("effort").merge_and_unload()


def export(folder):
    peft_subspace.lora_state_dict(adapted("flora"))


def combine(folder):
    adapted("flora").add_weighted_adapter(["default"], [2.0], "sum")


def next_task(folder):
    peft_subspace.continual.next_task(adapted("continual_svd"), "next")


def importance(folder):
    peft_subspace.continual.layer_importance(adapted("continual_svd"), BATCHES)


def leak(folder):
    peft_subspace.continual.subspace_leak(adapted("continual_svd"))


def load(folder):
    adapted("continual_svd").save_pretrained(folder)
    peft_subspace.load(llama(), folder)


def inspect(folder):
    layer_updates(adapted("flora"))


def compare(folder):
    layer_overlaps(adapted("flora"), adapted("effort"))


STEPS = [
    (start_from_weights, ["decomposing weights"]),
    (start_from_gradients, ["gradients", "decomposing gradients"]),
    (merge, ["merging"]),
    (merge_and_unload, ["merging"]),
    (export, ["multiplying factors"]),
    (combine, ["combining adapters"]),
    (next_task, ["checking updates", "merging"]),
    (importance, ["comparing inputs and outputs"]),
    (leak, ["measuring leaks"]),
    (load, ["checking base weights"]),
    (inspect, ["decomposing updates"]),
    (compare, ["comparing updates"]),
]


@pytest.mark.parametrize(("step", "titles"), STEPS, ids=lambda value: getattr(value, "__name__", ""))
def test_long_steps_show_their_progress_and_short_ones_nothing(step, titles, tmp_path, capfd, monkeypatch):
    step(tmp_path / "silent")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("peft_subspace.runtime.progress.DELAY", 0.0)
    step(tmp_path / "shown")
    text = capfd.readouterr().err
    for title in titles:
        assert f"\r{title}: 100%" in text, title


def test_progress_of_gradients_can_be_hidden(capfd, monkeypatch):
    monkeypatch.setattr("peft_subspace.runtime.progress.DELAY", 0.0)
    model = adapted("lora_sb", init_weights=True)
    capfd.readouterr()
    peft_subspace.initialize_from_gradient(model, BATCHES, learning_rate=1e-3, progress=False)
    assert capfd.readouterr().err == ""


def test_pefts_own_bar_replaces_ours(capfd, monkeypatch):
    model = adapted("flora")
    monkeypatch.setattr("peft_subspace.runtime.progress.DELAY", 0.0)
    model.merge_and_unload(progressbar=True)
    text = capfd.readouterr().err
    assert "Unloading and merging model: 100%" in text
    assert "\rmerging" not in text


def test_one_process_of_several_shows_progress(monkeypatch):
    assert not bar(3, "step").disable
    assert bar(1, "step").disable
    monkeypatch.setattr(processes, "rank", lambda: 1)
    assert bar(3, "step").disable
