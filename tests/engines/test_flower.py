"""The example's app on Flower: clients in processes of their own, simulated by Ray."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from models import build
from test_docs import WORDS, tokenizer

PACKAGE = "flwr"
EXAMPLE = Path(__file__).parents[2] / "examples/federated"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A small encoder, and texts whose first word tells their label."""
    folder = tmp_path_factory.mktemp("federation")
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    build(transformers.BertModel, config).save_pretrained(folder / "encoder")
    tokenizer().save_pretrained(folder / "encoder")
    generator = torch.Generator().manual_seed(0)
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(400):
            noise = torch.randint(8, 28, (4,), generator=generator).tolist()
            rows.writerow([" ".join(f"w{i}" for i in (2 * (number % 4), *noise)), "abcd"[number % 4]])
    return folder


def compare(places, *options):
    """Rows of the table by method: accuracy, forgotten, MB to start, in rounds, and for moments."""
    arguments = ["--model", places / "encoder", "--data", places / "rows.csv", "--length", 8, *options]
    run = subprocess.run(
        [sys.executable, EXAMPLE / "compare.py", *map(str, arguments)],
        capture_output=True, text=True, timeout=600, cwd=places,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "RAY_DISABLE_DASHBOARD": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-5000:]
    table = re.findall(r"^([\w-]+) +(\d\.\d{3}) +(-?\d\.\d{3})((?: +\d+\.\d{3})+)$", run.stdout, re.M)
    return {name: [float(n) for n in (accuracy, lost, *rest.split())] for name, accuracy, lost, rest in table}


def test_clients_learn_together_and_send_the_matrices_alone(places):
    found = compare(
        places, "--methods", "lora-sb", "lora", "--clients", 2, "--rounds", 4, "--rank", 8, "--together"
    )
    (accuracy, _, _, sent, _, alone), (_, _, _, loras, _, _) = found["lora-sb"], found["lora"]
    assert accuracy > 0.9
    assert abs(accuracy - alone) < 0.1
    assert sent < loras / 2  # of a model as small as this, names and heads are most of it


def test_tasks_follow_each_other_and_moments_are_summed(places):
    options = ("--clients", 2, "--rounds", 2, "--rank", 4, "--tasks", "a,b;c,d")
    found = compare(places, "--methods", "keep-lora", "lora", *options)
    accuracy, _, start, _, moments = found["keep-lora"]
    assert accuracy > 0.8
    assert start > 0
    assert moments > 0
    assert found["lora"][4] == 0
