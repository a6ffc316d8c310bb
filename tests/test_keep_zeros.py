"""Pruned weights stay pruned: `keep_zeros=True` makes every update `ΔW ⊙ (W ≠ 0)`."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

import peft_subspace
from layers import (
    BF16,
    FP32,
    LayerCase,
    Net,
    activate,
    adapt,
    add,
    delta_weight,
    distance,
    outputs,
    trainables,
    tuner_layer,
    weight_of,
)
from methods import METHODS
from quantized import KINDS, WARNINGS, marked, quantized_model

KEEPING = [method for method in METHODS if method.keeps_zeros]
FLORA = next(method for method in METHODS if method.name == "flora")
WIDE = LayerCase("wide", "linear", lambda: nn.Linear(64, 32), (3, 64))


def halve(weight):
    """Set the smaller half of the entries to zero."""
    weight.masked_fill_(weight.abs() < weight.abs().median(), 0.0)


def two_of_four(weight):
    """Set the two smallest of any four neighbors in a row to zero."""
    fours = weight.reshape(-1, 4)
    fours.scatter_(1, fours.abs().argsort(dim=1)[:, :2], 0.0)


def pruned(case, prune=halve):
    """The layer with a weight that is pruned."""

    def build():
        layer = case.build()
        prune(layer.weight.data)
        return layer

    return replace(case, build=build)


def masked(model, method, adapter="default"):
    """What the update must be, as the layer stores its weight."""
    return delta_weight(model, method, adapter) * (tuner_layer(model).get_base_layer().weight != 0)


def dense(model, method, x, adapters=("default",)):
    base = copy.deepcopy(tuner_layer(model).base_layer).double()
    weight = base.weight.detach() + sum(masked(model, method, adapter) for adapter in adapters)
    return functional_call(base, {"weight": weight}, (x.double() if x.is_floating_point() else x,))


def train(model, x, steps=3):
    optimizer = torch.optim.AdamW(trainables(model).values(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().sin().sum().backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------- equation


@pytest.mark.where(method="keeps_zeros")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_forward_and_gradients_equal_the_masked_oracle(method, case):
    model = adapt(method, pruned(case), keep_zeros=True)
    x = case.inputs()
    result, expected = model(x), dense(model, method, x)
    assert distance(result, expected) < FP32.tolerance
    assert distance(outputs(model.eval(), x), expected) < FP32.tolerance
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).double()
    leaves = list(trainables(model).values())
    found = torch.autograd.grad((result.double() * probe).sum(), leaves)
    truths = torch.autograd.grad((expected * probe).sum(), leaves)
    largest = max(truth.norm() for truth in truths)
    for gradient, truth in zip(found, truths, strict=True):
        scale = truth.norm() if truth.numel() > 2 else largest
        assert (gradient.double() - truth).norm() <= 4 * FP32.tolerance * scale


@pytest.mark.parametrize("tokens", [2, 300], ids=["few", "many"])
def test_few_rows_and_many_give_the_same(tokens):
    """One product with `W + ΔW` is cheaper from some number of rows on."""
    model = adapt(FLORA, pruned(WIDE), keep_zeros=True)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(7))
    for mode in (True, False):
        model.train(mode)
        assert distance(outputs(model, x), dense(model, FLORA, x)) < FP32.tolerance
    assert distance(model(x), dense(model, FLORA, x)) < FP32.tolerance


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    case = pruned(WIDE)
    model, x = adapt(FLORA, case, keep_zeros=True), case.inputs()
    result = torch.compile(tuner_layer(model), backend="aot_eager", fullgraph=True)(x)
    assert distance(result, dense(model, FLORA, x)) < FP32.tolerance


# ------------------------------------------------------------------------------------------------- merge


@pytest.mark.where(method="keeps_zeros")
@pytest.mark.typical("layers")
@pytest.mark.parametrize("setting", [FP32, BF16], ids=str)
def test_zeros_survive_training_and_merging_and_unmerging_is_exact(method, case, setting):
    model = adapt(method, pruned(case), setting, keep_zeros=True)
    before, x = weight_of(model), case.inputs(setting.dtype)
    train(model, x)
    output = outputs(model.eval(), x)
    model.merge_adapter()
    after = weight_of(model)
    assert (before == 0).any()
    assert not after[before == 0].any()
    assert not torch.equal(after, before)
    assert distance(outputs(model, x), output) < 2 * setting.tolerance
    model.unmerge_adapter()
    assert torch.equal(weight_of(model), before)


@pytest.mark.parametrize("method", KEEPING, ids=str)
@pytest.mark.parametrize("setting", [FP32, BF16], ids=str)
def test_two_of_four_stay_zero(method, setting):
    model = adapt(method, pruned(WIDE, two_of_four), setting, keep_zeros=True)
    train(model, WIDE.inputs(setting.dtype))
    weight = model.merge_and_unload().layer.weight
    assert ((weight.reshape(-1, 4) == 0).sum(1) >= 2).all()  # a sum may be zero, too


@pytest.mark.parametrize("kind", marked([kind for kind in KINDS if kind.name != "hqq-4bit"]))
@pytest.mark.filterwarnings(*WARNINGS.args)
def test_zeros_survive_merging_into_quantized_weights(kind):
    """Zero is a code of symmetric formats; HQQ's have no zeros to begin with."""
    net = quantized_model(Net(pruned(WIDE, two_of_four).layer()), kind, ("layer",))
    model = get_peft_model(net, FLORA.config(init_weights=False, seed=3, keep_zeros=True))
    layer = tuner_layer(model)
    before = layer.get_base_weight().clone()
    assert (before == 0).float().mean() >= 0.5
    model.merge_adapter()
    after = layer.get_base_weight()
    assert not after[before == 0].any()
    assert not torch.equal(after, before)


