"""Damaged and hostile adapters, made from sound ones, and what must hold for each of them."""

from __future__ import annotations

import json
import struct
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st
from peft import get_peft_model

import peft_subspace
from methods import METHODS, Method
from test_loading import ALL, CONFIG, WEIGHTS, X, assert_untouched, base_model, snapshot

REFUSALS = (ValueError, TypeError, OSError)
"""What `peft_subspace.load` may raise."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as the bytes of its two files."""

    config: bytes
    weights: bytes


def sound(method: Method) -> Adapter:
    """A sound adapter of a method, with a head, trained tokens and biases besides."""
    return _sound(method.name)


@cache
def _sound(name: str) -> Adapter:
    method = next(method for method in METHODS if method.name == name)
    torch.manual_seed(2)
    options = {"modules_to_save": ["norm"], "trainable_token_indices": {"embed": [1, 2]}, "bias": "all"}
    model = get_peft_model(base_model(), method.config(target_modules=ALL, init_weights=False, **options))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Adapter(*((Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)))


def attempt(adapter: Adapter) -> bool:
    """Load an adapter on a small model; whether that was done rather than refused.

    Either way the base model must be what it was, and what was loaded must be finite.
    """
    base = base_model()
    before, output = snapshot(base), base(X)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / CONFIG).write_bytes(adapter.config)
        (Path(folder) / WEIGHTS).write_bytes(adapter.weights)
        try:
            model = peft_subspace.load(base, folder)
        except REFUSALS:
            assert_untouched(base, before)
            assert torch.equal(base(X), output)
            return False
        for name, tensor in model.state_dict().items():
            assert torch.isfinite(tensor).all(), name
        assert model(X).shape == output.shape
        if model.peft_config["default"].bias == "none":  # else biases of the base model train, too
            with model.disable_adapter():
                assert torch.equal(model(X), output)
    return True


# ------------------------------------------------------------------------------------- strategies


NAMES = ["layer", "conv", "embed", "norm", "upsample", "default", "base_layer", "", ".", "a.b", "all-linear"]
PATTERNS = st.text(alphabet="ael.*+?(){}|[]^$\\d12,", max_size=12) | st.sampled_from(NAMES)
NUMBERS = (
    st.integers(-2, 8)
    | st.sampled_from([10**9, 2**31, 2**63, 10**400, -(10**9), 0.5, 1e300, -0.0])
    | st.floats()
)
SCALARS = st.none() | st.booleans() | NUMBERS | PATTERNS | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(PATTERNS, x, max_size=3), max_leaves=6
)
OTHER_FIELDS = ["self", "cls", "runtime_config", "use_dora", "peft_typ"]
FOREIGN_KEYS = ["base_model.model.norm.weight", "base_model.model.layer.base_layer.weight", "x"]


@st.composite
def configs(draw: st.DrawFn, method: Method) -> Adapter:
    """Sound weights with a config in which some fields have been changed, added or left out."""
    fields = json.loads(sound(method).config)
    names = st.sampled_from(sorted(fields)) | st.sampled_from(OTHER_FIELDS)
    for name in draw(st.lists(names, max_size=4)):
        fields[name] = draw(VALUES)
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
        fields.pop(name, None)
    return Adapter(json.dumps(fields).encode(), sound(method).weights)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of a file with some of them changed, cut off or put in."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        if changed:
            place = draw(st.integers(0, min(len(changed), 2000) - 1) | st.integers(0, len(changed) - 1))
            changed[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(changed)))
        changed[place : place + draw(st.integers(0, 20))] = draw(st.binary(max_size=20))
    if draw(st.integers(0, 3)) == 0:
        del changed[draw(st.integers(0, len(changed))) :]
    return bytes(changed)


@st.composite
def headers(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of a safetensors file in whose header some tensors have been described anew."""
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    sizes = st.integers(0, 12) | st.sampled_from([2**31, 2**62, -1])
    kinds = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "x"]
    for key in draw(st.lists(st.sampled_from(sorted(entries)), min_size=1, max_size=3)):
        entry = entries.pop(key, None)
        if not isinstance(entry, dict) or "shape" not in entry or draw(st.integers(0, 4)) == 0:
            continue
        part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "key"]))
        if part == "dtype":
            entry["dtype"] = draw(st.sampled_from(kinds))
        elif part == "key":
            key = draw(st.sampled_from([f"{key}x", *FOREIGN_KEYS]))
        else:
            entry[part] = draw(st.lists(sizes, max_size=3) | VALUES)
        entries[key] = entry
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def files(method: Method) -> st.SearchStrategy[Adapter]:
    """A sound adapter one of whose files has been damaged."""
    good = sound(method)
    return (
        st.builds(lambda config: Adapter(config, good.weights), damaged(good.config))
        | st.builds(lambda weights: Adapter(good.config, weights), damaged(good.weights))
        | st.builds(lambda weights: Adapter(good.config, weights), headers(good.weights))
    )


def adapters() -> st.SearchStrategy[Adapter]:
    """Any of these, of any method."""
    return st.sampled_from(METHODS).flatmap(lambda method: configs(method) | files(method))
