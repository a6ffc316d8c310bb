"""What every method promises from the creation of an adapter to its end, on a few typical layers.

`--all-layers` asks the same of all.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

import peft_subspace
from layers import (
    BOTH,
    FP32,
    Net,
    activate,
    adapt,
    base_output,
    delta_weight,
    dense,
    distance,
    outputs,
    trainables,
    tuner_layer,
    two_adapters,
    weight_of,
)

pytestmark = [
    pytest.mark.typical("layers"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]


# ---------------------------------------------------------------------------------------------- start


def test_start_leaves_the_base_weight_alone(method, case, setting):
    model = adapt(method, case, setting, init_weights=True)
    assert torch.equal(weight_of(model), case.layer().weight.to(setting.dtype))


def test_creating_an_adapter_leaves_the_global_generator_alone(method, case):
    before = torch.get_rng_state()
    model = get_peft_model(Net(case.layer()), method.config(seed=None))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    same_model = get_peft_model(Net(case.layer()), method.config(seed=None, init_weights=False))
    torch.manual_seed(2)
    other_model = get_peft_model(Net(case.layer()), method.config(seed=None, init_weights=False))
    assert not torch.equal(delta_weight(same_model, method), delta_weight(other_model, method))
    assert isinstance(model, PeftModel)


def test_every_parameter_of_the_adapter_trains_and_what_is_frozen_is_a_buffer(method, case):
    model = adapt(method, case)
    adapter = {name: p for name, p in model.named_parameters() if ".default." in name}
    assert adapter.keys() == trainables(model).keys()
    assert all(f".{method.prefix}" in name for name in adapter)


@pytest.mark.where(method="has_dropout")
def test_dropout_leaves_the_base_path_alone(method, case):
    model = adapt(method, case, init_weights=True, dropout=0.9).train()
    x = case.inputs()
    assert distance(outputs(model, x), base_output(case, FP32, x)) < FP32.tolerance


# -------------------------------------------------------------------------------------- merge, unmerge


@pytest.mark.feature("merge and unmerge, bit for bit")
def test_unmerge_restores_the_weight_bit_for_bit_each_time(method, case, setting):
    model = adapt(method, case, setting)
    layer, before = tuner_layer(model), weight_of(model)
    x = case.inputs(setting.dtype)
    output = outputs(model, x)
    for _ in range(3):
        layer.merge()
        layer.unmerge()
    assert torch.equal(weight_of(model), before)
    assert torch.equal(outputs(model, x), output)
    assert not layer.merged


def test_merged_layer_reports_the_memory_it_keeps(method, case):
    layer = tuner_layer(adapt(method, case))
    assert layer.kept_bytes == 0
    layer.merge()
    assert layer.kept_bytes == layer.get_base_layer().weight.nbytes
    layer.unmerge()
    assert layer.kept_bytes == 0


@pytest.mark.feature("safe merge")
def test_safe_merge_equals_merge(method, case, setting):
    plain, safe = (adapt(method, case, setting) for _ in range(2))
    plain.merge_adapter()
    safe.merge_adapter(safe_merge=True)
    assert torch.equal(weight_of(plain), weight_of(safe))


@pytest.mark.feature("safe merge")
def test_safe_merge_refuses_a_broken_adapter_and_changes_nothing(method, case):
    model = adapt(method, case)
    before = weight_of(model)
    message = "NaNs detected in the merged weights. The adapter default seems to be broken"
    for value in (float("nan"), float("inf")):
        next(iter(trainables(model).values())).data.view(-1)[0] = value
        with pytest.raises(ValueError, match=message):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(weight_of(model), before)
        assert not tuner_layer(model).merged


@pytest.mark.feature("several adapters, several active ones")
def test_merging_one_by_one_equals_merging_together(method, case, setting):
    together, single = (two_adapters(method, case, setting) for _ in range(2))
    for model in (together, single):
        activate(model, *BOTH)
    before = weight_of(single)
    together.merge_adapter()
    single.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        single.merge_adapter(["default"])
    limit = torch.finfo(setting.dtype).eps
    assert distance(weight_of(single), weight_of(together)) < limit
    single.unmerge_adapter()
    assert torch.equal(weight_of(single), before)


def test_merging_twice_merges_once(method, case):
    model = adapt(method, case)
    model.merge_adapter()
    merged = weight_of(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(weight_of(model), merged)


@pytest.mark.feature("`merge_and_unload`, `unload`")
def test_merge_and_unload_gives_a_plain_layer_with_the_same_outputs(method, case, setting):
    x = case.inputs(setting.dtype)
    for safe in (False, True):
        model = adapt(method, case, setting).eval()
        before = outputs(model, x)
        plain = model.merge_and_unload(safe_merge=safe)
        assert type(plain.layer) is type(case.layer())
        assert distance(outputs(plain, x), before) < 2 * setting.tolerance
        assert plain.state_dict().keys() == Net(case.layer()).state_dict().keys()


@pytest.mark.feature("`merge_and_unload`, `unload`")
def test_unload_gives_the_base_model(method, case):
    plain = adapt(method, case).unload()
    assert type(plain.layer) is type(case.layer())
    assert torch.equal(plain.layer.weight, case.layer().weight)


@pytest.mark.feature("`disable_adapter`")
@pytest.mark.feature("merge and unmerge, bit for bit")
def test_disabled_adapter_gives_exactly_the_base_output_merged_or_not(method, case, setting):
    model = adapt(method, case, setting)
    x = case.inputs(setting.dtype)
    expected, before = base_output(case, setting, x), outputs(model, x)
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), expected)
    assert torch.equal(outputs(model, x), before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), expected)


# --------------------------------------------------------------------------------- several adapters


@pytest.mark.feature("several adapters, several active ones")
def test_set_adapter_switches_outputs_and_training(method, case):
    model = two_adapters(method, case)
    x = case.inputs()
    for name in reversed(BOTH):
        model.set_adapter(name)
        assert distance(outputs(model, x), dense(model, method, x, (name,))) < FP32.tolerance
        assert trainables(model)
        assert all(f".{name}." in key for key in trainables(model))


@pytest.mark.feature("`delete_adapter`")
def test_deleted_adapter_leaves_nothing_behind(method, case):
    model = two_adapters(method, case, **({"dropout": 0.1} if method.has_dropout else {}))
    model.set_adapter("other")
    model.delete_adapter("default")
    layer = tuner_layer(model)
    assert not [key for key in model.state_dict() if ".default" in key]
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        assert "default" not in getattr(layer, attribute), attribute
    x = case.inputs()
    model.eval()
    assert distance(outputs(model, x), dense(model, method, x, ("other",))) < FP32.tolerance


@pytest.mark.feature("`delete_adapter`")
def test_deleting_the_only_adapter_leaves_the_base_output(method, case):
    tuner = adapt(method, case).base_model
    x = case.inputs()
    tuner.delete_adapter("default")
    assert torch.equal(outputs(tuner, x), base_output(case, FP32, x))


def test_merged_adapter_is_not_deleted(method, case):
    model = adapt(method, case)
    before = weight_of(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert torch.equal(weight_of(model), before)


@pytest.mark.feature("one adapter per sample of a batch")
def test_mixed_batches_explain_wrong_names_counts_and_states(method, case):
    model = two_adapters(method, case)
    x = case.inputs(batch=2)
    with pytest.raises(ValueError, match=r"^Cannot pass `adapter_names` .* training mode; call eval\(\)"):
        model(x, adapter_names=["default", "other"])
    model.eval()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): absent, gone; adapter_names can name"):
        model(x, adapter_names=["gone", "absent"])
    with pytest.raises(ValueError, match=r"^Length of `adapter_names` .* 1 entries for a batch of 2"):
        model(x, adapter_names=["default"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged adapters, please call `unmerge_adapter` first\."):
        model(x, adapter_names=["default", "other"])


@pytest.mark.feature("`add_weighted_adapter`, exact")
def test_weighted_adapter_survives_saving(method, case, setting, tmp_path):
    model = two_adapters(method, case, setting)
    model.add_weighted_adapter(list(BOTH), [0.5, -1.5], "sum")
    model.set_adapter("sum")
    wanted = 0.5 * delta_weight(model, method) - 1.5 * delta_weight(model, method, "other")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(Net(case.layer()).to(setting.dtype), tmp_path / "sum")
    assert distance(tuner_layer(again).get_delta_weight("default"), wanted) < setting.tolerance


# ---------------------------------------------------------------------------------- save, load, copy


@pytest.mark.feature("save and load, `low_cpu_mem_usage`")
def test_saved_adapter_gives_the_same_outputs_when_loaded(method, case, setting, tmp_path):
    model = adapt(method, case, setting).eval()
    x = case.inputs(setting.dtype)
    model.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": setting.autocast}
    for low in (False, True):
        base = Net(case.layer()).to(setting.dtype)
        again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low, **options)
        states = (get_peft_model_state_dict(adapted) for adapted in (model, again))
        pairs = list(zip(*(state.values() for state in states), strict=True))
        if method.is_rounded(setting):
            assert all(distance(read, saved) < setting.tolerance for saved, read in pairs)
            assert distance(outputs(again, x), outputs(model, x)) < setting.tolerance
        else:
            assert all(torch.equal(*pair) for pair in pairs)
            # some kernels round by alignment, and there the tensors lie where they lay in the file
            error = distance(outputs(again, x), outputs(model, x))
            assert error < setting.tolerance / 10 if low else error == 0
        assert not trainables(again)
        assert not any(p.is_meta for p in again.parameters())


@pytest.mark.feature("save and load, `low_cpu_mem_usage`")
def test_loaded_adapter_can_be_trained_on(method, case, tmp_path):
    model = adapt(method, case)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(case.layer()), tmp_path, is_trainable=True)
    assert trainables(again).keys() == trainables(model).keys()
    again(case.inputs()).square().sum().backward()
    assert all(p.grad is not None for p in trainables(again).values())


@pytest.mark.feature("`peft_subspace.load`")
def test_own_loader_gives_the_same_outputs(method, case, setting, tmp_path):
    model = two_adapters(method, case, setting).eval()
    x = case.inputs(setting.dtype)
    model.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": setting.autocast}
    again = peft_subspace.load(Net(case.layer()).to(setting.dtype), tmp_path, **options)
    again = peft_subspace.load(again, tmp_path / "other", "other", **options).eval()
    for name in BOTH:
        model.set_adapter(name)
        again.set_adapter(name)
        if method.is_rounded(setting):
            assert distance(outputs(again, x), outputs(model, x)) < setting.tolerance
        else:
            assert torch.equal(outputs(again, x), outputs(model, x))


@pytest.mark.feature("deepcopy and pickle")
def test_deepcopy_is_equal_and_independent(method, case):
    model = adapt(method, case).eval()
    x = case.inputs()
    twin = copy.deepcopy(model)
    before = outputs(model, x)
    assert torch.equal(outputs(twin, x), before)
    for parameter in trainables(twin).values():
        parameter.data.zero_()
    assert torch.equal(outputs(model, x), before)


@pytest.mark.feature("deepcopy and pickle")
def test_deepcopy_of_a_merged_model_can_unmerge(method, case):
    model = adapt(method, case)
    before = weight_of(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(weight_of(twin), before)
    assert tuner_layer(model).merged
    assert not torch.equal(weight_of(model), before)


@pytest.mark.feature("deepcopy and pickle")
def test_pickled_layer_gives_the_same_outputs(method, case):
    layer = tuner_layer(adapt(method, case)).eval()
    x = case.inputs()
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(outputs(again, x), outputs(layer, x))
