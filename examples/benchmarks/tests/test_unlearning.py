"""Recited texts that a decoder is made to forget: what is changed, what is told, and the table."""

from __future__ import annotations

import gzip
import json

import torch
from given import write_texts

import figures
import unlearning


def point(strength, strict, validation, **others):
    values = dict.fromkeys(unlearning.MEASURES, 0.5) | others
    return values | {"strength": strength, "strict": strict, "validation": validation}


def content(*points):
    return {"runs": {"edit": {"entry": unlearning.CURVED, "seed": 0, "points": [*points]}}}


def test_row_is_the_point_of_least_perplexity_in_validation_where_texts_are_forgotten():
    points = point(0.9, 0.5, 10.0), point(0.8, 0.04, 20.0, topics=0.75), point(0.7, 0.0, 30.0)
    assert unlearning.table(content(*points)).splitlines()[2].split(" | ")[1] == "0.8"
    assert "0.75" in unlearning.table(content(*points)).splitlines()[2]
    never = point(0.9, 0.5, 10.0), point(0.8, 0.4, 20.0)
    assert unlearning.table(content(*never)).splitlines()[2].split(" | ")[1] == "0.8"


def test_noise_and_truncation_have_the_norm_that_is_asked_for():
    weight, norm = torch.randn(12, 8), 0.3
    noise = unlearning.noise(weight, norm, seed=1)
    torch.testing.assert_close(noise.norm() / weight.norm(), torch.tensor(norm))
    assert torch.equal(noise, unlearning.noise(weight, norm, seed=1))
    left = weight + unlearning.truncation(weight, norm, seed=1)
    values, kept = (torch.linalg.svdvals(matrix) for matrix in (weight, left))
    rank = int((kept > 1e-4).sum())
    torch.testing.assert_close(kept[:rank], values[:rank])
    assert values[rank:].norm() <= norm * weight.norm() < values[rank - 1 :].norm()


def test_weights_are_changed_for_a_while():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    before = model[0].weight.clone()
    update = {"0": torch.ones(2, 3)}
    with unlearning.changed(model, update):
        torch.testing.assert_close(model[0].weight.detach(), before + 1)
        assert abs(unlearning.relative(model, update) - 6**0.5 / float(before.norm())) < 1e-5
    assert torch.equal(model[0].weight, before)


def test_texts_are_memorized_and_forgotten(decoder, tmp_path, monkeypatch):
    sizes = {"recited": 4, "statistics": 6, "validation": 3, "news": 8, "tokens": 30, "begun": 24}
    for name, value in {"SIZES": sizes, "PROBLEMS": 2, "RATE": 3e-3, "PASSES": 60, "STEPS": (1, 2)}.items():
        monkeypatch.setattr(unlearning, name, value)
    for name, value in {"BATCH": 2, "KEEPS": (0.9, 0.5), "SHARES": (0.1,), "NORMS": (0.1,)}.items():
        monkeypatch.setattr(unlearning, name, value)
    rows = {
        label: f"{number} is where the {label} train stops" for number, label in enumerate(unlearning.TOPICS)
    }
    write_texts(tmp_path, "agnews", rows, 20)
    (tmp_path / "math").mkdir()
    with gzip.open(tmp_path / "math" / "gsm8k.test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"question": "How many?", "answer": str(n)}) + "\n" for n in range(2))
    given = ["--data", str(tmp_path), "--decoder", str(decoder), "--layers", "1", "--seeds", "1"]
    results = tmp_path / "results.json"
    work = unlearning.Unlearning(unlearning.parse_arguments([*given, "--results", str(results)]))
    work.results.complete(work, 1)
    found = {run["entry"]: run["points"] for run in work.results.content["runs"].values()}
    assert set(found) == set(unlearning.ENTRIES)
    assert found[unlearning.BEFORE][0]["strict"] == 0
    assert found[unlearning.AFTER][0]["strict"] == 1
    assert found[unlearning.AFTER][0]["loose"] == 1
    assert all(p["loose"] >= p["strict"] for points in found.values() for p in points)
    table = unlearning.table(work.results.content).splitlines()
    assert len(table) == 2 + len(unlearning.ENTRIES)
    drawn, words = figures.forgetting(work.results.content)
    assert len(drawn.axes) == 3
    assert "recited" in words
