"""What PEFT's `add_weighted_adapter` gets wrong, shown on PEFT, and that merging here does not share it.

The first half of a test is the fault, so that it fails once PEFT has mended it.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import models
from layers import distance
from merge_oracles import by_entry, elected, total, trimmed
from peft_subspace.merging import merge

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")

TARGETS = ["q_proj", "down_proj"]


def lora(seed=0, base=None, **options):
    torch.manual_seed(seed)
    config = LoraConfig(**{"target_modules": TARGETS, "r": 4, "init_lora_weights": False, **options})
    return get_peft_model(models.llama() if base is None else base, config).eval()


def several(*all_options, name="a{}", base=None):
    """One model with PEFT's LoRAs, which are called a0, a1, …"""
    torch.manual_seed(0)
    model = None
    for number, options in enumerate(all_options):
        config = LoraConfig(**{"target_modules": TARGETS, "r": 4, "init_lora_weights": False, **options})
        if model is None:
            model = get_peft_model(models.llama() if base is None else base, config, name.format(number))
        else:
            model.add_adapter(name.format(number), config)
    return model.eval()


def updates(model, adapter):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter).detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in getattr(module, "scaling", {})
    }


def theirs(model, kind, weights=None, **options):
    names = list(model.peft_config)
    model.add_weighted_adapter(
        names, weights or [1.0] * len(names), "theirs", combination_type=kind, **options
    )
    return updates(model, "theirs")


def ours(model, method, names, **options):
    made = merge([(model, name) for name in names], method, others="drop", **options)
    return {module: made.update(module).double() for module in made.modules}


def worst(found, wanted):
    return max(distance(found[name], wanted[name]) for name in wanted)


def test_factors_are_not_combined_apart():
    """peft#643, #1155, #3004."""
    model = several({}, {}, {})
    names = list(model.peft_config)
    each = [updates(model, name) for name in names]
    wanted = {name: total([one[name] for one in each], [1, 1, 1]) for name in each[0]}
    assert worst(theirs(model, "linear"), wanted) > 0.5
    assert worst(ours(model, "task_arithmetic", names), wanted) < 1e-5
    dense = {n: by_entry(elected)(trimmed([one[n] for one in each], 0.5), [1, 1, 1]) for n in each[0]}
    model.delete_adapter("theirs")
    assert worst(theirs(model, "ties", density=0.5), dense) > 0.5
    assert worst(ours(model, "ties", names, density=0.5), dense) < 1e-5


def test_the_error_of_a_cut_is_reported():
    """PEFT's `svd` cuts to the largest rank, and says nothing."""
    model = several({}, {})
    names = list(model.peft_config)
    each = [updates(model, name) for name in names]
    wanted = {name: each[0][name] + each[1][name] for name in each[0]}
    assert worst(theirs(model, "svd"), wanted) > 0.1
    made = merge([(model, name) for name in names])
    for name in made.modules:
        left, right = made.factors(name, rank=4)
        error = distance((left @ right).double(), wanted[name])
        assert made.report[name].error == pytest.approx(error, rel=1e-3)
        assert error > 0.1


def test_rank_stabilized_scaling_is_that_of_the_adapter():
    """peft#3449: sums were larger by the root of the rank."""
    model = several({"use_rslora": True}, {"use_rslora": True})
    wanted = updates(model, "a0")
    factor = theirs(model, "cat", [1.0, 0.0])
    assert worst(factor, wanted) > 0.5
    assert worst(ours(model, "task_arithmetic", ["a0", "a1"], weights=[1.0, 0.0]), wanted) < 1e-6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "lora_bias"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_variants_whose_factors_are_not_the_update_are_refused(options, named, tmp_path):
    """peft#3761: PEFT combines their factors all the same."""
    if "kasa_config" in options:
        from peft.tuners.lora import config as of_lora

        options = {"kasa_config": of_lora.KasaConfig()}
    model = several(options, options, base=models.gpt2() if "lora_bias" in options else None)
    model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "theirs", combination_type="cat")
    with pytest.raises(ValueError, match=f"{named} is set"):
        merge([(model, "a0"), (model, "a1")])


def test_scales_of_run_time_count_once():
    """peft#3111."""
    model = several({}, {})
    wanted = updates(model, "a0")
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a0", 0.5)
    halves = updates(model, "a0")
    assert worst(halves, {name: 0.5 * update for name, update in wanted.items()}) < 1e-6
    # a LoRA is read as it is saved: scales of run time are no part of it
    assert worst(ours(model, "task_arithmetic", ["a0"]), wanted) < 1e-6


def test_negative_weights_subtract():
    """peft#2796, #2918: roots of weights had no sign."""
    model = several({}, {})
    each = [updates(model, name) for name in ("a0", "a1")]
    wanted = {name: 0.5 * each[0][name] - 2 * each[1][name] for name in each[0]}
    found = ours(model, "task_arithmetic", ["a0", "a1"], weights=[0.5, -2.0])
    assert worst(found, wanted) < 1e-5


