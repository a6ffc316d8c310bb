"""What every method promises for every kind of layer, checked on one layer against the dense oracle."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from layers import FP32, Net, adapt, add, delta_weight, dense, distance, tuner_layer
from methods import METHODS
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch.func import functional_call

import peft_subspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    # torch's compiler instantiates the autograd functions that it traces.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

BOTH = ("default", "other")


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def base_output(case, setting, x):
    return outputs(Net(case.layer()).to(setting.dtype), x)


def two_adapters(method, case, setting=FP32, **options):
    model = adapt(method, case, setting, **options)
    add(model, method, "other", setting, **options)
    return model


def activate(model, *names):
    model.base_model.set_adapter(list(names))


def weight_of(model):
    return tuner_layer(model).get_base_layer().weight.detach().clone()


def trainables(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------- start


def test_default_start_is_the_identity(method, case, setting):
    model = adapt(method, case, setting, init_weights=True)
    x = case.inputs(setting.dtype)
    expected = base_output(case, setting, x)
    result = outputs(model, x)
    assert result.dtype == expected.dtype
    assert distance(result, expected) < setting.tolerance


def test_start_leaves_the_base_weight_alone(method, case, setting):
    model = adapt(method, case, setting, init_weights=True)
    assert torch.equal(weight_of(model), case.layer().weight.to(setting.dtype))


def test_random_start_changes_the_output(method, case, setting):
    x = case.inputs(setting.dtype)
    assert distance(outputs(adapt(method, case, setting), x), base_output(case, setting, x)) > 1e-2


def test_seed_determines_the_random_start(method, case):
    x = case.inputs()
    first, again, other = (outputs(adapt(method, case, seed=seed), x) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert distance(other, first) > 1e-3


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


@pytest.mark.feature("bf16 bases, fp32 or bf16 adapters, autocast")
def test_adapter_takes_the_dtype_that_peft_asks_for(method, case, setting):
    model = adapt(method, case, setting)
    wanted = torch.float32 if method.stays_fp32 else setting.adapter_dtype
    assert {p.dtype for p in trainables(model).values()} == {wanted}
    assert weight_of(model).dtype == setting.dtype


# ------------------------------------------------------------------------------- forward and gradients


@pytest.mark.feature("bf16 bases, fp32 or bf16 adapters, autocast")
def test_forward_equals_the_dense_oracle(method, case, setting):
    model = adapt(method, case, setting)
    x = case.inputs(setting.dtype)
    result = outputs(model, x)
    assert result.dtype == setting.dtype
    assert distance(result, dense(model, method, x)) < setting.tolerance


def test_forward_in_eval_mode_without_a_batch_equals_the_dense_oracle(method, case):
    model = adapt(method, case).eval()
    x = case.inputs()[0]
    assert distance(outputs(model, x), dense(model, method, x)) < FP32.tolerance


@pytest.mark.feature("bf16 bases, fp32 or bf16 adapters, autocast")
def test_forward_under_autocast_equals_the_dense_oracle(method, case):
    model = adapt(method, case)
    x = case.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = outputs(model, x)
    assert distance(result, dense(model, method, x)) < 2e-2


def test_gradients_equal_those_through_the_dense_oracle(method, case, setting):
    model = adapt(method, case, setting)
    x = case.inputs(setting.dtype)
    leaves = dict(trainables(model))
    if x.is_floating_point():
        leaves["input"] = x.requires_grad_()
    result, expected = model(x), dense(model, method, x)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).double()
    gradients = torch.autograd.grad((result.double() * probe).sum(), leaves.values())
    truths = torch.autograd.grad((expected * probe).sum(), leaves.values())
    largest = max(truth.norm() for truth in truths)
    for name, gradient, truth in zip(leaves, gradients, truths, strict=True):
        # one number's gradient is a sum that cancels, with the rounding errors of all that is summed
        scale = truth.norm() if truth.numel() > 1 else largest
        assert (gradient.double() - truth).norm() <= 4 * setting.tolerance * scale, name


@pytest.mark.filterwarnings("ignore:adapter .* trains in bases")  # LoRA-SB before its gradient start
def test_every_trainable_moves_within_three_steps(method, case, setting):
    model = adapt(method, case, setting, init_weights=True)
    x = case.inputs(setting.dtype)
    start = {name: p.detach().clone() for name, p in trainables(model).items()}
    assert start
    assert all(".default." in name for name in start)
    probe = torch.randn(outputs(model, x).shape, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.SGD(trainables(model).values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x).float() * probe).sum().backward()
        optimizer.step()
    for name, parameter in trainables(model).items():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, start[name]), name


def test_every_parameter_of_the_adapter_trains_and_what_is_frozen_is_a_buffer(method, case):
    model = adapt(method, case)
    adapter = {name: p for name, p in model.named_parameters() if ".default." in name}
    assert adapter.keys() == trainables(model).keys()
    assert all(f".{method.prefix}" in name for name in adapter)


def test_other_memory_layouts_of_the_input_give_the_same(method, case):
    model = adapt(method, case)
    x = case.inputs()
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert distance(outputs(model, strided), outputs(model, x)) < 1e-6


# ------------------------------------------------------------------------------------------- dropout


@pytest.fixture
def dropping_method(method):
    if not method.has_dropout:
        pytest.skip("the method has no dropout")
    return method


def test_dropout_acts_in_training_only(dropping_method, case, setting):
    x = case.inputs(setting.dtype)
    model = adapt(dropping_method, case, setting, dropout=0.5)
    evaluated = outputs(model.eval(), x)
    assert distance(evaluated, dense(model, dropping_method, x)) < setting.tolerance
    trained = outputs(model.train(), x)
    if case.kind == "embedding":  # its input is indices: there is nothing to drop
        assert torch.equal(trained, evaluated)
    else:
        assert not torch.equal(trained, evaluated)


def test_dropout_leaves_the_base_path_alone(dropping_method, case):
    model = adapt(dropping_method, case, init_weights=True, dropout=0.9).train()
    x = case.inputs()
    assert distance(outputs(model, x), base_output(case, FP32, x)) < FP32.tolerance


def test_dropout_keeps_the_mean(dropping_method, case):
    if case.kind == "embedding" or not case.has_lora_form:
        pytest.skip("the mean passes through layers that are linear in their input")
    model = adapt(dropping_method, case, dropout=0.3).train()
    x = case.inputs(batch=1)
    many = x.repeat(4000, *[1] * (x.ndim - 1))
    truth = dense(model, dropping_method, x)
    assert distance(outputs(model, many).mean(dim=0, keepdim=True), truth) < 0.1


# -------------------------------------------------------------------------------------- merge, unmerge


def test_merged_weight_is_the_sum_rounded_once(method, case, setting):
    model = adapt(method, case, setting)
    before = weight_of(model)
    model.merge_adapter()
    expected = before.double() + delta_weight(model, method)
    rounding = torch.finfo(setting.dtype).eps / 2
    limit = rounding if setting.autocast else 3 * rounding  # then the factors' products are rounded, too
    assert distance(weight_of(model), expected) < max(limit, 1e-6)
    assert tuner_layer(model).merged


@pytest.mark.feature("merge and unmerge, bit for bit")
def test_merged_output_equals_the_unmerged_one(method, case, setting):
    model = adapt(method, case, setting).eval()
    x = case.inputs(setting.dtype)
    before = outputs(model, x)
    model.merge_adapter()
    assert distance(outputs(model, x), before) < 2 * setting.tolerance


@pytest.mark.feature("merge and unmerge, bit for bit")
def test_unmerge_restores_the_weight_bit_for_bit_a_hundred_times(method, case, setting):
    model = adapt(method, case, setting)
    layer, before = tuner_layer(model), weight_of(model)
    x = case.inputs(setting.dtype)
    output = outputs(model, x)
    for _ in range(100):
        layer.merge()
        layer.unmerge()
    assert torch.equal(weight_of(model), before)
    assert torch.equal(outputs(model, x), output)
    assert not layer.merged


def test_merged_layer_reports_the_memory_it_keeps(method, case, setting):
    layer = tuner_layer(adapt(method, case, setting))
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.feature("safe merge")
def test_safe_merge_refuses_a_broken_adapter_and_changes_nothing(method, case, value):
    model = adapt(method, case)
    before = weight_of(model)
    next(iter(trainables(model).values())).data.view(-1)[0] = value
    message = "NaNs detected in the merged weights. The adapter default seems to be broken"
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


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.feature("`merge_and_unload`, `unload`")
def test_merge_and_unload_gives_a_plain_layer_with_the_same_outputs(method, case, setting, safe):
    model = adapt(method, case, setting).eval()
    x = case.inputs(setting.dtype)
    before = outputs(model, x)
    plain = model.merge_and_unload(safe_merge=safe)
    assert type(plain.layer) is type(case.layer())
    assert distance(outputs(plain, x), before) < 2 * setting.tolerance
    assert plain.state_dict().keys() == Net(case.layer()).state_dict().keys()


@pytest.mark.feature("`merge_and_unload`, `unload`")
def test_unload_gives_the_base_model(method, case, setting):
    plain = adapt(method, case, setting).unload()
    assert type(plain.layer) is type(case.layer())
    assert torch.equal(plain.layer.weight, case.layer().weight.to(setting.dtype))


@pytest.mark.feature("`disable_adapter`")
def test_disabled_adapter_gives_exactly_the_base_output(method, case, setting):
    model = adapt(method, case, setting)
    x = case.inputs(setting.dtype)
    before = outputs(model, x)
    with model.disable_adapter():
        disabled = outputs(model, x)
    assert torch.equal(disabled, base_output(case, setting, x))
    assert torch.equal(outputs(model, x), before)


@pytest.mark.feature("merge and unmerge, bit for bit")
def test_merged_and_disabled_is_exactly_the_base_output(method, case, setting):
    model = adapt(method, case, setting)
    x = case.inputs(setting.dtype)
    model.merge_adapter()
    with model.disable_adapter():
        disabled = outputs(model, x)
    assert torch.equal(disabled, base_output(case, setting, x))


# --------------------------------------------------------------------------------- several adapters


@pytest.mark.feature("several adapters, several active ones")
def test_all_active_adapters_count(method, case, setting):
    model = two_adapters(method, case, setting).eval()
    activate(model, *BOTH)
    x = case.inputs(setting.dtype)
    expected = dense(model, method, x, BOTH)
    assert distance(outputs(model, x), expected) < setting.tolerance
    model.merge_adapter()
    assert distance(outputs(model, x), expected) < 2 * setting.tolerance


def test_merging_one_of_two_active_adapters_keeps_the_other(method, case):
    model = two_adapters(method, case).eval()
    activate(model, *BOTH)
    x = case.inputs()
    before = outputs(model, x)
    model.merge_adapter(["other"])
    assert distance(outputs(model, x), before) < 2 * FP32.tolerance


@pytest.mark.feature("several adapters, several active ones")
def test_set_adapter_switches_outputs_and_training(method, case, setting):
    model = two_adapters(method, case, setting)
    x = case.inputs(setting.dtype)
    for name in reversed(BOTH):
        model.set_adapter(name)
        assert distance(outputs(model, x), dense(model, method, x, (name,))) < setting.tolerance
        assert trainables(model)
        assert all(f".{name}." in key for key in trainables(model))


def test_two_adapters_of_different_seeds_differ(method, case):
    model = two_adapters(method, case)
    assert distance(delta_weight(model, method, "other"), delta_weight(model, method)) > 1e-3


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
def test_each_sample_of_a_batch_gets_its_own_adapter(method, case, setting):
    model = two_adapters(method, case, setting).eval()
    x = case.inputs(setting.dtype, batch=5)
    names = ["other", "__base__", "default", "other", "__base__"]
    with torch.no_grad():
        result = model(x, adapter_names=names)
    assert result.dtype == setting.dtype
    for row, name in enumerate(names):
        chosen = () if name == "__base__" else (name,)
        assert distance(result[[row]], dense(model, method, x[[row]], chosen)) < setting.tolerance, name


@pytest.mark.feature("one adapter per sample of a batch")
def test_mixed_batches_explain_wrong_names_counts_and_states(method, case):
    model = two_adapters(method, case)
    x = case.inputs(batch=2)
    with pytest.raises(ValueError, match=r"training mode; call eval\(\)"):
        model(x, adapter_names=["default", "other"])
    model.eval()
    with pytest.raises(ValueError, match="'absent'"):
        model(x, adapter_names=["default", "absent"])
    with pytest.raises(ValueError, match="1 entries for a batch of 2"):
        model(x, adapter_names=["default"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=["default", "other"])


# ------------------------------------------------------------------------------- weighted combinations


@pytest.mark.parametrize("weights", [(0.5, -1.5), (2.0, 1.0)])
@pytest.mark.feature("`add_weighted_adapter`, exact")
def test_weighted_adapter_is_the_exact_sum_and_survives_saving(
    method, case, setting, weights, tmp_path, record_property
):
    model = two_adapters(method, case, setting)
    if not method.combines:
        with pytest.raises(ValueError, match="lora_state_dict"):
            model.add_weighted_adapter(list(BOTH), list(weights), "sum")
        record_property("no", "modules share their pools, so no adapter of the method is the sum of two")
        return
    model.add_weighted_adapter(list(BOTH), list(weights), "sum")
    model.set_adapter("sum")
    wanted = sum(w * delta_weight(model, method, n) for w, n in zip(weights, BOTH, strict=True))
    found = tuner_layer(model).get_delta_weight("sum")
    assert distance(found, wanted) < setting.tolerance
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(Net(case.layer()).to(setting.dtype), tmp_path / "sum")
    assert distance(tuner_layer(again).get_delta_weight("default"), wanted) < setting.tolerance


@pytest.mark.feature("`add_weighted_adapter`, exact")
def test_weighted_adapter_of_different_ranks_and_scalings_is_exact(method, case):
    if not method.combines or not method.has_alpha:
        pytest.skip("the method does not combine adapters")
    model = adapt(method, case)
    add(model, method, "other", r=3, alpha=7)
    add(model, method, "third", r=1, seed=9)
    names, weights = ["other", "default", "third"], [0.3, -2.0, 1.0]
    model.add_weighted_adapter(names, weights, "sum")
    wanted = sum(w * delta_weight(model, method, n) for w, n in zip(weights, names, strict=True))
    assert distance(tuner_layer(model).get_delta_weight("sum"), wanted) < FP32.tolerance


# ------------------------------------------------------------------------ save, load, copy, compile


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.feature("save and load, `low_cpu_mem_usage`")
def test_saved_adapter_gives_the_same_outputs_when_loaded(method, case, setting, low_cpu_mem_usage, tmp_path):
    model = adapt(method, case, setting).eval()
    x = case.inputs(setting.dtype)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        Net(case.layer()).to(setting.dtype),
        tmp_path,
        low_cpu_mem_usage=low_cpu_mem_usage,
        autocast_adapter_dtype=setting.autocast,
    )
    states = (get_peft_model_state_dict(adapted) for adapted in (model, again))
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))
    if low_cpu_mem_usage:  # tensors lie where they lay in the file, and some kernels round by alignment
        assert distance(outputs(again, x), outputs(model, x)) < setting.tolerance / 10
    else:
        assert torch.equal(outputs(again, x), outputs(model, x))
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
        assert torch.equal(outputs(again, x), outputs(model, x))


@pytest.mark.feature("deepcopy and pickle")
def test_deepcopy_is_equal_and_independent(method, case, setting):
    model = adapt(method, case, setting).eval()
    x = case.inputs(setting.dtype)
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


def test_cast_and_moved_model_still_equals_the_dense_oracle(method, case):
    model = adapt(method, case).to(torch.float64)
    x = case.inputs(torch.float64)
    assert distance(outputs(model, x), dense(model, method, x)) < 1e-10


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.feature("torch.compile (no graph breaks)")
def test_adapted_layer_compiles_without_graph_breaks(method, case, train):
    torch._dynamo.reset()
    model = adapt(method, case).train(train)
    x = case.inputs()
    compiled = torch.compile(tuner_layer(model), backend="aot_eager" if train else "eager", fullgraph=True)
    result = compiled(x)
    assert distance(result, outputs(model, x)) < FP32.tolerance
    if train:
        result.square().sum().backward()
        assert all(p.grad is not None for p in trainables(model).values())


# ------------------------------------------------------------------------------------------- scaling


@pytest.mark.feature("scaling at run time (`scale_layer`, `set_scale`)")
def test_scaling_can_be_multiplied_divided_and_set(method, case):
    model = adapt(method, case)
    layer, x = tuner_layer(model), case.inputs()
    weight, delta = weight_of(model).double(), delta_weight(model, method).detach()

    def scaled_output(factor):
        base = copy.deepcopy(layer.base_layer).double()
        inputs = x.double() if x.is_floating_point() else x
        return functional_call(base, {"weight": weight + factor * delta}, (inputs,))

    layer.scale_layer(3.0)
    assert distance(outputs(model, x), scaled_output(3.0)) < FP32.tolerance
    layer.scale_layer(2.0)
    layer.unscale_layer(3.0)
    assert distance(outputs(model, x), scaled_output(2.0)) < FP32.tolerance
    layer.unscale_layer()
    assert distance(outputs(model, x), scaled_output(1.0)) < FP32.tolerance
    layer.set_scale("default", 0.25)
    assert distance(outputs(model, x), scaled_output(0.25)) < FP32.tolerance
    layer.set_scale("absent", 2.0)
    assert distance(outputs(model, x), scaled_output(0.25)) < FP32.tolerance


# -------------------------------------------------------------------------------------- export to LoRA


@pytest.mark.feature("exact LoRA export")
def test_exported_lora_gives_the_same_outputs_in_peft(method, lora_case, setting, tmp_path):
    model = adapt(method, lora_case, setting).eval()
    x = lora_case.inputs(setting.dtype)
    peft_subspace.export_lora(model, tmp_path)
    served = PeftModel.from_pretrained(Net(lora_case.layer()).to(setting.dtype), tmp_path)
    assert isinstance(served.peft_config["default"], LoraConfig)
    assert distance(outputs(served.eval(), x), outputs(model, x)) < 2 * setting.tolerance
    limit = 1e-5 if setting.adapter_dtype == torch.float32 else setting.tolerance
    assert distance(lora_weight(served), delta_weight(model, method)) < limit


def lora_weight(model):
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    return layer.get_delta_weight("default")


@pytest.mark.feature("exact LoRA export")
def test_export_follows_a_changed_scaling(method, lora_case, tmp_path):
    model = adapt(method, lora_case)
    tuner_layer(model).set_scale("default", 0.5)
    peft_subspace.export_lora(model, tmp_path)
    served = PeftModel.from_pretrained(Net(lora_case.layer()), tmp_path)
    assert distance(lora_weight(served), 0.5 * delta_weight(model, method)) < 1e-5


@pytest.mark.feature("LoRA export of grouped, dilated and unusual layers")
def test_export_names_the_layers_that_no_lora_can_express(method, case, tmp_path, record_property):
    if case.has_lora_form:
        pytest.skip("has a LoRA form")
    record_property(
        "no",
        "PEFT's LoRA convolves without groups, dilation and padding_mode (peft/tuners/lora/layer.py:1625), "
        "and calls no layer's own forward; the merged model can be served",
    )
    model = adapt(method, case)
    with pytest.raises(ValueError, match=r"no LoRA form.*\blayer\b.*; leave .* out of target_modules"):
        peft_subspace.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_every_method_is_under_test():
    assert {f"{m.config_cls.__name__}" for m in METHODS} == {
        name for name in peft_subspace.__all__ if name.endswith("Config")
    }
