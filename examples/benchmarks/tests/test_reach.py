"""The table of kinds of modules."""

from __future__ import annotations

import pytest

import features
import reach


@pytest.mark.parametrize(
    ("kind", "lora", "ours"),
    [
        ("`nn.Linear`", "yes", "yes"),
        ("`nn.LSTM`", "refused", "yes"),
        ("one module, two names", "merge", "yes, no LoRA"),
        ("weight norm, convolution", "yes, but for merging", "yes, no LoRA"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_verdicts(kind, lora, ours):
    found = reach.kinds()[kind]
    assert reach.verdict(found, "LoRA (PEFT)") == lora
    assert reach.verdict(found, "FLoRA") == ours


@pytest.mark.filterwarnings("ignore")
def test_adapter_that_does_nothing_is_no_yes(monkeypatch):
    found = reach.kinds()["`nn.Linear`"]
    monkeypatch.setitem(reach.METHODS, "FLoRA", lambda **o: reach.ps.FLoRAConfig(r=2, scale=0.0, **o))
    assert reach.verdict(found, "FLoRA") == "train"


def test_summary_counts_what_lora_has_not():
    cells = {
        "linear": {"LoRA": "yes", "A": "yes", "B": "yes"},
        "table": {"LoRA": "yes", "A": "yes, no LoRA", "B": "refused"},
        "recurrent": {"LoRA": "refused", "A": "yes", "B": "yes, no LoRA"},
        "other": {"LoRA": "merge", "A": "yes", "B": "train"},
    }
    summary = features.kinds({"cells": cells}, lambda header, rows: "").strip()
    assert summary == (
        "LoRA has 2 of 4 kinds not, or not whole; all of ours have 1 of these. "
        "LoRA has and some of ours have not: table (B)."
    )
