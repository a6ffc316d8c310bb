"""FLoRA alone: its equation, its counts, its ranks, its initializations."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model
from torch import nn

import oracles
import peft_subspace
from layers import CASES, Net, adapt, distance, tuner_layer
from methods import METHODS
from peft_subspace import FLoRAConfig

FLORA = next(method for method in METHODS if method.name == "flora")


def wrap(layer, **options):
    return get_peft_model(Net(layer), FLoRAConfig(target_modules=["layer"], **options))


def delta_of(model):
    return tuner_layer(model).deltas["default"]


def count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_equals_the_sum_entry_by_entry(case):
    model = adapt(FLORA, case, r=3, alpha=5, kernel_r=2)
    layer, delta = tuner_layer(model), delta_of(model)
    modes = [getattr(delta, f"mode_factor_{n}") for n in range(delta.core.ndim)]
    wanted = oracles.flora_entries(delta.core, modes, scale=5 / 3)
    if case.kind in ("transposed", "embedding"):
        wanted = wanted.T
    assert distance(layer.get_delta_weight("default"), wanted) < 1e-5
    assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape


@pytest.mark.parametrize(
    ("layer", "r", "rank"),
    [
        (nn.Linear(9, 8), [5, 3], 3),
        (nn.Linear(9, 8), [3, 5], 3),
        (nn.Conv2d(6, 8, 3), [5, 3, 2, 2], 3),
    ],
    ids=["output", "input", "conv"],
)
def test_exported_lora_has_the_rank_of_the_narrowest_joint(layer, r, rank):
    config, state = peft_subspace.lora_state_dict(wrap(layer, r=r, init_weights=False))
    assert config.r == rank
    assert state["base_model.model.layer.lora_A.weight"].shape[0] == rank
    assert state["base_model.model.layer.lora_B.weight"].shape[1] == rank


def test_oracles_agree_with_each_other():
    delta = delta_of(wrap(nn.Conv2d(3, 4, (3, 2)), r=[2, 3, 2, 1], init_weights=False))
    modes = [getattr(delta, f"mode_factor_{n}") for n in range(4)]
    config = FLoRAConfig(r=[2, 3, 2, 1], alpha=8)
    entries = oracles.flora_entries(delta.core, modes, scale=config.alpha / 2)
    assert distance(oracles.flora(delta, config), entries) < 1e-12


# -------------------------------------------------------------------------------------------- counts


def test_parameter_count_of_the_papers_convolution():
    assert count(wrap(nn.Conv2d(64, 128, 3), r=[16, 16, 2, 2])) == 4108


@pytest.mark.parametrize(("r", "total"), [(4, 7_014_912), (32, 56_262_656)])
def test_parameter_count_of_the_papers_llama_7b(r, total):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self, name, nn.Linear(4096, 4096, bias=False))
            self.gate_proj = nn.Linear(4096, 11008, bias=False)
            self.up_proj = nn.Linear(4096, 11008, bias=False)
            self.down_proj = nn.Linear(11008, 4096, bias=False)

    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(32)))
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, FLoRAConfig(r=r, target_modules=targets), low_cpu_mem_usage=True)
    assert count(model) == total
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("layer", "options", "shapes"),
    [
        (nn.Linear(20, 10), {"r": 4}, [(4, 4), (20, 4), (10, 4)]),
        (nn.Linear(20, 10), {"r": [2, 5]}, [(2, 5), (20, 2), (10, 5)]),
        (nn.Linear(20, 10), {"r": 64}, [(20, 10), (20, 20), (10, 10)]),
        (nn.Embedding(20, 10), {"r": [3, 4]}, [(3, 4), (20, 3), (10, 4)]),
        (nn.Conv2d(8, 10, (3, 5)), {"r": 4}, [(4, 4, 3, 5), (8, 4), (10, 4), (3, 3), (5, 5)]),
        (nn.Conv2d(8, 10, 3), {"r": 4, "kernel_r": 2}, [(4, 4, 2, 2), (8, 4), (10, 4), (3, 2), (3, 2)]),
        (nn.Conv2d(8, 10, 3), {"r": 4, "kernel_r": [1, 2]}, [(4, 4, 1, 2), (8, 4), (10, 4), (3, 1), (3, 2)]),
        (nn.Conv2d(8, 10, 3), {"r": [2, 5]}, [(2, 5, 3, 3), (8, 2), (10, 5), (3, 3), (3, 3)]),
        (nn.Conv2d(8, 10, 3), {"r": [2, 5, 1, 9]}, [(2, 5, 1, 3), (8, 2), (10, 5), (3, 1), (3, 3)]),
        (nn.Conv2d(8, 8, 3, groups=8), {"r": 4}, [(1, 4, 3, 3), (1, 1), (8, 4), (3, 3), (3, 3)]),
        (nn.Conv1d(8, 10, 3), {"r": [2, 3, 2]}, [(2, 3, 2), (8, 2), (10, 3), (3, 2)]),
        (nn.Conv3d(8, 10, 2), {"r": 2, "kernel_r": 1}, [(2, 2, 1, 1, 1), (8, 2), (10, 2), *[(2, 1)] * 3]),
    ],
)  # fmt: skip
def test_ranks_give_the_shapes_of_core_and_mode_factors(layer, options, shapes):
    delta = delta_of(wrap(layer, **options))
    assert [tuple(p.shape) for p in delta.parameters()] == shapes
    assert list(dict(delta.named_parameters())) == [
        "core",
        *(f"mode_factor_{n}" for n in range(len(shapes) - 1)),
    ]


# --------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (
            nn.Linear(4, 4),
            {"r": [2, 2, 2]},
            r"layer: r=\[2, 2, 2\] .* gives 3 ranks .* 2 modes \(4, 4\).*give 2",
        ),
        (
            nn.Conv2d(4, 4, 3),
            {"r": [2, 2, 2]},
            r"layer: r=\[2, 2, 2\] .* gives 3 ranks .* 4 modes .*give 4 ranks",
        ),
        (nn.Conv2d(4, 4, 3), {"r": 2, "kernel_r": [1]}, r"layer: r=2 with kernel_r=\[1\] gives 3 ranks"),
        (
            nn.Conv1d(4, 4, 3),
            {"r": [1, 1, 1, 1]},
            r"layer: .* gives 4 ranks for a weight of 3 modes \(4, 4, 3\)",
        ),
    ],
)
def test_wrong_number_of_ranks_is_refused_with_the_modules_name(layer, options, message):
    net = Net(layer)
    with pytest.raises(ValueError, match=message):
        get_peft_model(net, FLoRAConfig(target_modules=["layer"], **options))
    assert net.layer is layer


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": []}, ValueError, r"r=\[\] must have a rank for each mode"),
        ({"r": [4]}, ValueError, r"r=\[4\] must have a rank for each mode"),
        ({"r": [4, 0]}, ValueError, "r=0 must be at least 1"),
        ({"r": [4, "4"]}, TypeError, "r='4' must be a whole number"),
        ({"r": None}, TypeError, "r=None must be a whole number"),
        ({"kernel_r": 0}, ValueError, "kernel_r=0 must be at least 1"),
        ({"kernel_r": [2, -1]}, ValueError, "kernel_r=-1 must be at least 1"),
        ({"kernel_r": 1.5}, TypeError, "kernel_r=1.5 must be a whole number"),
        ({"scale": float("inf")}, ValueError, "scale=inf must be finite"),
        ({"scale": "big"}, TypeError, "scale='big' must be a number"),
        ({"rank_pattern": {"conv": [3]}}, ValueError, r"rank_pattern\['conv'\]=\[3\] must have a rank"),
    ],
)
def test_wrong_rank_or_scale_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        FLoRAConfig(**fields)


def small_network():
    return nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 6), nn.Linear(6, 40))


def test_lowered_ranks_are_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        get_peft_model(small_network(), FLoRAConfig(target_modules=["0", "1", "2"], r=30))
    messages = [r.getMessage() for r in caplog.records if r.name == "peft_subspace"]
    assert messages == [
        "r=30 is more than 3 of the adapted modules can hold, and is lowered there: 0 to 4, 1 to 6, 2 to 6"
    ]


def test_ranks_that_fit_and_the_default_rank_are_not_reported(caplog):
    with caplog.at_level(logging.WARNING):
        get_peft_model(small_network(), FLoRAConfig(target_modules=["0", "1", "2"], r=3))
        get_peft_model(small_network(), FLoRAConfig(target_modules=["0", "1", "2"]))
    assert not [r for r in caplog.records if r.name == "peft_subspace"]


# ------------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"r": 4, "alpha": 6}, 1.5),
        ({"r": [3, 5], "alpha": 6}, 2.0),
        ({"r": 300, "alpha": 6}, 0.02),
        ({"r": 4, "alpha": 6, "scale": 0.7}, 0.7),
        ({"r": 4, "alpha": 6, "scale": 0.0}, 0.0),
        ({"r": 4, "alpha": 6, "rank_pattern": {"layer": 3}}, 2.0),
        ({"r": 4, "alpha": 6, "alpha_pattern": {"lay.r": 8}}, 2.0),
    ],
)
def test_scaling_is_alpha_over_the_configured_rank_or_the_scale_itself(options, scaling):
    assert tuner_layer(wrap(nn.Linear(16, 16), **options)).scaling["default"] == pytest.approx(scaling)


# -------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize(
    ("init", "std"),
    [("kaiming_normal", (2 * 8) ** -0.5), ("normal", 0.02), ("kaiming_uniform", (3 * 8) ** -0.5)],
)
def test_named_starts_draw_factors_of_the_papers_spread_and_a_core_of_zeros(init, std):
    delta = delta_of(wrap(nn.Linear(4000, 3000), r=8, init_weights=init))
    assert not delta.core.any()
    for factor in delta.mode_factors:
        assert factor.std().item() == pytest.approx(std, rel=0.05)
        assert abs(factor.mean().item()) < 0.05 * std
    bound = 8**-0.5 if init == "kaiming_uniform" else None
    assert bound is None or delta.mode_factor_0.abs().max() <= bound


def test_a_start_with_an_output_of_zero_keeps_the_variance_of_the_input():
    model = wrap(nn.Conv2d(300, 200, 9), r=32, alpha=32, init_weights="zero_output", seed=1)
    out = delta_of(model).mode_factor_1
    assert not out.any()
    out.data = torch.eye(200)[:, :32]
    x = torch.randn(4, 300, 9, 9, generator=torch.Generator().manual_seed(0))
    update = nn.functional.conv2d(x, tuner_layer(model).get_delta_weight("default"))[:, :32]
    assert update.std().item() == pytest.approx(1, rel=0.25)


def test_default_start_has_an_output_of_zero():
    default, named = (
        delta_of(wrap(nn.Linear(40, 30), init_weights=i, seed=1)) for i in (True, "zero_output")
    )
    assert torch.equal(default.mode_factor_0, named.mode_factor_0)
    assert default.core.any()
    assert not default.mode_factor_1.any()


def test_start_without_identity_fills_the_core_as_well():
    delta = delta_of(wrap(nn.Linear(40, 30), init_weights=False))
    assert delta.core.std().item() == pytest.approx(delta.random_std, rel=0.3)
    scaling = (8 / (3 * 8)) ** 0.5
    assert delta.random_std == pytest.approx(delta.shape.random_std / scaling)


def test_start_of_an_embedding_keeps_the_variance_of_a_looked_up_row():
    delta = delta_of(wrap(nn.Embedding(3000, 40), r=8, init_weights="zero_output"))
    assert delta.mode_factor_0.std().item() == pytest.approx(1, rel=0.05)
    assert delta.core.std().item() == pytest.approx(8**-0.5, rel=0.3)


def test_layers_of_one_shape_start_from_different_factors():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), FLoRAConfig(target_modules=["0", "1"])
    )
    first, second = (
        m.deltas["default"].mode_factor_0 for m in (model.base_model.model[0], model.base_model.model[1])
    )
    assert not torch.equal(first, second)
