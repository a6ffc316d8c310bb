"""README, the pages of benchmarks and of methods: headers, sections, nothing but what is measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

import peft_subspace
from methods import METHODS

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "README.md"
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
PAGES = [
    README,
    *sorted((ROOT / "docs" / "benchmarks").glob("*.md")),
    ROOT / "docs" / "developer" / "coverage.md",
    ROOT / "docs" / "guides" / "choosing_a_method.md",
    ROOT / "docs" / "guides" / "editing.md",
    ROOT / "docs" / "guides" / "heads.md",
    ROOT / "docs" / "guides" / "pruned_models.md",
    *CARDS,
]
SECTIONS = [
    "Equation", "Use", "Options", "When to use it", "When not to use it", "Measured", "Limits", "Citation",
]  # fmt: skip
MARKER = re.compile(r"<!-- (table|figure): ([\w-]+) -->")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
every_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)


@pytest.fixture
def results(monkeypatch, tmp_path):
    """An empty folder in the place of the results."""
    import timing

    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    return tmp_path


def text_of(page):
    """A page without its code, whose comments would look like headings."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.S)


def config_of(card):
    name = card.stem.replace("-", "").lower() + "config"
    return next(getattr(peft_subspace, n) for n in peft_subspace.__all__ if n.lower() == name)


def test_every_method_has_a_card():
    import cards

    assert {config_of(card) for card in CARDS} == {
        getattr(peft_subspace, name) for name in peft_subspace.__all__ if name.endswith("Config")
    } - {peft_subspace.CompositionConfig}  # which is made of adapters of the others
    assert {card.stem for card in CARDS} == {*cards.NAMES}


@every_card
def test_header_is_the_hubs(card):
    import cards

    data = ModelCard.load(card).data
    assert data.to_dict() == metadata_load(card)
    assert (data.library_name, data.license) == ("peft", "apache-2.0")
    assert {"peft", "peft_subspace", config_of(card).__name__[:-6].lower()} <= set(data.tags)
    assert data.model_name == cards.NAMES[card.stem]
    assert data.base_model
    assert {result.metric_type for result in data.eval_results} == set(data.metrics)
    for result in data.eval_results:
        assert 0 < float(re.fullmatch(r"(\d\.\d+)( ± \d\.\d+)?", result.metric_value)[1]) <= 1


@every_card
def test_card_has_the_sections_in_order(card):
    assert re.findall(r"^## (.*)", text_of(card), re.M) == SECTIONS


@every_card
def test_card_cites_the_paper_that_the_config_names(card):
    number = re.search(r"arXiv\s+(\d{4}\.\d{5})", config_of(card).__doc__)[1]
    citation = card.read_text().split("## Citation")[1]
    title = re.search(r'"(.*?),?"', config_of(card).__doc__.split("Reference:")[1], re.S)[1]
    assert number in citation
    assert re.sub(r"[{}]", "", citation).count(" ".join(title.split())) == 1


def test_method_table_of_the_readme_links_to_every_card():
    table = README.read_text().split("<!-- table: methods -->")[1].split("<!-- end -->")[0]
    for card in CARDS:
        (row,) = [line for line in table.splitlines() if f"(model_cards/{card.name})" in line]
        assert row.count("|") == 7


@every_page
def test_markers_are_known_and_closed(page):
    import figures
    import pages

    known = {"table": pages.TABLES, "figure": figures.FIGURES}
    marks = MARKER.findall(page.read_text())
    assert marks or page.stem == "index"
    assert [name for kind, name in marks if name not in known[kind]] == []
    assert len(pages.MARKED.findall(page.read_text())) == len(marks)


def test_every_figure_is_shown():
    import figures

    shown = {name for page in PAGES for kind, name in MARKER.findall(page.read_text()) if kind == "figure"}
    assert shown == {*figures.FIGURES}


@every_page
def test_page_says_what_the_results_say(page, tmp_path):
    import cards
    import figures
    import pages

    text = page.read_text()
    drawn = {name: figures.draw(name, tmp_path) for kind, name in MARKER.findall(text) if kind == "figure"}
    filled = pages.filled(text, drawn, page.parent)
    assert (cards.with_results(filled, page.stem) if page in CARDS else filled) == text


def test_what_is_not_measured_is_said_to_be_so(results):
    import cards
    import pages

    text = "<!-- table: flora -->\nold\n<!-- end -->\n<!-- figure: spectra -->\nold\n<!-- end -->\n"
    assert pages.filled(text, {"spectra": None}) == (
        "<!-- table: flora -->\nNot measured yet.\n<!-- end -->\n<!-- figure: spectra -->\n<!-- end -->\n"
    )
    assert "model-index" not in cards.header("flora")


def test_a_figure_is_linked_from_where_the_page_lies(results):
    import pages

    text, drawn = "<!-- figure: spectra -->\n<!-- end -->", {"spectra": "Spectra"}
    assert "![Spectra](model_cards/figures/spectra.png)" in pages.filled(text, drawn)
    assert "![Spectra](figures/spectra.png)" in pages.filled(text, drawn, ROOT / "model_cards")


