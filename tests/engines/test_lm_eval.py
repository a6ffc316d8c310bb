"""lm-eval on adapters of every method against the log-likelihoods that their models have natively."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import models
from models import tokenizer, words

PACKAGE = "lm_eval"
GUIDE = Path(__file__).parents[2] / "docs/guides/lora_export_and_serving.md"
LINE = re.search(r'python -c "(.*PROGRAM.*)" ARGUMENTS', GUIDE.read_text())[1].replace("PROGRAM", PACKAGE)
TOLERANCE = 1e-5
ROWS = [
    {"context": words(5, 9 + i, 12), "choices": [words(7, i + 3), words(8, 20, 3), words(33)], "label": i % 3}
    for i in range(6)
]

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model and its tokenizer, and a task of multiple choice."""
    folder = tmp_path_factory.mktemp("lm_eval")
    models.llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    task = {
        "task": "words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "tasks").mkdir()
    (folder / "tasks/words.yaml").write_text(json.dumps(task))
    return folder


def adapted(method, folder):
    """A model with an adapter that changes it, saved into the folder."""
    config = method.config(init_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(models.llama(), config).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def log_likelihoods(model):
    """Log-probabilities of each choice behind its context."""
    encode = tokenizer().encode
    found = []
    for row in ROWS:
        context = encode(row["context"])
        for choice in map(encode, row["choices"]):
            logits = model(torch.tensor([context + choice])).logits[0, len(context) - 1 : -1]
            found.append(logits.log_softmax(-1)[range(len(choice)), choice].sum().item())
    return found


def arguments(place, adapter, output):
    models = f"pretrained={place / 'base'},peft={adapter},dtype=float32"
    return [
        "--model", "hf", "--model_args", models, "--tasks", "words", "--include_path", str(place / "tasks"),
        "--device", "cpu", "--batch_size", "4", "--output_path", str(output), "--log_samples",
    ]  # fmt: skip


def logged(output):
    (file,) = output.rglob("samples_words_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return [float(likelihood) for sample in samples for likelihood, _ in sample["filtered_resps"]]


@pytest.mark.feature("lm-eval")
def test_log_likelihoods_are_the_native_ones(method, place, tmp_path, monkeypatch):
    model = adapted(method, tmp_path / "adapter")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments(place, tmp_path / "adapter", tmp_path / "output")])
    exec(LINE, {})
    wanted = log_likelihoods(model)
    assert logged(tmp_path / "output") == pytest.approx(wanted, abs=TOLERANCE)
    with model.disable_adapter():
        assert log_likelihoods(model) != pytest.approx(wanted, abs=10 * TOLERANCE)


@pytest.mark.feature("lm-eval")
def test_a_model_that_is_there_already_is_evaluated(method, place, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = adapted(method, tmp_path)
    requests = [
        Instance("loglikelihood", row, (row["context"], f" {choice}"), 0)
        for row in ROWS
        for choice in row["choices"]
    ]
    program = HFLM(pretrained=model, tokenizer=tokenizer(), device="cpu", batch_size=4)
    found = [likelihood for likelihood, _ in program.loglikelihood(requests, disable_tqdm=True)]
    assert found == pytest.approx(log_likelihoods(model), abs=TOLERANCE)


def test_program_without_the_line_does_not_know_the_methods(place, tmp_path):
    from methods import METHODS

    adapted(next(method for method in METHODS if method.name == "flora"), tmp_path / "adapter")
    command = [sys.executable, "-m", "lm_eval", *arguments(place, tmp_path / "adapter", tmp_path / "output")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "KeyError: 'FLORA'" in result.stderr
