"""What every method computes for every kind of layer, against the dense oracle."""

from __future__ import annotations

import copy
from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import given
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from torch.func import functional_call

import peft_subspace
from geometries import CONVOLUTIONS, convolutions, embeddings, linears
from layers import (
    BOTH,
    CASES,
    FP32,
    SETTINGS,
    LayerCase,
    Net,
    activate,
    adapt,
    add,
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
from methods import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    # torch's compiler instantiates the autograd functions that it traces.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def probe_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def combined(model, method, weights):
    return sum(weight * delta_weight(model, method, name) for name, weight in weights.items())


def lora_weight(model):
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    return layer.get_delta_weight("default")


# ---------------------------------------------------------------------------------------------- start


@pytest.mark.typical("settings")
def test_default_start_is_the_identity_from_which_every_trainable_moves_in_three_steps(method, case, setting):
    model = adapt(method, case, setting, init_weights=True)
    x = case.inputs(setting.dtype)
    expected, result = base_output(case, setting, x), outputs(model, x)
    assert result.dtype == expected.dtype
    assert distance(result, expected) < setting.tolerance
    start = {name: p.detach().clone() for name, p in trainables(model).items()}
    assert start
    assert all(".default." in name for name in start)
    probe = probe_of(result.shape)
    optimizer = torch.optim.SGD(trainables(model).values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x).float() * probe).sum().backward()
        optimizer.step()
    for name, parameter in trainables(model).items():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, start[name]), name


@pytest.mark.typical("layers")
def test_random_start_changes_the_output_as_its_seed_says(method, case):
    x = case.inputs()
    first, again, other = (outputs(adapt(method, case, seed=seed), x) for seed in (5, 5, 6))
    assert distance(first, base_output(case, FP32, x)) > 3e-3
    assert torch.equal(first, again)
    assert distance(other, first) > 1e-3


# ------------------------------------------------------------------------------- forward and gradients


def assert_gradients_equal_the_oracles(model, method, x, tolerance):
    leaves = dict(trainables(model))
    if x.is_floating_point():
        leaves["input"] = x.requires_grad_()
    result, expected = model(x), dense(model, method, x)
    assert distance(result, expected) < tolerance
    probe = probe_of(expected.shape).double()
    gradients = torch.autograd.grad((result.double() * probe).sum(), leaves.values())
    truths = torch.autograd.grad((expected * probe).sum(), leaves.values())
    largest = max(truth.norm() for truth in truths)
    for name, gradient, truth in zip(leaves, gradients, truths, strict=True):
        # one or two numbers' gradients are sums that cancel, with the rounding errors of all that is summed
        scale = truth.norm() if truth.numel() > 2 else largest
        assert (gradient.double() - truth).norm() <= 4 * tolerance * scale, name


@pytest.mark.feature("bf16 bases, fp32 or bf16 adapters, autocast")
def test_forward_and_gradients_equal_the_dense_oracle_in_the_dtypes_asked_for(method, case, setting):
    model = adapt(method, case, setting)
    assert {p.dtype for p in trainables(model).values()} == {method.adapter_dtype(setting)}
    assert weight_of(model).dtype == setting.dtype
    x = case.inputs(setting.dtype)
    assert outputs(model, x).dtype == setting.dtype
    assert distance(outputs(model, x), dense(model, method, x)) < setting.tolerance
    assert_gradients_equal_the_oracles(model, method, x, setting.tolerance)


@pytest.mark.feature("bf16 bases, fp32 or bf16 adapters, autocast")
def test_forward_equals_the_dense_oracle_strided_without_a_batch_in_double_and_under_autocast(method, case):
    model = adapt(method, case)
    x = case.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = outputs(model, x)
    assert distance(result, dense(model, method, x)) < 2e-2
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert distance(outputs(model, strided), outputs(model, x)) < 1e-6
    model.eval()
    assert distance(outputs(model, x[0]), dense(model, method, x[0])) < FP32.tolerance
    model.to(torch.float64).train()
    x = case.inputs(torch.float64)
    assert distance(outputs(model, x), dense(model, method, x)) < 1e-10


