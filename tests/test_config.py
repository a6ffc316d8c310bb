"""Configs: messages for every wrong value, round trips, and defaults that fit any layer."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

import peft_subspace
from methods import METHODS
from peft_subspace.tuner.config import FORMAT_VERSION, VERSION
from peft_subspace.tuner.patterns import look_up
from tables import failing

VALUES = {
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 3},
    "modules_to_save": ["score"],
    "trainable_token_indices": {"embed_tokens": [1, 2]},
    "bias": "all",
    "init_weights": False,
    "seed": 7,
    "r": 4,
}


def own(fields, method):
    """The fields that this method has."""
    names = method.config_cls.__dataclass_fields__
    return {name: value for name, value in fields.items() if name in names}


WRONG = [
    ({"r": 0}, ValueError, "r=0 must be at least 1; try r=8"),
    ({"r": -1}, ValueError, "r=-1 must be at least 1; try r=8"),
    ({"r": 2.5}, TypeError, "r=2.5 must be a whole number, such as r=8"),
    ({"r": True}, TypeError, "r=True must be a whole number"),
    ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\]=0 must be at least 1; try"),
    ({"rank_pattern": ["q_proj"]}, TypeError, r"rank_pattern=\['q_proj'\] must map module names"),
    ({"rank_pattern": {3: 4}}, TypeError, r"rank_pattern=\{3: 4\} must map module names"),
    ({"init_weights": "best"}, ValueError, r"init_weights='best' must be one of \(True, False"),
    ({"init_weights": None}, ValueError, r"init_weights=None must be one of \(True, False"),
    ({"bias": "lora_only"}, ValueError, r"bias='lora_only' must be one of \('none', 'all', '\w+_only'\)"),
    ({"target_modules": 3}, TypeError, "target_modules=3 must be a list of module names, or one regular"),
    ({"target_modules": [3]}, TypeError, r"target_modules=\{3\} must be a list of module"),
    ({"exclude_modules": {"a": 1}}, TypeError, r"exclude_modules=\{'a': 1\} must be a list of"),
    ({"target_modules": ".*", "layers_to_transform": [0]}, ValueError, r"layers_to_transform=\[0\] needs"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, ValueError, "layers_pattern='h' needs layers_to"),
    ({"seed": -1}, ValueError, "seed=-1 must be at least 0"),
    ({"seed": "x"}, TypeError, "seed='x' must be a whole number"),
    ({"format_version": FORMAT_VERSION + 1}, ValueError, r"format_version=3 is newer than 2, .*; upgrade"),
    ({"alpha": float("nan")}, ValueError, "alpha=nan must be finite"),
    ({"alpha": "8"}, TypeError, "alpha='8' must be a number, such as"),
    ({"alpha_pattern": {"q": float("inf")}}, ValueError, r"alpha_pattern\['q'\]=inf must be finite"),
    ({"alpha_pattern": 3}, TypeError, "alpha_pattern=3 must map module names"),
    ({"dropout": 1.0}, ValueError, "dropout=1.0 must be finite, at least 0 and below 1"),
    ({"dropout": -0.1}, ValueError, "dropout=-0.1 must be finite, at least 0 and below 1"),
    ({"dropout": None}, TypeError, "dropout=None must be a number"),
]  # fmt: skip


def test_wrong_value_is_refused_with_field_value_rule_and_remedy(method):
    def check(fields, error, message):
        with pytest.raises(error, match=message):
            method.config_cls(**fields)

    assert not failing([row for row in WRONG if own(row[0], method) == row[0]], check)


def test_pattern_fits_whole_parts_at_the_end_of_a_name():
    for name, value in {"q_proj": 2, "layers.0.q_proj": 2, "proj": 1, "layers.proj": 1, "proj.q": 0}.items():
        assert look_up({"proj": 1, "q_proj": 2}, name, 0) == value


def test_right_values_are_accepted(method):
    config = method.config_cls(**own(VALUES, method))
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.peft_type == method.config_cls.peft_type_name
    assert config.peft_subspace_version == VERSION


def test_unknown_field_is_refused(method):
    with pytest.raises(TypeError, match="lora_alpha"):
        method.config_cls(lora_alpha=16)


def test_the_methods_own_bias_option_is_accepted(method):
    bias = f"{method.prefix}only"
    assert method.config_cls(bias=bias).bias == bias


def fields_of(config):
    """Its fields as JSON would have them, without the mark of a saved config."""
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return json.loads(json.dumps({k: v for k, v in fields.items() if k != "initialized"}, default=str))


@pytest.mark.parametrize("fields", [{}, VALUES], ids=["defaults", "values"])
def test_config_survives_json_dict_pickle_and_copy(method, fields, tmp_path):
    config = method.config_cls(**own(fields, method))
    config.save_pretrained(tmp_path)
    for again in (
        PeftConfig.from_pretrained(tmp_path),
        method.config_cls.from_pretrained(tmp_path),
        method.config_cls(**config.to_dict()),
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
    ):
        assert type(again) is type(config)
        assert fields_of(again) == fields_of(config)


def test_saving_marks_the_file_but_not_the_config(method, tmp_path):
    config = method.config_cls()
    config.save_pretrained(tmp_path)
    assert not config.initialized
    assert method.config_cls.from_pretrained(tmp_path).initialized
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == method.config_cls.peft_type_name
    assert saved["peft_subspace_version"] == VERSION
    assert saved["format_version"] == FORMAT_VERSION


def test_version_of_the_saving_package_is_kept(method):
    assert method.config_cls(peft_subspace_version="0.0.1").peft_subspace_version == "0.0.1"


LAYERS = {
    "256x256": ("linear", lambda: nn.Linear(256, 256)),
    "10x20": ("linear", lambda: nn.Linear(10, 20)),
    "10x10": ("linear", lambda: nn.Linear(10, 10)),
    "1x2": ("linear", lambda: nn.Linear(1, 2)),
    "2x1": ("linear", lambda: nn.Linear(2, 1)),
    "embedding": ("embedding", lambda: nn.Embedding(3, 2)),
    "conv": ("conv", lambda: nn.Conv2d(1, 2, 1)),
    "depthwise": ("conv", lambda: nn.Conv2d(2, 2, 3, groups=2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_defaults_fit_any_layer(method, name):
    kind, make = LAYERS[name]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make()

    layer = make()
    model = get_peft_model(Net(), method.config_cls(target_modules=["layer"]))
    x = {
        "linear": lambda: torch.randn(3, layer.in_features),
        "embedding": lambda: torch.tensor([0, 2]),
        "conv": lambda: torch.randn(2, layer.in_channels, 4, 4),
    }[kind]()
    model.base_model.model.layer(x).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.numel() and p.grad is not None for p in trained)


def test_config_without_arguments_is_valid(method):
    assert method.config_cls().target_modules is None
    assert method.config_cls().inference_mode is False


def test_public_names_are_sorted_and_exist():
    assert peft_subspace.__all__ == sorted(peft_subspace.__all__)
    assert all(hasattr(peft_subspace, name) for name in peft_subspace.__all__)
    assert {method.config_cls.__name__ for method in METHODS} <= set(peft_subspace.__all__)


@pytest.mark.where(method="lowers_ranks")
@pytest.mark.parametrize("pattern", [{}, {r".*layer\d": 40}], ids=["r", "expression"])
def test_rank_that_a_layer_cannot_hold_is_lowered_there_with_one_warning(method, pattern, caplog):
    base = nn.ModuleDict(
        {"layer1": nn.Linear(4, 30), "layer2": nn.Linear(64, 64), "layer3": nn.Linear(30, 3)}
    )
    options = {"target_modules": ["layer1", "layer2", "layer3"], "r": 40, "rank_pattern": pattern}
    if method.name == "mos":
        options |= {"equivalent_r": 2, "r": 40}
    with caplog.at_level("WARNING"):
        model = get_peft_model(base, method.config(**options))
    ranks = {name: layer.deltas["default"].spec.rank for name, layer in base.items()}
    (message,) = [r.getMessage() for r in caplog.records if r.name == "peft_subspace"]
    lowered = {name: rank for name, rank in ranks.items() if rank < 40}
    assert set(lowered) >= {"layer1", "layer3"}
    assert message == (
        f"r=40 is more than {len(lowered)} of the adapted modules can hold, and is lowered there: "
        + ", ".join(f"{name} to {rank}" for name, rank in lowered.items())
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if method.name != "flora":  # which lowers every mode by itself
        named = method.config(**{**options, "rank_pattern": {"layer3": 40}})
        with pytest.raises(ValueError, match=r"layer3: r=40 exceeds 3|r=40 must be at most .* 'layer3'"):
            get_peft_model(nn.ModuleDict({"layer3": nn.Linear(30, 3)}), named)
