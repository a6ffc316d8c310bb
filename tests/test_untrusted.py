"""Adapters from strangers: refused in no time with a clear error, and the base model as it was."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import struct
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import peft_subspace
from methods import METHODS
from models import LLAMA, TEXT, build, llama
from peft_subspace.tuner.config import FORMAT_VERSION
from tables import failing
from test_loading import (
    ALL,
    CONFIG,
    WEIGHTS,
    X,
    assert_peft_refuses,
    assert_refuses,
    assert_untouched,
    base_model,
    change_config,
    change_tensor,
    snapshot,
)

pytestmark = pytest.mark.feature("adapters from strangers")

HOSTILE = r"(\w+\.?)+!"  # takes 2ⁿ steps on a name of n letters


@pytest.fixture
def saved(method, tmp_path):
    """A sound adapter, saved."""
    folder = tmp_path / "adapter"
    torch.manual_seed(2)
    get_peft_model(base_model(), method.config(target_modules=ALL, init_weights=False)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def changed(saved):
    """Function that gives the config in the folder other values, those of no earlier call."""
    fields = json.loads((saved / CONFIG).read_text())
    return lambda **changes: (saved / CONFIG).write_text(json.dumps({**fields, **changes}))


@contextmanager
def memory_limit(megabytes):
    """Let this process allocate no more than so much."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def time_limit(seconds):
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < seconds


def add_tensor(folder, key, tensor):
    save_file({**load_file(folder / WEIGHTS), key: tensor}, folder / WEIGHTS, metadata={"format": "pt"})


# -------------------------------------------------------------------------------------- size and time


ABSURD = [
    {"r": 10**9},
    {"rank_pattern": {"layer": 10**9}},
    {"r": 10**400},
    {"r": 2**31 - 1, "seed": 2**64 - 1},
]


@pytest.mark.parametrize("changes", ABSURD, ids=["r", "pattern", "digits", "largest"])
def test_absurd_ranks_allocate_nothing(saved, method, changes):
    if method.name == "continual_svd" and "digits" not in str(changes):
        changes = {**changes, "preserve": 0}
    change_config(saved, **changes)
    if method.name == "flora" and changes.get("r") != 10**400:  # lowers ranks to the layer's dimensions
        message, error = "has shape", ValueError
    else:
        message, error = r"must be at most|exceeds|more than 64 times|cannot hold|lower", ValueError
    with memory_limit(512), time_limit(5):
        assert_refuses(saved, error, message)
        assert_peft_refuses(saved, error, message)


@pytest.mark.where(method="pooled")
def test_absurd_pools_allocate_nothing(saved, method):
    for changes in ({"equivalent_r": 10**9}, {"equivalent_r": 10**9, "subset_selection": False}):
        change_config(saved, **changes)
        with memory_limit(512), time_limit(5):
            assert_refuses(saved, ValueError, "more than 64 times the .* lower its ranks")
            assert_peft_refuses(saved, ValueError, "more than 64 times the .* lower its ranks")


SLOW_PATTERNS = {
    "targets": {"target_modules": HOSTILE},
    "exclude": {"exclude_modules": HOSTILE},
    "save": {"modules_to_save": [HOSTILE]},
    "layers": {"layers_to_transform": [0], "layers_pattern": [HOSTILE]},
    "ranks": {"rank_pattern": {HOSTILE: 2}},
    "many": {"rank_pattern": {f".*a.*b.*c{i}": 2 for i in range(1000)}},
    "alternatives": {"target_modules": "(a|a)" * 40},
}


def test_patterns_that_match_for_ever_are_refused(saved, changed):
    def check(changes):
        changed(**changes)
        with time_limit(5):
            assert_refuses(saved, ValueError, "could take very long to match.*or list the names")
            assert_peft_refuses(saved, ValueError, "could take very long to match.*or list the names")

    assert not failing(SLOW_PATTERNS, check)


def test_what_is_no_pattern_is_refused(saved, changed):
    def check(pattern):
        changed(rank_pattern={pattern: 2})
        assert_refuses(saved, ValueError, "is no regular expression that can be used")

    assert not failing(["(", "a{99999999999999999999}", "(" * 1500, "x" * 20000, "a)|(b"], check)


USUAL_PATTERNS = [
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.(1|2|3|12)\.(self_attn|mlp)\.(q|k|v|o|up|down|gate)_proj",
    r".*(language_model|projector).*(q_proj|k_proj).*",
    r"(?!.*vision).*layers\.\d+\..*proj",
    r"^(.*\.)?layers\.[0-9]{1,2}\.mlp\.[a-z]+_proj$",
]


def test_usual_patterns_are_taken(method):
    def check(pattern):
        method.config(target_modules=pattern)
        method.config(rank_pattern={pattern.removeprefix("^"): 2})

    assert not failing(USUAL_PATTERNS, check)