@pytest.mark.parametrize(
    "case",
    [
        LayerCase("linear", "linear", lambda: nn.Linear(2, 12, bias=False), (40, 2)),
        LayerCase("conv", "conv", lambda: nn.Conv2d(4, 4, (1, 2), groups=2, bias=False), (4, 3, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("setting", SETTINGS[1:], ids=str)
def test_updates_below_the_steps_of_a_bf16_weight_count(method, case, setting):
    """The layer alone returns zero, and `W + ΔW` would be rounded to `W`."""

    def layer():
        built = case.build()
        weight = built.weight.data.view(len(built.weight), -1)
        weight.copy_(1.0 - 2.0 * (torch.arange(weight.shape[1]) % 2))
        return built

    model = adapt(method, replace(case, build=layer), setting)
    scale = 1e-3 / delta_weight(model, method).abs().max().item()
    tuner_layer(model).set_scale("default", scale)
    x = torch.ones_like(case.inputs(setting.dtype))
    assert not tuner_layer(model).base_layer(x).any()
    assert distance(model(x), scale * dense(model, method, x)) < 0.1  # a lost update is off by 1


@pytest.mark.typical("layers")
@pytest.mark.feature("torch.compile (no graph breaks)")
def test_adapted_layer_compiles_without_graph_breaks_and_trains(method, case):
    torch._dynamo.reset()
    model, x = adapt(method, case), case.inputs()
    result = torch.compile(tuner_layer(model), backend="aot_eager", fullgraph=True)(x)
    assert distance(result, outputs(model, x)) < FP32.tolerance
    result.square().sum().backward()
    assert all(p.grad is not None for p in trainables(model).values())


@pytest.mark.typical("layers")
@pytest.mark.feature("torch.compile (no graph breaks)")
def test_adapted_layer_compiles_without_graph_breaks_for_evaluation(method, case):
    torch._dynamo.reset()
    model, x = adapt(method, case).eval(), case.inputs()
    result = torch.compile(tuner_layer(model), backend="eager", fullgraph=True)(x)
    assert distance(result, outputs(model, x)) < FP32.tolerance


@pytest.mark.parametrize("batch", [4, 64])  # by different routes
def test_the_output_may_be_changed_in_place(method, batch):
    """As models do that mask positions, or add to what a layer has returned."""
    for case in CASES:
        model, x, gradients = adapt(method, case), case.inputs(batch=batch), []
        for change in (torch.Tensor.mul, torch.Tensor.mul_):
            model.zero_grad()
            change(tuner_layer(model)(x), 2.0).square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in trainables(model).values()])
        for found, wanted in zip(*gradients, strict=True):
            assert distance(found, wanted) < 1e-5, case


# ------------------------------------------------------------------------------------------- dropout


@pytest.mark.where(method="has_dropout")
@pytest.mark.typical("layers")
def test_dropout_acts_in_training_only(method, case, setting):
    x = case.inputs(setting.dtype)
    model = adapt(method, case, setting, dropout=0.5)
    evaluated = outputs(model.eval(), x)
    assert distance(evaluated, dense(model, method, x)) < setting.tolerance
    trained = outputs(model.train(), x)
    if case.kind == "embedding":  # its input is indices: there is nothing to drop
        assert torch.equal(trained, evaluated)
    else:
        assert not torch.equal(trained, evaluated)


@pytest.mark.typical("layers")
@pytest.mark.where(method="has_dropout", case="passes_means")
def test_dropout_keeps_the_mean(method, case):
    model = adapt(method, case, dropout=0.3).train()
    x = case.inputs(batch=1)
    many = x.repeat(4000, *[1] * (x.ndim - 1))
    truth = dense(model, method, x)
    assert distance(outputs(model, many).mean(dim=0, keepdim=True), truth) < 0.1


# ----------------------------------------------------------------------------------------------- merge


@pytest.mark.typical("settings")
@pytest.mark.feature("merge and unmerge, bit for bit")
def test_merged_weight_is_the_sum_rounded_once_and_gives_the_same_output(method, case, setting):
    model = adapt(method, case, setting).eval()
    before, x = weight_of(model), case.inputs(setting.dtype)
    output = outputs(model, x)
    model.merge_adapter()
    expected = before.double() + delta_weight(model, method)
    rounding = torch.finfo(setting.dtype).eps / 2
    once = method.adapter_dtype(setting) == torch.float32  # else the factors' products are rounded, too
    assert distance(weight_of(model), expected) < max(rounding if once else 3 * rounding, 1e-6)
    assert tuner_layer(model).merged
    assert distance(outputs(model, x), output) < 2 * setting.tolerance


# ---------------------------------------------------------------------------------- random geometries


def assert_layer_keeps_the_contract(method, case):
    """In double precision, where rounding hides nothing; merged weights are sums in fp32."""
    weight = case.layer().weight
    low = {"r": 1} if min(len(weight), weight[0].numel()) == 1 and "r" in method.options else {}
    model = adapt(method, case, **low).to(torch.float64)
    x = case.inputs(torch.float64, batch=16)  # enough for a wide convolution to sum its weights
    assert_gradients_equal_the_oracles(model, method, x, 1e-10)
    output = outputs(model.eval(), x)
    model.merge_adapter()
    assert distance(outputs(model, x), output) < FP32.tolerance


@pytest.mark.generated
def test_linear_layers_of_any_size_keep_the_contract(method):
    @given(linears())
    def run(case):
        assert_layer_keeps_the_contract(method, case)

    run()


@pytest.mark.generated
def test_embeddings_of_any_size_and_padding_keep_the_contract(method):
    @given(embeddings())
    def run(case):
        assert_layer_keeps_the_contract(method, case)

    run()


@pytest.mark.generated
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_any_geometry_keep_the_contract(method, kind):
    @given(convolutions(kind))
    def run(case):
        assert_layer_keeps_the_contract(method, case)

    run()


# --------------------------------------------------------------------------------- several adapters


@pytest.mark.typical("layers")
@pytest.mark.feature("several adapters, several active ones")
def test_all_active_adapters_count_merged_or_not(method, case, setting):
    model = two_adapters(method, case, setting).eval()
    assert distance(delta_weight(model, method, "other"), delta_weight(model, method)) > 1e-3
    activate(model, *BOTH)
    x = case.inputs(setting.dtype)
    expected = dense(model, method, x, BOTH)
    assert distance(outputs(model, x), expected) < setting.tolerance
    for names in (["other"], None):  # one of them, and all
        model.merge_adapter(names)
        assert distance(outputs(model, x), expected) < 2 * setting.tolerance
        model.unmerge_adapter()


@pytest.mark.typical("settings")
@pytest.mark.feature("one adapter per sample of a batch")
def test_each_sample_of_a_batch_gets_its_own_adapter(method, case, setting):
    model = two_adapters(method, case, setting).eval()
    x = case.inputs(setting.dtype, batch=5)
    names = ["other", "__base__", "default", "other", "__base__"]
    result = outputs(model, x, adapter_names=names)
    assert result.dtype == setting.dtype
    for row, name in enumerate(names):
        chosen = () if name == "__base__" else (name,)
        assert distance(result[[row]], dense(model, method, x[[row]], chosen)) < setting.tolerance, name


@pytest.mark.typical("settings")
@pytest.mark.feature("`add_weighted_adapter`, exact")
def test_weighted_adapter_is_the_exact_sum(method, case, setting):
    model = two_adapters(method, case, setting)
    for name, weights in {"sum": (0.5, -1.5), "other sum": (2.0, 1.0)}.items():
        model.add_weighted_adapter(list(BOTH), list(weights), name)
        wanted = combined(model, method, dict(zip(BOTH, weights, strict=True)))
        assert distance(tuner_layer(model).get_delta_weight(name), wanted) < setting.tolerance


@pytest.mark.typical("layers")
@pytest.mark.where(method="has_alpha")
@pytest.mark.feature("`add_weighted_adapter`, exact")
def test_weighted_adapter_of_different_ranks_and_scalings_is_exact(method, case):
    model = adapt(method, case)
    add(model, method, "other", r=3, alpha=7)
    add(model, method, "third", r=1, seed=9)
    weights = {"other": 0.3, "default": -2.0, "third": 1.0}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    wanted = combined(model, method, weights)
    assert distance(tuner_layer(model).get_delta_weight("sum"), wanted) < FP32.tolerance


# ------------------------------------------------------------------------------------------- scaling


@pytest.mark.typical("layers")
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


@pytest.mark.where(case="has_lora_form")
@pytest.mark.typical("settings")
@pytest.mark.feature("exact LoRA export")
def test_exported_lora_gives_the_same_outputs_in_peft_at_any_scaling(method, case, setting, tmp_path):
    model = adapt(method, case, setting).eval()
    x = case.inputs(setting.dtype)
    limit = 1e-5 if method.adapter_dtype(setting) == torch.float32 else setting.tolerance
    for scale in (1.0, 0.5):
        tuner_layer(model).set_scale("default", scale)
        peft_subspace.export_lora(model, tmp_path / f"{scale}")
        served = PeftModel.from_pretrained(Net(case.layer()).to(setting.dtype), tmp_path / f"{scale}")
        assert isinstance(served.peft_config["default"], LoraConfig)
        assert distance(outputs(served.eval(), x), outputs(model, x)) < 2 * setting.tolerance
        assert distance(lora_weight(served), scale * delta_weight(model, method)) < limit


@pytest.mark.where(case="has_no_lora_form")
@pytest.mark.feature("LoRA export of grouped, dilated and unusual layers")
def test_export_names_the_layers_that_no_lora_can_express(method, case, tmp_path, record_property):
    record_property(
        "no",
        "PEFT's LoRA convolves without groups, dilation and padding_mode (peft/tuners/lora/layer.py:1625), "
        "and calls no layer's own forward; the merged model can be served",
    )
    model = adapt(method, case)
    with pytest.raises(ValueError, match=r"no LoRA form.*\blayer\b.*; leave .* out of target_modules"):
        peft_subspace.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


class Own(nn.Linear):
    """A linear layer with a forward of its own, a function of the input, the weight and the bias."""

    def __init__(self, function):
        super().__init__(6, 4)
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


PLAIN = {
    "product": lambda x, weight, bias: x @ weight.T + bias,
    "transposed": lambda x, weight, bias: (weight @ x.T).T + bias,
    "row by row": lambda x, weight, bias: torch.stack([weight.mv(row) for row in x]) + bias,
}
NOT_PLAIN = {
    "scaled": lambda x, weight, bias: 2 * x @ weight.T + bias,
    "standardized": lambda x, weight, bias: x @ (weight - weight.mean(1, keepdim=True)).T + bias,
    "without bias": lambda x, weight, bias: x @ weight.T,
    "squared": lambda x, weight, bias: (x @ weight.T + bias).square(),
    "other shape": lambda x, weight, bias: (x @ weight.T + bias)[:1],
    "tuple": lambda x, weight, bias: (x @ weight.T + bias, x),
    "other input": lambda x, weight, bias: x.unflatten(1, (5, -1)) @ weight.T,
}


def test_a_forward_of_its_own_is_exported_where_it_does_what_a_linear_layer_does(method):
    for name, function in PLAIN.items():
        model, x = get_peft_model(Net(Own(function)), method.config(init_weights=False)), torch.randn(3, 6)
        config, state = peft_subspace.lora_state_dict(model)
        served = get_peft_model(Net(copy.deepcopy(model.base_model.model.layer.base_layer)), config)
        set_peft_model_state_dict(served, state)
        assert distance(outputs(served.eval(), x), outputs(model.eval(), x)) < 1e-5, name
    for function in NOT_PLAIN.values():
        model = get_peft_model(Net(Own(function)), method.config(init_weights=False))
        with pytest.raises(ValueError, match=r"layer \(a forward of its own\)"):
            peft_subspace.lora_state_dict(model)


def test_every_method_is_under_test():
    assert {f"{m.config_cls.__name__}" for m in METHODS} == {
        name for name in peft_subspace.__all__ if name.endswith("Config")
    }
