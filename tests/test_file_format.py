"""Adapters that version 0.1 saved load with every bit, and do what they did then.

What is read from a file, and written again, is compared bit for bit. Results of matrix products can differ
from one CPU to another, so they may be off by `TOLERANCE`; with `EQUAL_BITS=1` in the environment, on the
machine that wrote `tests/data`, they may not.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

import peft_subspace
from layers import distance
from saved_adapters import (
    BASE,
    CASES,
    DATA,
    EXPECTED,
    lora_export,
    lora_settings,
    read_expected,
    results,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOLERANCE = 0.0 if os.environ.get("EQUAL_BITS") else 1e-6
BF16_TOLERANCE = 0.0 if os.environ.get("EQUAL_BITS") else 1e-2  # one rounding is 4e-3
LATER = (".fingerprint",)  # names of tensors that later versions write, and do without
WRITTEN = {"peft_version", "auto_mapping", "peft_subspace_version"}  # by PEFT, or the version that saves

# PEFT looks for the patterns' targets among modules only.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
LOADERS = (PeftModel.from_pretrained, peft_subspace.load)
each_saved = pytest.mark.parametrize("saved", CASES, ids=lambda case: case.name)


def same_bits(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_as_expected(found, expected):
    """Equal bits, or as close as the BLAS of another machine comes."""
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        tolerance = BF16_TOLERANCE if tensor.dtype == torch.bfloat16 else TOLERANCE
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key]) or distance(tensor, expected[key]) <= tolerance, key


def in_dtypes_of(found, expected):
    """What is expected; updates and exports have had the dtype of the adapter since version 0.1."""
    return {
        key: tensor if key.startswith("output:") or key not in found else tensor.to(found[key].dtype)
        for key, tensor in expected.items()
    }


@each_saved
@pytest.mark.parametrize("load", LOADERS, ids=["peft", "own"])
def test_files_are_read_and_written_bit_for_bit(saved, load, tmp_path):
    model = saved.load(load)
    for adapter in saved.adapters:
        file = load_file(saved.adapter_folder(adapter) / WEIGHTS)
        state = get_peft_model_state_dict(model, adapter_name=adapter)
        assert file.keys() == {key for key in state if not key.endswith(LATER) or key in file}
        assert not [key for key in file if not same_bits(state[key], file[key])]
    model.save_pretrained(tmp_path)
    for adapter in saved.adapters:
        folder = saved.adapter_folder(adapter)
        file = read_config(folder)
        again = read_config(tmp_path / folder.relative_to(saved.folder))
        assert {key: again.get(key) for key in file} == file


def read_config(folder):
    """Fields that the library has to preserve; PEFT saves sets of names in any order."""
    fields = json.loads((folder / CONFIG).read_text())
    names = {key: value for key, value in fields.items() if key in ("target_modules", "exclude_modules")}
    fields |= {key: sorted(value) for key, value in names.items() if isinstance(value, list)}
    return {key: value for key, value in fields.items() if key not in WRITTEN}


@each_saved
def test_outputs_updates_and_lora_exports_are_what_they_were(saved):
    for model in map(saved.load, LOADERS):
        for adapter in saved.adapters:
            expected, lora, settings = read_expected(saved, adapter)
            found = results(model, saved, adapter)
            assert_as_expected(found, in_dtypes_of(found, expected))
            if adapter in saved.refusals:
                assert not lora
                with pytest.raises(ValueError, match=saved.refusals[adapter]):
                    lora_export(model, adapter)
                continue
            config, state = lora_export(model, adapter)
            assert_as_expected(state, in_dtypes_of(state, lora))
            assert lora_settings(config) == settings


def test_every_adapter_of_the_folder_changes_every_weight():
    for case in CASES:
        base = case.base()(**case.inputs())
        for adapter in case.adapters:
            expected, _, _ = read_expected(case, adapter)
            assert all(tensor.any() for key, tensor in expected.items() if key.startswith("delta:"))
            assert not torch.equal(expected["output:loss"], base["loss"])


def test_folder_holds_the_cases_and_nothing_else():
    files = {
        case.adapter_folder(adapter) / name
        for case in CASES
        for adapter in case.adapters
        for name in (WEIGHTS, CONFIG, EXPECTED)
    }
    assert {path for path in DATA.rglob("*") if path.is_file()} - files == {
        DATA / "continual_svd-merged" / BASE
    }
    assert all(path.is_file() for path in files)