def test_without_the_option_zeros_do_not_survive():
    model = adapt(FLORA, pruned(WIDE))
    before = weight_of(model)
    model.merge_adapter()
    assert (weight_of(model)[before == 0] != 0).any()


# --------------------------------------------------------------------------------------- several adapters


@pytest.mark.typical("layers")
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_adapters_with_and_without_it_work_together(case):
    model = adapt(FLORA, pruned(case), keep_zeros=True)
    add(model, FLORA, "other")
    activate(model, "default", "other")
    base, x = weight_of(model), case.inputs()
    total = base + masked(model, FLORA) + delta_weight(model, FLORA, "other")
    expected = functional_call(tuner_layer(model).base_layer, {"weight": total.float()}, (x,))
    assert distance(outputs(model, x), expected) < FP32.tolerance
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])  # the zeros are those of the weight before any merge
    assert distance(weight_of(model), total) < 1e-6


@pytest.mark.typical("layers")
@pytest.mark.where(method="keeps_zeros")
def test_mixed_batches_give_each_sample_its_adapter(method, case):
    model = adapt(method, pruned(case), keep_zeros=True)
    add(model, method, "other")
    add(model, method, "third", keep_zeros=True)
    model.eval()
    names = ["default", "other", "__base__", "third", "default"]
    x = case.inputs(batch=5)
    result = outputs(model, x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = outputs(model, x[row : row + 1])
        else:
            activate(model, name)
            expected = outputs(model, x[row : row + 1])
        assert distance(result[row : row + 1], expected) < FP32.tolerance


@pytest.mark.parametrize("method", KEEPING, ids=str)
def test_weighted_sums_are_exact_and_keep_the_zeros(method):
    case = pruned(WIDE)
    model = adapt(method, case, keep_zeros=True)
    start = model if method.name != "lora_sb" else None
    add(model, method, "other", keep_zeros=True, **({} if start else {"seed": 3}))
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    expected = 0.5 * masked(model, method) - 2.0 * masked(model, method, "other")
    found = tuner_layer(model).get_delta_weight("sum")
    assert distance(found, expected) < 1e-5
    assert model.peft_config["sum"].keep_zeros
    assert not found[weight_of(model) == 0].any()


def test_sums_of_adapters_that_differ_in_it_are_refused():
    model = adapt(FLORA, pruned(WIDE), keep_zeros=True)
    add(model, FLORA, "other")
    with pytest.raises(ValueError, match="differ in keep_zeros"):
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"default", "other"}


# ------------------------------------------------------------------------------------ other kinds of weights


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stack = nn.Parameter(torch.randn(3, 8, 6))
        halve(self.stack.data)

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.stack, x)


def test_stacked_experts_keep_their_zeros():
    config = FLORA.config(
        target_modules=None, target_parameters=["layer.stack"], init_weights=False, seed=3, keep_zeros=True
    )
    net = Net(Experts())
    before, x = net.layer.stack.detach().clone(), torch.randn(4, 6)
    model = get_peft_model(net, config)
    layer = tuner_layer(model)
    oracle = FLORA.delta_weight(layer.deltas["default"], config).permute(2, 0, 1) * (before != 0)
    expected = torch.einsum("eoi,bi->beo", before + oracle.float(), x)
    assert distance(model(x), expected) < FP32.tolerance
    merged = model.merge_and_unload().layer.stack
    assert not merged[before == 0].any()
    assert distance(merged, before + oracle) < 1e-6


