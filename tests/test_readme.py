"""README's examples run."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
import transformers

import peft_subspace
from models import llama

README = Path(__file__).parent.parent / "README.md"


def examples():
    section = README.read_text().split("\n## Methods\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(# ([\w -]+).*?)```", section, re.S)
    return [pytest.param(code, id=title) for code, title in blocks]


def test_every_method_has_an_example():
    assert len(examples()) == len({m for m in peft_subspace.__all__ if m.endswith("Config")})
    assert all(len(example.values[0].splitlines()) <= 12 for example in examples())


@pytest.mark.parametrize("code", examples())
def test_example_trains(code, tmp_path):
    rows = torch.randint(0, 8, (4, 6), generator=torch.Generator().manual_seed(0)).tolist()
    names = {
        "peft_subspace": peft_subspace,
        "get_peft_model": peft.get_peft_model,
        "Trainer": transformers.Trainer,
        "model": llama(num_hidden_layers=4),
        "arguments": transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none",
            use_cpu=True, save_strategy="no", disable_tqdm=True,
        ),
        "data": [{"input_ids": row, "labels": row} for row in rows],
    }  # fmt: skip
    exec(code, names)
    model, ids = names["model"].eval(), torch.tensor([rows[0]])
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base)