def test_lists_of_millions_are_refused(saved):
    change_config(saved, target_modules=[f"a{i}" for i in range(100_001)])
    with time_limit(5):
        assert_refuses(saved, ValueError, "target_modules must have at most 100000 entries, and has 100001")
    (saved / CONFIG).write_bytes(b" " * (2**24 + 1))
    assert_refuses(saved, ValueError, "has more than 16777216 bytes")


@pytest.mark.parametrize(
    "header",
    [
        lambda key, entry: {key: {**entry, "shape": [2**38], "data_offsets": [0, 2**40]}},
        lambda key, entry: {key: {**entry, "shape": [2**62, 2**62], "data_offsets": [0, 2**40]}},
        lambda key, entry: {key: {**entry, "shape": [2**38, 0], "data_offsets": [0, 0]}},
        lambda key, entry: {key: {**entry, "dtype": "U64"}},
        lambda key, entry: {f"{key}{i}": {**entry, "data_offsets": [0, 2**40]} for i in range(1000)},
    ],
    ids=["terabyte", "overflow", "empty", "dtype", "many"],
)
def test_headers_that_claim_more_than_the_file_holds(saved, header):
    data = (saved / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    del entries["__metadata__"]
    key = sorted(entries)[0]
    changed = json.dumps({**entries, **header(key, entries[key])}).encode()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])
    with memory_limit(512), time_limit(5):
        assert_refuses(saved, ValueError, "not a complete safetensors file|has shape")


def test_header_longer_than_the_file(saved):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", 2**50) + data[8:])
    with memory_limit(512), time_limit(5):
        assert_refuses(saved, ValueError, "not a complete safetensors file")


# ------------------------------------------------------------------------------------ code and paths