def test_start_from_gradients_sees_what_can_move():
    """With a gradient of one where the weight is zero, and of zero elsewhere, nothing can start."""
    case = pruned(WIDE)
    method = next(method for method in METHODS if method.name == "lora_sb")
    model = adapt(method, case, init_weights=True, keep_zeros=True)
    zeros = (weight_of(model) == 0).float()

    def loss(model, batch):
        layer = tuner_layer(model)
        return (layer(torch.eye(64)) - layer.get_base_layer().bias).T.mul(zeros).sum()

    with pytest.raises(ValueError, match="no sample reached"):
        peft_subspace.initialize_from_gradient(
            model, [{"x": torch.zeros(1)}], learning_rate=1e-3, loss_fn=loss
        )


# ------------------------------------------------------------------------------------------------ saving


def test_saved_adapter_loads_on_the_same_zeros_only(tmp_path):
    case = pruned(WIDE)
    model = adapt(FLORA, case, keep_zeros=True)
    x = case.inputs()
    model.save_pretrained(tmp_path)
    plain = adapt(FLORA, case)
    plain.save_pretrained(tmp_path / "plain")
    file = "adapter_model.safetensors"
    assert (tmp_path / file).stat().st_size == (tmp_path / "plain" / file).stat().st_size

    def moved(weight):  # as many zeros, elsewhere
        two_of_four(weight)
        weight.copy_(weight.roll(1, dims=1))

    for load in (PeftModel.from_pretrained, peft_subspace.load):
        assert torch.equal(outputs(load(Net(case.layer()), tmp_path), x), outputs(model, x))
        for prune in (two_of_four, moved, lambda weight: None):
            net = Net(pruned(WIDE, prune).layer())
            modules = [*net.modules()]
            with pytest.raises(ValueError, match="other zeros"):
                load(net, tmp_path)
            assert [*net.modules()] == modules


def test_patterns_with_as_many_zeros_are_told_apart(tmp_path):
    adapt(FLORA, pruned(WIDE, two_of_four), keep_zeros=True).save_pretrained(tmp_path)

    def moved(weight):
        two_of_four(weight)
        weight.copy_(weight.roll(1, dims=1))

    with pytest.raises(ValueError, match=r"1024 of 2048.*1024 of 2048"):
        peft_subspace.load(Net(pruned(WIDE, moved).layer()), tmp_path)


def test_one_config_serves_several_models():
    config = FLORA.config(keep_zeros=True)
    first = get_peft_model(Net(pruned(WIDE).layer()), config).peft_config["default"].zeros
    second = get_peft_model(Net(pruned(WIDE, two_of_four).layer()), config).peft_config["default"].zeros
    assert first != second


# ---------------------------------------------------------------------------------------------- refusals


def test_export_to_lora_is_refused_with_the_reason(tmp_path):
    model = adapt(FLORA, pruned(WIDE), keep_zeros=True)
    with pytest.raises(ValueError, match=r"layer \(keep_zeros=True: a product of two factors"):
        peft_subspace.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_base_without_zeros_warns():
    with pytest.warns(UserWarning, match=r"keep_zeros=True has no effect.*prune the model first"):
        adapt(FLORA, WIDE, keep_zeros=True)


@pytest.mark.parametrize("method", [m for m in METHODS if m.is_confined], ids=str)
def test_confined_updates_refuse_it(method):
    net = Net(pruned(WIDE).layer())
    modules = [*net.modules()]
    with pytest.raises(ValueError, match=r"keep_zeros=True would take updates of ContinualSVDModel out"):
        get_peft_model(net, method.config(keep_zeros=True))
    assert [*net.modules()] == modules


def test_other_values_are_refused():
    with pytest.raises(TypeError, match="keep_zeros='yes' must be True or False"):
        FLORA.config(keep_zeros="yes")
    with pytest.raises(TypeError, match="zeros=3 must be text, or None"):
        FLORA.config(zeros=3)


class Packed(nn.Module):
    """A quantized linear layer that nobody can dequantize."""

    in_features, out_features = 8, 4

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int8))

    def forward(self, x):
        return x @ self.qweight.T.float()


def test_weights_that_cannot_be_read_are_refused():
    net = Net(Packed())
    with pytest.raises(ValueError, match="layer: the weight of Packed cannot be read"):
        get_peft_model(net, FLORA.config(keep_zeros=True))
    assert isinstance(net.layer, Packed)
