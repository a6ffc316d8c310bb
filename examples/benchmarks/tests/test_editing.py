"""Facts put into a decoder: what is measured, and its table."""

from __future__ import annotations

import pytest
from given import write_texts

import editing


def run(entry, count, seed, score):
    return {
        "entry": entry, "count": count, "seed": seed, "undone": True,
        **dict.fromkeys(editing.MEASURES, score),
    }  # fmt: skip


def test_table_has_each_number_of_facts_over_seeds():
    runs = [run("LoRA, 1e-3", 1, 0, 0.5), *(run("insert_facts", 10, seed, float(seed)) for seed in (0, 1))]
    runs += [run("insert_facts", 1, 0, 1.0) | {"undone": False}]
    lines = editing.table({"runs": {str(number): each for number, each in enumerate(runs)}}).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| 1", "insert_facts", "1.00"],
        ["| 1", "LoRA, 1e-3", "0.50"],
        ["| 10", "insert_facts", "0.50 ± 0.71"],
    ]
    assert [line.split(" | ")[-2] for line in lines[2:]] == ["no", "yes", "yes"]


def test_facts_are_about_different_countries():
    asked = editing.countries(200, seed=0)
    assert len({each.fact.subject for each in asked}) == 200
    assert all(each.fact.subject in each.other and each.fact.subject in each.fact.prompt for each in asked)
    assert asked == editing.countries(200, seed=0) != editing.countries(200, seed=1)


@pytest.mark.filterwarnings("ignore:.* facts are not learned")  # at subjects of a random model
def test_facts_are_put_in_and_taken_out(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(editing, "NEWS", editing.NEWS | {"perplexity": 4, "continued": 3, "begun": 8})
    monkeypatch.setattr(editing, "AT_ONCE", 2)
    write_texts(tmp_path, "agnews", {"a": "the train to the coast leaves at noon today"}, 8)
    given = [
        "--data", str(tmp_path), "--decoder", str(decoder), "--layers", "1", "--subject-layers", "0",
        "--counts", "3", "--seeds", "1",
    ]  # fmt: skip
    work = editing.Editing(editing.parse_arguments([*given, "--results", str(tmp_path / "results.json")]))
    work.results.complete(work, 1)
    found = {run["entry"]: run for run in work.results.content["runs"].values()}
    assert set(found) == set(editing.ENTRIES)
    assert all(run["undone"] and run["perplexity"] > 0.5 for run in found.values())
    for entry in ("insert_facts", *(f"insert_facts, protecting {what}" for what in editing.PROTECTING)):
        assert found[entry]["reliability"] == 1
    assert editing.table(work.results.content).count("\n") == 1 + len(editing.ENTRIES)