class Bomb:
    """Would make a folder if it were unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.mkdir, (self.target,)


def test_pickled_weights_are_not_run(saved, tmp_path):
    (saved / WEIGHTS).unlink()
    target = tmp_path / "made"
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(target), protocol=2))
    assert_refuses(saved, FileNotFoundError, "has no adapter_model.safetensors")
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):  # PEFT reads them with weights_only=True
        PeftModel.from_pretrained(base_model(), saved)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists()


def test_nothing_named_in_a_config_is_imported(saved, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Network", "parent_library": "stranger"}
    change_config(saved, auto_mapping=mapping, base_model_name_or_path="../../stranger", revision="../..")
    for load in (peft_subspace.load, PeftModel.from_pretrained):
        load(base_model(), saved)
    assert "stranger" not in sys.modules


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_out_of_the_folder_are_not_followed(saved, tmp_path, name):
    shutil.move(saved / name, tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    assert_refuses(saved, ValueError, f"{name} is a link out of the adapter's folder; put the file itself")
    (saved / name).unlink()
    (saved / name).symlink_to("/dev/zero")
    assert_refuses(saved, FileNotFoundError, f"has no {name}")


def test_links_within_the_cache_of_the_hub_are_followed(saved, tmp_path):
    snapshot_folder, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    snapshot_folder.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.move(saved / name, blobs / name)
        (snapshot_folder / name).symlink_to(f"../../blobs/{name}")
    model = peft_subspace.load(base_model(), snapshot_folder)
    assert not torch.equal(model(X), base_model()(X))


# ------------------------------------------------------------------------------ tensors for the base


@pytest.mark.parametrize("key", ["norm.weight", "layer.base_layer.weight", "upsample.bias"])
def test_weights_of_the_base_model_are_not_replaced(saved, key):
    name = key.replace(".base_layer", "")
    add_tensor(saved, f"base_model.model.{key}", base_model().state_dict()[name] + 1)
    message = f"{key} in the file is no part of the adapter, .* from a source that you trust"
    assert_refuses(saved, ValueError, message)
    assert_peft_refuses(saved, ValueError, message)


def test_original_of_a_saved_module_is_not_replaced(method, tmp_path):
    config = method.config(target_modules=ALL, init_weights=False, modules_to_save=["norm"])
    get_peft_model(base_model(), config).save_pretrained(tmp_path)
    for load in (peft_subspace.load, PeftModel.from_pretrained):
        load(base_model(), tmp_path)
    add_tensor(tmp_path, "base_model.model.norm.original_module.weight", torch.ones(6))
    assert_refuses(tmp_path, ValueError, "original_module.weight in the file is no part of the adapter")
    assert_peft_refuses(tmp_path, ValueError, "original_module.weight in the file is no part of the adapter")


def test_tensors_for_no_module_are_refused(saved, method):
    add_tensor(saved, f"base_model.model.layer2.{method.prefix}delta.core", torch.ones(1))
    assert_refuses(saved, ValueError, "layer2.* in the file is no part of the adapter")


@pytest.mark.parametrize(
    ("options", "key", "tensor", "message"),
    [
        ({"modules_to_save": ["norm"]}, "norm.weight", torch.full((6,), float("nan")), "norm.weight has NaN"),
        ({"modules_to_save": ["norm"]}, "norm.weight", torch.ones(7), r"norm.weight has shape \(7,\)"),
        ({"bias": "all"}, "upsample.bias", torch.ones(7), r"upsample.bias has shape \(7,\)"),
        ({"modules_to_save": ["norm"]}, "norm.weight", None, "norm.weight"),
        ({"trainable_token_indices": {"embed": [1, 2]}},
         "embed.token_adapter.trainable_tokens_delta", torch.full((2, 4), float("inf")), "has NaN or inf"),
        ({"trainable_token_indices": {"embed": [1, 2]}},
         "embed.token_adapter.trainable_tokens_delta", torch.ones(3, 4), r"has shape \(3, 4\)"),
    ],
    ids=["head-nan", "head-shape", "bias-shape", "head-missing", "token-nan", "token-shape"],
)  # fmt: skip
def test_heads_biases_and_tokens_are_checked_too(method, tmp_path, options, key, tensor, message):
    config = method.config(target_modules=ALL, init_weights=False, **options)
    get_peft_model(base_model(), config).save_pretrained(tmp_path)
    peft_subspace.load(base_model(), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    full = f"base_model.model.{key}"
    assert full in state
    changed = {name: value for name, value in state.items() if name != full}
    changed |= {} if tensor is None else {full: tensor}
    save_file(changed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        peft_subspace.load(model := base_model(), tmp_path)
    assert_untouched(model, snapshot(base_model()))
    model(X)


@pytest.mark.typical("methods")
def test_tokens_beyond_the_embedding_are_refused(saved):
    change_config(saved, trainable_token_indices={"embed": [1, 10**6]})
    assert_refuses(saved, ValueError, "no rows of trainable_token_indices|annot combine")
    add_tensor(saved, "base_model.model.embed.token_adapter.trainable_tokens_delta", torch.ones(2, 4))
    assert_refuses(saved, ValueError, "annot (load the|combine) adapter")
    change_config(saved, trainable_token_indices={"embed": [-1]})
    assert_refuses(saved, ValueError, r"trainable_token_indices\['embed'\]=-1 must be at least 0")


# ------------------------------------------------------------------------------------- kinds of number


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: torch.full(t.shape, 1e300, dtype=torch.float64), "has NaN or infinite values"),
        (lambda t: torch.ones(t.shape, dtype=torch.int64), "torch.int64 in the file, but floating-point"),
        (lambda t: torch.ones(t.shape, dtype=torch.bool), "torch.bool in the file, but floating-point"),
        (lambda t: torch.ones(t.shape).to(torch.float8_e4m3fn), "float8_e4m3fn in the file, but floating"),
    ],
    ids=["float64", "int64", "bool", "float8"],
)
def test_numbers_of_another_kind_are_refused(saved, change, message):
    change_tensor(saved, change, ".layer", torch.float32)
    assert_refuses(saved, ValueError, message)
    assert_peft_refuses(saved, ValueError, message)


def test_double_and_half_precision_are_taken(saved, method):
    for dtype in (torch.float64, torch.bfloat16):
        key = change_tensor(saved, lambda t, dtype=dtype: t.to(dtype), ".conv.", None)
        if "index" not in key:
            peft_subspace.load(base_model(), saved)


@pytest.mark.parametrize("value", [-1, 10**6, 2**40, 1.5])
@pytest.mark.where(method="pooled")
def test_indices_outside_their_pool_are_refused(saved, method, value):
    dtype = torch.float32 if isinstance(value, float) else torch.int64
    change_tensor(saved, lambda t: torch.full(t.shape, value, dtype=dtype), "index_A")
    message = "points outside its pool|whole numbers are needed"
    assert_refuses(saved, ValueError, message)
    assert_peft_refuses(saved, ValueError, message)


# --------------------------------------------------------------------------------- fields and versions


WRONG_TYPES = [
    ("r", [[]]),
    ("target_modules", {"a": 1}),
    ("target_modules", [["layer"]]),
    ("exclude_modules", 3),
    ("modules_to_save", "norm"),
    ("modules_to_save", [1]),
    ("layers_to_transform", "0"),
    ("layers_to_transform", [0.5]),
    ("trainable_token_indices", {"embed": "12"}),
    ("trainable_token_indices", [1.5]),
    ("rank_pattern", [1]),
    ("bias", ["none"]),
    ("init_weights", 0),
    ("init_weights", {}),
    ("initialized", "yes"),
    ("inference_mode", 1),
    ("seed", 1.5),
    ("revision", 3),
    ("base_model_name_or_path", ["a"]),
    ("peft_subspace_version", 1),
    ("format_version", "1"),
    ("format_version", 0),
    ("task_type", ["CAUSAL_LM"]),
    ("task_type", "UNKNOWN"),
]


def test_fields_of_the_wrong_type_are_refused(saved, changed):
    model = base_model()
    before = snapshot(model)

    def check(name, value):
        changed(**{name: value})
        with pytest.raises((TypeError, ValueError), match=name.replace("_", "[_ ]")):
            peft_subspace.load(model, saved)
        assert_untouched(model, before)

    assert not failing(WRONG_TYPES, check)


@pytest.mark.parametrize("method", METHODS[:1], ids=str)  # none is known
@pytest.mark.parametrize("peft_type", [[], {}, 1, "../FLORA", "flora"])
def test_type_that_is_none_is_refused(saved, peft_type):
    change_config(saved, peft_type=peft_type)
    assert_refuses(saved, ValueError, "peft_type=.* is none of .*PeftModel.from_pretrained")


@pytest.mark.parametrize("method", METHODS[:1], ids=str)  # none is known
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "\xff", '{"r": ' + "1" * 5000 + "}", "3", "null", '{"r": NaN}']
)
def test_json_that_is_none_is_refused(saved, text):
    (saved / CONFIG).write_text(text, encoding="latin-1")
    assert_refuses(saved, ValueError, "is not a JSON object|peft_type=None is none of")


def test_fields_that_are_unknown_are_named_and_ignored(saved):
    change_config(saved, a_field_of_the_future=3, peft_subspace_version="9.9")
    with pytest.warns(UserWarning, match="a_field_of_the_future") as caught:
        peft_subspace.load(base_model(), saved)
    own = [str(w.message) for w in caught if "peft_subspace 9.9" in str(w.message)]
    assert len(own) == 1
    assert "['a_field_of_the_future']" in own[0]


def test_config_of_an_older_version_loads_with_the_defaults_of_what_it_lacks(saved, method):
    """As a release before this one may have written it: only what sets this adapter apart."""
    wanted = peft_subspace.load(base_model(), saved)(X)
    fields = json.loads((saved / CONFIG).read_text())
    kept = {"peft_type", "target_modules", "format_version", "initialized", *method.options}
    old = {name: value for name, value in fields.items() if name in kept}
    (saved / CONFIG).write_text(json.dumps({**old, "peft_subspace_version": "0.0.1"}))
    for load in (peft_subspace.load, PeftModel.from_pretrained):
        model = load(base_model(), saved)
        assert torch.equal(model(X), wanted)
        assert model.peft_config["default"].peft_subspace_version == "0.0.1"
        assert model.peft_config["default"].format_version == FORMAT_VERSION


def test_saved_config_carries_both_versions(saved):
    fields = json.loads((saved / CONFIG).read_text())
    assert fields["peft_subspace_version"] == peft_subspace.__version__
    assert fields["format_version"] == FORMAT_VERSION


def test_targets_that_have_no_default_are_refused(saved):
    change_config(saved, target_modules=None)
    assert_refuses(
        saved, ValueError, "target_modules=None, for which Network has no default; load the adapter"
    )


def test_adapter_of_a_deeper_model_is_refused(method, tmp_path):
    config = method.config(target_modules=["q_proj"], init_weights=False)
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    shallow = build(LlamaForCausalLM, LlamaConfig(**TEXT, **{**LLAMA, "num_hidden_layers": 2}))
    message = "model.layers.2.* in the file is no part of the adapter|has shape .* the base model needs"
    with pytest.raises(ValueError, match=message):
        peft_subspace.load(shallow, tmp_path)


def test_subfolder_is_loaded_and_checked(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "all" / "inner")
    model = peft_subspace.load(base_model(), tmp_path / "all", subfolder="inner")
    assert torch.equal(model(X), peft_subspace.load(base_model(), saved)(X))
    with pytest.raises(FileNotFoundError, match="has no adapter_config"):
        peft_subspace.load(base_model(), tmp_path / "all")


def test_heads_of_another_size_are_left_out_on_demand(method, tmp_path):
    config = method.config(target_modules=["conv"], init_weights=False, modules_to_save=["layer"])
    get_peft_model(base_model(), config).save_pretrained(tmp_path)
    other = base_model()
    other.layer = torch.nn.Linear(6, 9)
    before = other.layer.weight.clone()
    with pytest.raises(ValueError, match=r"layer.* has shape .* but the base model needs"):
        peft_subspace.load(other, tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model = peft_subspace.load(other, tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(model.base_model.model.layer.weight, before)