def made_up_quality():
    """Runs of one claim on two tasks: MoS reaches LoRA on one of them, and beats VB-LoRA."""
    accuracies = {
        "agnews": {"mos-2": (0.80, 0.84), "lora-16": (0.82, 0.81), "vb-lora as mos-2": (0.6, 0.65)},
        "trec6": {"mos-2": (0.70, 0.71), "lora-16": (0.90, 0.91), "vb-lora as mos-2": (0.6, 0.62)},
    }
    heads = {"agnews": 0, "trec6": 100}
    sizes = {"mos-2": 100, "lora-16": 800, "vb-lora as mos-2": 101}
    runs = [
        {
            "task": task, "entry": entry, "rate": 0.01, "seed": seed,
            "trainable": sizes[entry] + heads[task],
            "validation_loss": 1.0, "test_accuracy": score, "test_loss": 1.0, "seconds": 1.0,
            "origin": "a device with torch 1.2",
        }
        for task, entries in accuracies.items() for entry, scores in entries.items()
        for seed, score in enumerate(scores)
    ]  # fmt: skip
    settings = {
        "text": {
            "rows": {"train": 10, "validation": 5, "test": 7, "tokens": 8},
            "schedule": {"steps": 11, "batch_size": 3},
        },
    }
    return {
        "seeds": 2, "settings": settings, "runs": {str(number): run for number, run in enumerate(runs)}
    }  # fmt: skip


def made_up_sequences():
    from support import sequences

    methods = {"continual-svd": 0.9, "lora": 0.5, "joint": 0.95}
    runs = {
        f"{method} {seed}": {
            "method": method, "order": ["a", "b"], "rate": 0.01, "seed": seed, "split": "test",
            "known": [[0.9, 0.4], [end - seed / 100, 0.8]], "shared": [[0.9, 0.0], [0.1, 0.8]],
            "baseline": [0.5, 0.5], "trainable": 100, "seconds": 1.0,
        }
        for method, end in methods.items() for seed in (0, 1)
    }  # fmt: skip
    settings = {
        "model": None, "train_rows": 10, "validation_rows": 5, "test_rows": 7, "max_length": 8,
        "preserve": 0.5, "epochs": 3, "batch_size": 4, "own_head_rate": False,
    }  # fmt: skip
    content = {"settings": settings, "versions": {}, "classes": {"a": 2, "b": 3}, "runs": runs}
    return {**content, "summary": sequences.summary(content)}


def made_up_spectra():
    method = {"title": "FLoRA", "spectra": {"first": [1.0, 0.5], "last": [1.0, 0.1]}}
    return {"methods": {"flora": method, "lora": {**method, "title": "LoRA"}}}


def test_figures_are_drawn_from_results_and_only_from_those(results, tmp_path):
    import figures

    folder = tmp_path / "figures"
    assert [figures.draw(name, folder) for name in figures.FIGURES] == [None] * len(figures.FIGURES)
    assert not folder.exists()
    for name, content in {
        "quality": made_up_quality(), "continual_decoder": made_up_sequences(), "spectra": made_up_spectra()
    }.items():  # fmt: skip
        (results / f"{name}.json").write_text(json.dumps(content))
    alts = {name: figures.draw(name, folder) for name in figures.FIGURES}
    drawn = {name: alt for name, alt in alts.items() if alt is not None}
    assert {*drawn} == {
        "accuracy_text", "continual_decoder_averages", "continual_decoder_matrices", "spectra"
    }  # fmt: skip
    assert {path.stem for path in folder.iterdir()} == {*drawn}
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in drawn)
    assert "agnews, trec6" in drawn["accuracy_text"]
    first = (folder / "spectra.png").read_bytes()
    figures.draw("spectra", folder)
    assert (folder / "spectra.png").read_bytes() == first


def test_no_picture_outlives_its_results(results, tmp_path):
    import figures

    (results / "quality.json").write_text(json.dumps({**made_up_quality(), "runs": {}}))
    for name in ("accuracy_text", "spectra"):
        (tmp_path / f"{name}.png").touch()
        assert figures.draw(name, tmp_path) is None
        assert not (tmp_path / f"{name}.png").exists()


def test_pareto_front_has_what_nothing_smaller_beats():
    from figures import pareto

    points = [(100, 0.9), (10, 0.5), (50, 0.4), (10, 0.6), (200, 0.9), (300, 0.95)]
    assert pareto(points) == [(10, 0.6), (100, 0.9), (300, 0.95)]


@pytest.mark.parametrize(
    ("differences", "expected"),
    [([0.1, 0.2, 0.3], 1), ([-0.1, -0.2, -0.3], -1), ([0.1, -0.2, 0.3], 0), ([0.1], None), ([0.0, 0.0], 0)],
)
def test_a_difference_counts_beyond_one_standard_deviation(differences, expected):
    import verdicts

    assert verdicts.side(differences) == expected