def test_an_existing_name_is_an_error():
    model = several({}, {})
    before = updates(model, "a1")
    model.add_weighted_adapter(["a0"], [3.0], "a1", combination_type="cat")  # silently nothing
    assert worst(updates(model, "a1"), before) == 0
    with pytest.raises(ValueError, match="adapter_name='a1' exists already"):
        merge([(model, "a0")]).add_to(model, "a1")


def test_a_failed_call_registers_nothing():
    model = several({}, {})
    with pytest.raises(TypeError):
        model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "left", combination_type="ties", density=None)
    assert "left" in model.peft_config  # and the next call returns silently
    made = merge([(model, "a0"), (model, "a1")], "ties")
    with pytest.raises(ValueError, match="rank=None is needed"):
        made.add_to(model, "new")
    assert "new" not in model.peft_config


def test_a_density_that_keeps_nothing_is_an_error():
    model = several({}, {})
    assert all(not update.any() for update in theirs(model, "ties_svd", density=1e-6).values())
    with pytest.raises(ValueError, match="keeps nothing"):
        merge([(model, "a0"), (model, "a1")], "ties", density=1e-6)


@pytest.mark.parametrize("kind", ["linear", "ties"])
def test_ranks_may_differ_and_the_result_loads(kind, tmp_path):
    """peft#3737, #3744."""
    model = several({"r": 2}, {"r": 4, "rank_pattern": {"down_proj": 3}})
    each = [updates(model, name) for name in ("a0", "a1")]
    with pytest.raises(ValueError, match="All adapters must have the same r value"):
        theirs(model, kind, density=0.5)
    method = {"linear": "task_arithmetic", "ties": "ties"}[kind]
    made = merge([(model, "a0"), (model, "a1")], method, space="aligned")
    made.to_lora(tmp_path / "merged")
    again = PeftModel.from_pretrained(models.llama(), tmp_path / "merged")
    if kind == "linear":
        wanted = {name: each[0][name] + each[1][name] for name in each[0]}
        assert worst(updates(again, "default"), wanted) < 1e-5
    assert worst(updates(again, "default"), {n: made.update(n).double() for n in made.modules}) < 1e-5


def test_lists_and_expressions_of_targets_may_be_mixed():
    model = several({}, {"target_modules": r".*\.(q_proj|v_proj)"})
    with pytest.raises(ValueError, match="type"):
        theirs(model, "cat")
    made = merge([(model, "a0"), (model, "a1")])
    assert {name.rpartition(".")[2] for name in made.modules} == {"q_proj", "v_proj", "down_proj"}


def test_heads_of_several_adapters_are_chosen_among(tmp_path):
    """peft#1615, #1676."""
    for seed, name in enumerate(("one", "two")):
        model = lora(seed, modules_to_save=["lm_head"])
        model.save_pretrained(tmp_path / name)
    model.add_adapter("more", model.peft_config["default"])
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default", "more"], [1.0, 1.0], "theirs", combination_type="cat")
    folders = [tmp_path / "one", tmp_path / "two"]
    merge(folders, others=str(tmp_path / "two")).to_lora(tmp_path / "merged")
    again = PeftModel.from_pretrained(models.llama(), tmp_path / "merged")
    kept = PeftModel.from_pretrained(models.llama(), tmp_path / "two")
    heads = [m.base_model.model.lm_head.modules_to_save["default"].weight for m in (again, kept)]
    assert torch.equal(*heads)


def test_no_dense_svd_is_needed_for_sums_and_subspaces(monkeypatch):
    """PEFT decomposes the dense update, with full matrices by default."""
    model = several({}, {})
    full: list[tuple[int, ...]] = []
    plain = torch.linalg.svd

    def counted(matrix, full_matrices=True, **options):
        full.append((*matrix.shape, full_matrices))
        return plain(matrix, full_matrices=full_matrices, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    theirs(model, "svd")
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.weight.shape
    assert (*weight, True) in full
    full.clear()
    names = ["a0", "a1"]
    for method in ("task_arithmetic", "svd", "tsv_m", "iso_c"):
        merge([(model, name) for name in names], method).add_to(model, f"by_{method}", rank=4)
    assert all(min(m, n) <= 8 and not whole for m, n, whole in full)


def test_what_is_drawn_has_a_seed():
    model = several({}, {})
    one = theirs(model, "dare_linear", density=0.5)
    model.delete_adapter("theirs")
    two = theirs(model, "dare_linear", density=0.5)
    assert worst(one, two) > 0.1
    found = [ours(model, "dare", ["a0", "a1"], density=0.5, seed=3) for _ in range(2)]
    assert worst(*found) == 0


def test_files_are_merged_without_base_weights(tmp_path, monkeypatch):
    """mergekit makes a merged copy of the model for each LoRA (#442)."""
    for seed, name in enumerate(("one", "two")):
        lora(seed).save_pretrained(tmp_path / name)
    monkeypatch.setattr(nn.Module, "load_state_dict", None)  # no model is loaded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge([tmp_path / "one", tmp_path / "two"]).to_lora(tmp_path / "merged")
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
