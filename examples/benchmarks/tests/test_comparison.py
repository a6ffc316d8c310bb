"""The comparison with PEFT's own methods: all train, rates and stopping are fair, tables add up."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import peft
import pytest
import torch
import transformers

import directions
import first_step
import learning_rates
import pareto

BENCHMARKS = Path(__file__).resolve().parents[1]
WIDTH, WORDS, CLASSES = 128, 12, 3
NAMES = (
    "full", "probe", "lora", "rslora", "pissa", "lora-ga", "vb-lora", "loha", "lokr", "randlora", "tinylora",
    "osf", "flora", "flora-zero", "flora-all", "mos", "lora-sb", "effort", "continual-svd",
)  # fmt: skip
SIZES = {"mos": 2, "vb-lora": 4}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def network():
    torch.manual_seed(3)
    config = transformers.BertConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=4, num_attention_heads=2,
        vocab_size=WORDS, num_labels=CLASSES, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture
def task():
    from support.task import Task

    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, WORDS, (24, 4), generator=generator).tolist()
    rows = [{"input_ids": text, "labels": text[0] % CLASSES} for text in texts]
    return Task(
        "words", network, rows[:12], rows[12:18], rows[18:], collate=collate, peft_task_type="SEQ_CLS",
        new_modules=["classifier"], target_modules=r".*encoder.*\.(query|key|value|dense)",
    )  # fmt: skip


def schedule(**options):
    from support.trial import Schedule

    return Schedule(
        **{"steps": 2, "batch_size": 4, "checks": 1, "start_batches": 1, "bf16": False, **options}
    )


def test_every_contestant_is_tried():
    from support.contestants import CONTESTANTS

    assert set(CONTESTANTS) == set(NAMES)
    assert all(len(contestant.rates) == 3 for contestant in CONTESTANTS.values())


@pytest.mark.parametrize("name", NAMES)
def test_contestant_trains_from_the_base_and_reports_all_figures(task, name):
    from support import trial
    from support.contestants import CONTESTANTS, trainable

    size = SIZES.get(name, 4)
    found = trial.run(task, name, size, CONTESTANTS[name].rates[1], 0, schedule())
    head = WIDTH * CLASSES + CLASSES
    assert found["trainable"] == trainable(network()) if name == "full" else found["trainable"] >= head
    assert (found["trainable"] == head) == (name == "probe")
    assert all(math.isfinite(found[f"{split}_loss"]) for split in ("validation", "test"))
    assert 0 <= found["test_accuracy"] <= 1
    assert found["steps"] == 2


def test_size_for_gives_the_size_that_trains_as_many_parameters(task):
    from support.contestants import CONTESTANTS, size_for, trainable

    for name in ("lora", "flora", "loha", "randlora"):  # RandLoRA trains the fewer, the larger its rank
        wanted = trainable(CONTESTANTS[name].adapt(task, 5, ()))
        assert size_for(name, task, wanted) == 5
    with pytest.raises(ValueError, match="has no size"):
        size_for("full", task, 100)


@pytest.mark.parametrize(("width", "inner", "length"), [(192, 512, 64), (192, 384, 96), (256, 512, 128)])
def test_vectors_of_vb_lora_make_up_all_widths(width, inner, length):
    from support.contestants import CONTESTANTS

    contestant = CONTESTANTS["vb-lora"]
    config = contestant.config(r".*encoder.*\.dense", 8)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=1, vocab_size=5))
    contestant.fit(bert, config)
    assert config.vector_length == length
    peft.get_peft_model(bert, config)  # PEFT refuses other lengths


def test_training_stops_early_and_goes_back_to_the_best_weights(task, monkeypatch):
    from support import trial

    losses, seen = iter([1.0, 0.5, 2.0, 3.0, 0.1]), []

    def evaluate(model, task, rows, bf16):
        seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        return {"loss": next(losses), "accuracy": 0.0}

    monkeypatch.setattr(trial, "evaluate", evaluate)
    found = trial.run(task, "probe", 0, 0.1, 0, schedule(steps=10, checks=5, patience=2))
    assert found["validation_loss"] == 0.5
    assert found["steps"] == 4  # the second look, of one after every two steps
    assert found["test_loss"] == 0.1  # the fifth look is at the test rows
    assert all(torch.equal(now, best) for now, best in zip(seen[-1], seen[1], strict=True))
    assert not all(torch.equal(now, last) for now, last in zip(seen[-1], seen[3], strict=True))


def test_the_head_has_its_own_rate(task):
    from support import trial

    first = network().get_parameter("classifier.weight")
    moved = {}
    for head_rate in (None, 0.0, 0.5):
        found = {}

        def evaluate(model, task, rows, bf16, found=found):
            found |= {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            return {"loss": 1.0, "accuracy": 0.0}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial, "evaluate", evaluate)
            trial.run(task, "full", 0, 1e-3, 0, schedule(), head_rate)
        moved[head_rate] = (found["classifier.weight"] - first).abs().max().item()
        assert not torch.equal(found["bert.pooler.dense.weight"], network().bert.pooler.dense.weight)
    assert moved[0.0] == 0
    assert 0 < moved[None] < 1e-2 < moved[0.5]


def test_evaluation_counts_rows_and_labeled_tokens(task):
    from support import trial

    class Next(torch.nn.Module):
        """Predicts the next number with certainty."""

        def forward(self, input_ids):
            logits = 50.0 * torch.nn.functional.one_hot((input_ids + 1) % WORDS, WORDS)
            return transformers.modeling_outputs.CausalLMOutput(logits=logits.float())

    rows = [{"input_ids": [1, 2, 3, 5], "labels": [-100, 2, 3, 5]}]
    found = trial.evaluate(Next(), task, rows, False)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(50 / 3, rel=1e-5)


class Runs:
    """Stands for `trial.run`: the loss depends on the rate, the accuracy on method and seed."""

    def __init__(self):
        self.calls, self.head_rates = [], set()

    def __call__(self, task, name, size, rate, seed, schedule, head_rate=None):
        self.calls.append((name, size, rate, seed))
        self.head_rates.add((name, head_rate))
        loss = abs(math.log10(rate) + 2)
        score = {"mos": 0.8, "lora": 0.7}.get(name, 0.5) + seed / 100
        return {
            "trainable": 10 * (size or 5), "validation_loss": loss, "test_accuracy": score, "seconds": 1.0
        }  # fmt: skip


@pytest.fixture
def runs(task, monkeypatch):
    from support import graded, trial

    stand_in = Runs()
    monkeypatch.setattr(trial, "run", stand_in)
    monkeypatch.setattr(graded, "load", lambda *_: task)
    monkeypatch.setattr("sys.argv", ["quality.py"])
    return stand_in


def test_grid_tunes_with_one_seed_resumes_and_tells_its_length(runs, tmp_path, monkeypatch, capsys):
    import quality
    from support.contestants import CONTESTANTS

    results = tmp_path / "results.json"
    command = ["quality.py", "--small", "--claims", "mos", "--seeds", "2", "--results", str(results)]
    monkeypatch.setattr("sys.argv", command)
    quality.main()
    calls = [call[2:] for call in runs.calls if call[0] == "lora" and call[1] == 16]
    tried = [rate for rate, seed in calls[:-1]]
    assert set(CONTESTANTS["lora"].rates) < set(tried)  # the least loss, of 1e-2, lies beyond them
    assert 1e-2 < max(tried) < 1e-1
    assert calls == [*((rate, 0) for rate in tried), (1e-2, 1)]
    assert runs.head_rates >= {("probe", None), ("lora", 1e-2), ("mos", 1e-2)}  # the best for the probe
    assert ("lora", None) not in runs.head_rates
    first, shown = len(runs.calls), capsys.readouterr().out
    assert "predicted: 0.0" in shown
    quality.main()
    assert len(runs.calls) == first
    monkeypatch.setattr("sys.argv", [*command[:-3], "3", *command[-2:]])
    quality.main()
    assert {call[3] for call in runs.calls[first:]} == {2}


def test_longer_comparisons_have_a_file_and_steps_of_their_own(runs, tmp_path, monkeypatch):
    import quality
    import timing

    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    once = quality.parse_arguments(["--data", "folder"])
    thrice = quality.parse_arguments(["--data", "folder", "--longer", "3"])
    assert [options.results.name for options in (once, thrice)] == ["quality.json", "quality-x3.json"]
    steps = [quality.settings(options)["clip"]["schedule"]["steps"] for options in (once, thrice, once)]
    assert steps[1] == 3 * steps[0] == 3 * steps[2]


def test_grid_stops_where_no_rate_trains(runs, tmp_path, monkeypatch):
    import quality
    from support import trial

    diverged = lambda *call: {**runs(*call), "validation_loss": math.inf}  # noqa: E731
    monkeypatch.setattr(trial, "run", diverged)
    command = ["quality.py", "--small", "--claims", "mos", "--results", str(tmp_path / "results.json")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"probe on bbcnews: no loss is finite with rates \[0.003"):
        quality.main()


def test_tables_compare_seed_by_seed(runs, tmp_path, monkeypatch):
    import claims
    import pages
    import quality
    import timing

    results = tmp_path / "quality-small.json"
    command = ["quality.py", "--small", "--claims", "mos", "--seeds", "2", "--results", str(results)]
    monkeypatch.setattr("sys.argv", command)
    quality.main()
    content = json.loads(results.read_text())
    claim = claims.CLAIMS["mos"]
    gaps = claims.differences(content, claim, claims.Entry("lora", 16))
    assert gaps == {"bbcnews": pytest.approx([0.1, 0.1])}
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    text = pages.filled("<!-- table: quality_mos_small -->\n<!-- end -->")
    assert "| mos-2 | 20 | 0.805 ± 0.007 |  |" in text
    assert "| lora-16 | 160 | 0.705 ± 0.007 | 0.100 ± 0.000 |" in text
    assert "Not measured yet" in claims.table(content, "flora")


def test_what_is_measured_anew_is_compared_with_what_was_published(runs, tmp_path, monkeypatch, capsys):
    import quality
    import timing

    published, anew = tmp_path / "quality-small.json", tmp_path / "anew.json"
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    command = ["quality.py", "--small", "--claims", "mos", "--seeds", "2"]
    monkeypatch.setattr("sys.argv", command)
    quality.main()
    assert "of before" not in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "--results", str(anew)])
    quality.main()
    assert "5 of 5 accuracies are those of before" in capsys.readouterr().out
    content = json.loads(published.read_text())
    for run in content["runs"].values():
        run["test_accuracy"] += 0.02 if run["entry"] == "lora-16" else 0.01  # spreads are 0.007 each
    published.write_text(json.dumps(content))
    quality.main()
    shown = capsys.readouterr().out
    assert "4 of 5 accuracies are those of before, within their spreads; not lora-16 on bbcnews" in shown


def test_language_models_are_measured_by_fewer_methods_and_show_their_losses():
    import claims

    claim = claims.CLAIMS["mos"]
    assert {claims.label(entry) for entry in claim.entries("gsm8k-svamp")} == {
        "mos-2", "lora-16", "vb-lora as mos-2"
    }  # fmt: skip
    assert {claims.label(entry) for entry in claim.entries("trec6")} > {"mos-2", "lora-2"}
    with_large = [task for task in ("trec6", "clinc150", "bbcnews", None)
                  if set(claim.large) & set(claim.entries(task))]  # fmt: skip
    assert with_large == ["trec6", None]
    run = {"task": "gsm8k-svamp", "rate": 0.1, "seed": 0, "trainable": 7, "validation_loss": 1.0}
    runs = {
        name: {**run, "entry": name, "test_accuracy": 0.5, "test_loss": 2.0} for name in ("mos-2", "lora-16")
    }
    text = claims.table({"runs": runs}, "mos")
    assert "| SmolLM2-135M | trained parameters | gsm8k-svamp | gsm8k-svamp, loss | mos-2 minus it |" in text
    assert "| lora-16 | 7 | 0.500 | 2.000 | 0.000 |" in text
    runs["text"] = {**run, "task": "trec6", "entry": "mos-2", "trainable": 9, "test_accuracy": 0.7}
    text = claims.table({"runs": runs}, "mos")
    assert "| MiniLM | trained parameters, head included | trec6 | mos-2 minus it |" in text
    assert "| mos-2 | 9 | 0.700 |  |" in text
    assert "| mos-2 | 7 | 0.500 | 2.000 |  |" in text


def test_peaks_are_those_of_tensors_and_not_of_holes_between_them(tmp_path):
    import timing

    script = tmp_path / "holes.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(timing.__file__).parent)!r})\n"
        "import timing, torch\n"
        "def work():\n"
        "    torch.ones(16, 2**18)\n"
        "    kept = [(torch.ones(2**18), torch.ones(8)) for _ in range(64)]\n"
        "    kept = [small for _, small in kept]\n"
        "    large = [torch.ones(3, 2**18) for _ in range(16)]\n"
        "timing.print_peak(work)\n"
    )
    assert 64 < timing.peak_mib(str(script)) < 80


def test_peaks_are_not_hidden_by_earlier_ones(tmp_path):
    import timing

    script = tmp_path / "earlier.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(timing.__file__).parent)!r})\n"
        "import timing, torch\n"
        "torch.ones(256, 2**18)\n"
        "timing.print_peak(lambda: torch.ones(64, 2**18))\n"
    )
    assert timing.peak_mib(str(script)) == pytest.approx(64, rel=0.1)


@pytest.mark.slow
def test_speed_measures_every_method(tmp_path, monkeypatch):
    import pages
    import speed
    import timing

    monkeypatch.setattr(speed, "SHAPES", {"20M": (4, 512)})
    monkeypatch.setattr(speed, "GROWTH", {"batch": [(8, 4, 128, 1)]})
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "peak_mib", lambda script, method, *sizes: float(len(method)))
    with torch.random.fork_rng():
        for arguments in (["--quick"], ["--parts", "growth", "--repeats", "1"]):
            monkeypatch.setattr("sys.argv", ["speed.py", *arguments])
            speed.main()
    rows = timing.load("speed-quick")["methods"]
    assert list(rows) == list(speed.SIZES)
    assert rows["lora"]["to_lora"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert rows["lora-sb"]["trainable"] * 27 < rows["lora"]["trainable"]
    (point,) = timing.load("speed-growth")["growth"]["batch"]
    assert set(point["to_lora"]) == set(speed.OURS)
    text = pages.filled("<!-- table: growth -->\n<!-- end -->\n<!-- table: speed_quick -->\n<!-- end -->")
    assert "| batch | 8 | 4 | 128 | 1 |" in text
    assert "| lora, 20M |" in text


@pytest.mark.parametrize("name", ["flora", "lora", "full"])
def test_spectra_are_those_of_what_was_trained(task, monkeypatch, name):
    import spectra

    drawn = ("encoder.layer.0.attention.self.query",)
    monkeypatch.setattr(spectra, "DRAWN", drawn)
    monkeypatch.setattr(spectra, "SIZES", {name: 4})
    found = spectra.measured(task, name)
    values = found["spectra"][drawn[0]]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert len(values) <= 4 or name == "full"
    assert len(values) > 1
    assert all(1 <= rank <= WIDTH for rank in found["effective_ranks"].values())
    assert len(found["effective_ranks"]) == 4 * 6


def test_directions_are_compared_at_the_rate_that_validates_best():
    nan = float("nan")
    runs = {
        f"{method} {rate}": {
            "method": method, "rate": rate, "seed": 0, "trainable": [30, 20],
            "shared": [[0.5, nan], [0.1, 0.3]],
            "validation": [[0.5, nan], [value, value]], "test": [[0.9, nan], [value - 0.2, 0.8]],
        }
        for method, rate, value in (("weight", 1e-4, 0.4), ("weight", 3e-4, 0.8), ("lora", 1e-3, 0.5))
    }  # fmt: skip
    lines = directions.table({"runs": runs}).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    weight = ["the weight's, half of them", "0.700", "0.850", "0.300", "0.200", "30", "20", "0.0003", "1"]
    assert rows[0] == weight
    assert [row[1] for row in rows] == ["0.700", "0.550"]


def test_learning_rates_are_compared_with_loras_best_by_validation_loss():
    runs = {
        f"{name} {rate} {seed}": {
            "task": "t", "entry": name, "rate": rate, "seed": seed, "before": False, "validation_loss": loss,
            "test_accuracy": accuracy,
        }
        for name, rate, seed, loss, accuracy in (
            ("LoRA", 1e-3, 0, 0.5, 0.8), ("LoRA", 1e-3, 1, 0.5, 0.9), ("LoRA", 3e-3, 0, 0.4, 0.7),
            ("LoRA", 3e-3, 1, 0.4, 0.7), ("LoRA", 1e-2, 0, 0.1, 0.1),
            ("MoS", 1e-3, 0, 0.3, 0.9), ("MoS", 1e-3, 1, 0.3, 0.9), ("MoS", 3e-3, 0, 0.6, 0.85),
            ("MoS", 3e-3, 1, 0.6, 0.85),
        )
    }  # fmt: skip
    lines = learning_rates.table({"runs": runs}, before=False).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    best = ["0.850 ± 0.071", "0.700 ± 0.000", "0.100", "0.003", "0.000 ± 0.000", "2"]  # 1e-2 has one seed
    assert rows == [
        ["t", "LoRA", *best],
        ["t", "MoS", "0.900 ± 0.000", "0.850 ± 0.000", "", "0.001", "-0.050 ± 0.000", "2"],
    ]


def parameter_runs(*more):
    """Runs of the head, of LoRA, which is best at 1e-3, and of MoS, which is best at another rate."""
    rows = (
        ("probe", 1e-1, 0, 0.9, 0.5, 10),
        ("lora-default-16", 1e-3, 0, 0.5, 0.80, 110), ("lora-default-16", 1e-3, 1, 0.5, 0.82, 110),
        ("lora-default-16", 3e-3, 0, 0.6, 0.90, 110),
        ("mos-default-2", 1e-3, 0, 0.5, 0.81, 30), ("mos-default-2", 1e-3, 1, 0.5, 0.83, 30),
        ("mos-default-2", 3e-3, 0, 0.4, 0.84, 30), ("mos-default-2", 3e-3, 1, 0.4, 0.86, 30),
        *more,
    )  # fmt: skip
    names = ("entry", "rate", "seed", "validation_loss", "test_accuracy", "trainable")
    return {"runs": {str(row[:3]): {"task": "t", **dict(zip(names, row, strict=True))} for row in rows}}


def test_accuracy_is_told_by_trained_parameters_at_loras_rate_and_at_the_best():
    lines = pareto.table(parameter_runs()).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:5]]
    assert rows == [
        ["probe", "0", "", "0.500", "-0.300", "", "1"],
        ["mos-2", "20", "0.820 ± 0.014", "0.850 ± 0.014", "0.040 ± 0.000", "above", "2"],
        ["lora-16", "100", "0.810 ± 0.014", "0.810 ± 0.014", "0.000 ± 0.000", "", "2"],
    ]
    assert lines[-1] == "Twice the passes add, with seed 0: not run."
    points = pareto.points(parameter_runs(), "t")
    assert points == {"LoRA": {100: [0.80, 0.82]}, "MoS": {20: [0.81, 0.83]}}


@pytest.mark.parametrize(("reached", "converged"), [(0.82, True), (0.83, False)])
def test_a_task_that_has_not_converged_has_no_table(reached, converged):
    runs = parameter_runs((f"lora-default-16{pareto.TWICE}", 1e-3, 0, 0.5, reached, 110))
    text = pareto.table(runs)
    assert ("nothing can be said" not in text) == converged
    assert f"lora-16 {reached - 0.8:+.3f}" in text


def test_untuned_entries_wait_for_loras_rate_and_have_it_with_all_seeds(monkeypatch):
    for name, made in pareto.DEFAULTS.items():
        monkeypatch.setitem(pareto.CONTESTANTS, name, made)
    options = pareto.parse_arguments(["--data", "nowhere", "--results", "nowhere", "--seeds", "2"])
    options.tasks = ["t"]
    plan = pareto.Pareto.__new__(pareto.Pareto)
    plan.options = options

    def jobs(*runs):
        plan.results = types.SimpleNamespace(content=parameter_runs() | {"runs": dict(enumerate(runs))})
        return [(job[1].method, job[2], job[3]) for job in plan.wanted().values()]

    def run(entry, rate, loss):
        return {"task": "t", "entry": entry, "seed": 0, "rate": rate, "validation_loss": loss}

    heads = [run("probe", rate, loss) for rate, loss in ((3e-3, 3.0), (1e-2, 1.0), (3e-2, 2.0))]
    assert jobs() == [("probe", rate, 0) for rate in (3e-3, 1e-2, 3e-2)]
    assert {method for method, _, _ in jobs(*heads)} == {"probe", "lora-default", "full"}
    loras = [run("lora-default-16", rate, loss) for rate, loss in ((3e-4, 3.0), (1e-3, 1.0), (3e-3, 2.0))]
    found = jobs(*heads, *loras)
    assert {job for job in found if job[0] == "mos-default"} == {("mos-default", 1e-3, s) for s in (0, 1)}
    assert ("lora-default", 1e-3, 1) in found
    options.tasks = ["trec6"]  # whose head has a rate that was found elsewhere
    assert [job for job in jobs() if job[0] == "probe"] == [("probe", 1e-1, seed) for seed in (0, 1)]


def test_the_length_that_was_found_is_told_beside_fixed_ones():
    runs = {
        f"sst2 0.01 {start} {seed}": {"accuracy": accuracy, "length": length}
        for start, seed, accuracy, length in (
            ("auto", 0, 0.8, 8e-4), ("auto", 1, 0.9, 2e-4), ("1e-06", 0, 0.7, 1e-6), ("0.01", 0, 0.6, 1e-2),
        )
    }  # fmt: skip
    row = first_step.table({"runs": runs}).splitlines()[-1]
    cells = ["sst2", "0.01", "0.850 ± 0.071 (0.0002, 0.0008)", "0.700", "", "", "", "0.600", "2"]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == cells