def test_verdict_counts_tasks():
    import verdicts

    text = verdicts.verdict(made_up_quality(), "mos")
    assert "held on 1 of 2 tasks (agnews)" in text
    assert "reach lora-16 (4.5 to 8.0 times its trained parameters, head included): above on 0" in text
    assert "head included): above on 0, level on 1, below on 1" in text
    assert "beat vb-lora as mos-2 (1.0 times its trained parameters, head included): above on 2" in text
    assert "Too few runs" in verdicts.verdict(made_up_quality(), "flora")


def test_table_of_sequences_pairs_orders_and_seeds_and_states_its_settings(results):
    import pages

    (results / "continual_decoder.json").write_text(json.dumps(made_up_sequences()))
    text = pages.filled("<!-- table: continual_decoder -->\n<!-- end -->")
    assert "| 0.200 ± 0.000 | 0.01 | 2 |" in text
    assert "above *LoRA r=16, one after another*; below *full fine-tuning, all tasks at once*" in text
    assert "MiniLM on a (2 classes), b (3 classes)" in text
    assert "1 order (a, b), each with up to 2 seeds" in text
    assert "seed 0; head and update share one." in text
    own = made_up_sequences()
    own["settings"]["own_head_rate"] = True
    (results / "continual_decoder.json").write_text(json.dumps(own))
    text = pages.filled("<!-- table: continual_decoder -->\n<!-- end -->")
    assert "seed 0; heads train with the one that is best for the head alone." in text
    assert "At the end of a, b, with heads at a rate of their own, Continual SVD is above" in text


def test_table_of_claims_states_its_settings(results):
    import pages

    (results / "quality.json").write_text(json.dumps(made_up_quality()))
    text = pages.filled("<!-- table: quality_mos -->\n<!-- end -->")
    assert "Text: 10 rows to train on, 5 to validate, up to 7 to test, of at most 8 tokens" in text
    assert "at most 11 steps of 3 rows" in text
    assert "Measured on a device with torch 1.2." in text
    not_run = pages.filled("<!-- table: quality_flora -->\n<!-- end -->")
    assert "Mean ±" not in not_run


def test_table_of_claims_says_what_was_not_run(results):
    import pages

    content = made_up_quality()
    content["runs"] = {
        key: run
        for key, run in content["runs"].items()
        if (run["task"], run["entry"]) != ("agnews", "lora-16")
    }
    (results / "quality.json").write_text(json.dumps(content))
    text = pages.filled("<!-- table: quality_mos -->\n<!-- end -->")
    assert "| lora-16 | 900 | not run | 0.905 ± 0.007 | -0.200 ± 0.000 |" in text
    assert "held on 0 of 1 task." in text  # agnews cannot be judged


def test_header_has_the_results_of_every_comparison(results):
    import cards

    (results / "quality.json").write_text(json.dumps(made_up_quality()))
    (results / "continual_decoder.json").write_text(json.dumps(made_up_sequences()))
    text = "---\nlibrary_name: peft\n# results\nold\n# end\n---\n\n# Title\n"
    mos = ModelCard(cards.with_results(text, "mos")).data
    assert [(r.dataset_type, r.metric_value) for r in mos.eval_results] == [
        ("fancyzhx/ag_news", "0.820 ± 0.028"), ("CogComp/trec", "0.705 ± 0.007")
    ]  # fmt: skip
    assert mos.datasets == ["fancyzhx/ag_news", "CogComp/trec"]
    svd = ModelCard(cards.with_results(text, "continual-svd")).data
    assert [r.dataset_name for r in svd.eval_results] == ["a, then b"]
    assert svd.datasets is None


def test_table_of_features_numbers_its_reasons():
    import features
    import pages

    def entry(text, reason=""):
        return {"entry": text, "reason": reason}

    no = entry("no", "rule")
    found = {
        "first": {"flora": entry("yes"), "mos": no, "effort": entry("failed", "test_x")},
        "second": {"flora": entry("not run", "no library"), "mos": no, "effort": entry("no")},
    }
    everywhere = dict.fromkeys(features.METHODS, entry("yes"))
    plain = dict.fromkeys("abcd", everywhere)
    first = ["### With every method", "", "|  |  |  |", "| --- | --- | --- |", "| a | b | c |", "| d |  |  |"]
    assert features.table(plain, pages.markdown).splitlines() == first
    both = features.table(found | plain, pages.markdown).splitlines()
    assert both[:8] == [*first, "", "### With some methods, or not"]
    rows = features.table(found, pages.markdown).splitlines()
    assert [cell.strip() for cell in rows[2].strip("|").split("|")] == ["", *features.METHODS.values()]
    assert rows[4] == "| first | yes | no (1) | **failed** (2) |  |  |  |"
    assert rows[5] == "| second | not run (3) | no (1) | no |  |  |  |"
    assert rows[6:] == ["", "1. rule", "2. test_x", "3. no library"]
    assert {*features.METHODS} == {method.name for method in METHODS} - {"composition"}
