"""What every method promises on bases quantized by bitsandbytes, torchao and HQQ, on a CPU."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from transformers import TorchAoConfig

import peft_subspace
from layers import distance, tuner_layer
from methods import METHODS
from quantized import KINDS, WARNINGS, assert_same_parts, marked, parts, quantized_model

pytestmark = WARNINGS


class Net(nn.Module):
    """A plain layer before the quantized one, so that gradients have to pass it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(128, 128)
        torch.manual_seed(1)
        self.layer = nn.Linear(128, 32)

    def forward(self, x):
        return self.layer(self.first(x))


@pytest.fixture(params=marked(KINDS))
def kind(request):
    return request.param


def network(kind):
    return quantized_model(Net(), kind, ("layer",))


def inputs():
    return torch.randn(5, 128, generator=torch.Generator().manual_seed(3))


def adapt(method, kind, **options):
    return get_peft_model(network(kind), method.config(**{"init_weights": False, "seed": 3, **options}))


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def codes(model):
    return parts(tuner_layer(model).get_base_layer())


def test_default_start_is_the_identity_and_forward_equals_the_dense_oracle(method, kind):
    x = inputs()
    base = outputs(network(kind), x)
    assert distance(outputs(adapt(method, kind, init_weights=True), x), base) < 1e-6
    model = adapt(method, kind)
    delta = method.delta_weight(tuner_layer(model).deltas["default"], model.peft_config["default"])
    with torch.no_grad():
        branch = model.base_model.model.first(x).double() @ delta.T
    assert distance(outputs(model, x), base.double() + branch) < kind.rounds


def test_adapter_trains_in_floating_point_and_the_base_stays(method, kind):
    model = adapt(method, kind, init_weights=True).train()
    before = codes(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    assert parameters
    assert all(p.is_floating_point() for p in parameters.values())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    probe = torch.randn(5, 32)
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs()).float() * probe).sum().backward()
        optimizer.step()
    for name, parameter in parameters.items():
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, start[name]), name
    assert_same_parts(codes(model), before)


@pytest.mark.parametrize("method", METHODS[:1], ids=str)  # PEFT asks for the kind of layer alone
def test_all_linear_includes_the_quantized_layer(method, kind):
    net = network(kind)
    net.outside = nn.LayerNorm(4)
    model = get_peft_model(net, method.config(target_modules="all-linear"))
    assert model.targeted_module_names == ["first", "layer"]


def test_gradient_passes_the_quantized_layer(method, kind):
    model = adapt(method, kind).train()
    model.base_model.model.first.weight.requires_grad_()
    model(inputs()).float().square().sum().backward()
    assert model.base_model.model.first.weight.grad.abs().sum() > 0


def test_merged_weight_is_the_sum_up_to_quantization(method, kind):
    model = adapt(method, kind)
    layer = tuner_layer(model)
    wanted = layer.get_base_weight().double() + method.delta_weight(
        layer.deltas["default"], model.peft_config["default"]
    )
    model.merge_adapter(safe_merge=True)
    assert distance(layer.get_base_weight(), wanted) < kind.requantized
    x = inputs()
    with torch.no_grad():
        expected = model.base_model.model.first(x).double() @ wanted.T + layer.get_base_layer().bias
    assert distance(outputs(model, x), expected) < 2 * kind.requantized


@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "after-eval"])
def test_unmerge_restores_the_codes_bit_for_bit(method, kind, evaluated):
    """Evaluating repacks 4-bit weights on some CPUs; that must neither spoil the merge nor the way back."""
    model = adapt(method, kind)
    layer, x = tuner_layer(model), inputs()
    before, output, text = codes(model), outputs(model, x), repr(layer.get_base_layer())
    dequantized = layer.get_base_weight().clone()
    if evaluated:
        model.eval()
        outputs(model, x)
        outputs(model, x)
    for _ in range(3):
        model.merge_adapter()
        assert repr(layer.get_base_layer()) == text
        if evaluated:
            outputs(model, x)
        model.unmerge_adapter()
    assert torch.equal(layer.get_base_weight(), dequantized)
    assert_same_parts(codes(model), before)
    limit = 1e-2 if kind.name.startswith("bnb-8bit") else kind.rounds  # evaluating runs other kernels
    assert distance(outputs(model, x), output) < limit


def test_merge_after_an_evaluation_equals_merge_before_it(method, kind):
    fresh, evaluated = adapt(method, kind), adapt(method, kind).eval()
    outputs(evaluated, inputs())
    fresh.merge_adapter()
    evaluated.merge_adapter()
    assert torch.equal(tuner_layer(fresh).get_base_weight(), tuner_layer(evaluated).get_base_weight())


def test_merge_into_a_base_that_was_evaluated_before_it_was_wrapped(method, kind):
    """Then the weights may be repacked already, with scales that bitsandbytes has rounded."""
    net = network(kind).eval()
    outputs(net, inputs())
    weight = tuner_layer(adapt(method, kind)).get_base_weight()
    model = get_peft_model(net, method.config(init_weights=False, seed=3)).eval()
    layer = tuner_layer(model)
    assert distance(layer.get_base_weight(), weight) < 1e-2
    before = outputs(model, inputs())
    model.merge_adapter()
    assert distance(outputs(model, inputs()), before) < 2 * kind.requantized
    model.unmerge_adapter()
    assert distance(layer.get_base_weight(), weight) < 1e-2
    assert distance(outputs(model, inputs()), before) < 1e-2
    model.train()
    model(inputs()).float().sum().backward()


def test_training_goes_on_after_an_evaluation(method, kind):
    model = adapt(method, kind).eval()
    outputs(model, inputs())
    model.train()
    model(inputs()).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_several_merges_start_from_the_original_weight(method, kind):
    together, single = adapt(method, kind), adapt(method, kind)
    for model in (together, single):
        model.add_adapter("other", method.config(init_weights=False, seed=4))
        model.base_model.set_adapter(["default", "other"])
    before = codes(single)
    together.merge_adapter()
    single.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        single.merge_adapter(["other"])
    assert torch.equal(tuner_layer(single).get_base_weight(), tuner_layer(together).get_base_weight())
    single.unmerge_adapter()
    assert_same_parts(codes(single), before)


def test_merged_layer_reports_the_memory_it_keeps(method, kind):
    layer = tuner_layer(adapt(method, kind))
    stored = codes(layer)["codes"].nbytes
    layer.merge()
    assert stored <= layer.kept_bytes < 2 * stored
    layer.unmerge()
    assert layer.kept_bytes == 0


def test_disabled_adapter_gives_exactly_the_base_output(method, kind):
    model = adapt(method, kind)
    x = inputs()
    base = outputs(network(kind), x)
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), base)


def test_merge_and_unload_gives_a_quantized_layer(method, kind):
    model = adapt(method, kind).eval()
    x = inputs()
    before = outputs(model, x)
    plain = model.merge_and_unload()
    assert type(plain.layer) is type(network(kind).layer)
    assert parts(plain.layer).keys() == parts(network(kind).layer).keys()
    assert distance(outputs(plain, x), before) < 2 * kind.requantized


def test_each_sample_of_a_batch_gets_its_own_adapter(method, kind):
    model = adapt(method, kind)
    model.add_adapter("other", method.config(init_weights=False, seed=4))
    model.eval()
    x = inputs()[:3]
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(x, adapter_names=names)
    with model.disable_adapter():
        assert distance(mixed[1], outputs(model, x)[1]) < 1e-6
    for row, name in ((0, "other"), (2, "default")):
        model.set_adapter(name)
        assert distance(mixed[row], outputs(model, x)[row]) < kind.rounds


def test_saved_adapter_gives_the_same_outputs_when_loaded(method, kind, tmp_path):
    model = adapt(method, kind).eval()
    x = inputs()
    model.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        assert torch.equal(outputs(load(network(kind), tmp_path).eval(), x), outputs(model, x))


def test_exported_lora_gives_the_same_outputs_in_peft(method, kind, tmp_path):
    model = adapt(method, kind).eval()
    x = inputs()
    peft_subspace.export_lora(model, tmp_path)
    net = network(kind)
    if kind.name.startswith("bnb-"):
        net.layer.support_avx512bf16_for_cpu = False  # PEFT's LoRA lets bitsandbytes round the base's scales
    served = PeftModel.from_pretrained(net, tmp_path).eval()
    assert isinstance(served.peft_config["default"], LoraConfig)
    assert distance(outputs(served, x), outputs(model, x)) < kind.rounds


def test_copy_of_a_quantized_model_is_equal_and_independent(method, kind):
    model = adapt(method, kind).eval()
    x = inputs()
    before = outputs(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, x), before)
    twin.merge_adapter()
    assert torch.equal(outputs(model, x), before)


# -------------------------------------------------------------------------- what single libraries need

TORCHAO = next(kind for kind in KINDS if kind.name == "torchao-int8")
STARTING = [method for method in METHODS if not method.pooled]  # shared pools depend on all modules


@pytest.mark.parametrize("kind", marked(KINDS))
@pytest.mark.parametrize("starting", STARTING, ids=str)
def test_each_layer_starts_from_its_own_weight(starting, kind):
    """Tensors of torchao have no address, by which tied weights are recognized."""

    def states(targets):
        torch.manual_seed(0)
        net = quantized_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), kind)
        model = get_peft_model(net, starting.config(target_modules=targets, seed=3))
        return model.base_model.model[1].deltas["default"].state_dict()

    alone, together = states(["1"]), states(["0", "1"])
    assert all(torch.equal(tensor, together[name]) for name, tensor in alone.items())


@pytest.mark.feature(TORCHAO.feature)
@pytest.mark.parametrize("settings", ["unknown", "by-name"])
@pytest.mark.filterwarnings("ignore:Config Deprecation. _default is deprecated:UserWarning")
def test_torchao_without_settings_that_apply_trains_but_does_not_merge(method, settings, monkeypatch):
    """`torchao.quantize_` leaves no trace of its settings; settings by name are of no use to a lone layer."""
    net = network(TORCHAO)
    del net.hf_quantizer
    if settings == "by-name":
        config = TorchAoConfig(FqnToConfig({"layer": Int8WeightOnlyConfig()}))
        net.hf_quantizer = SimpleNamespace(quantization_config=config)
    model = get_peft_model(net, method.config(init_weights=False, seed=3))
    before, output = codes(model), outputs(model, inputs())
    assert torch.equal(output, outputs(adapt(method, TORCHAO), inputs()))
    model(inputs()).sum().backward()
    for merge in (model.merge_adapter, model.merge_and_unload, tuner_layer(model).merge):
        with pytest.raises(TypeError, match=r"torchao weights cannot be rewritten.*by transformers' TorchAo"):
            merge()
    assert_same_parts(codes(model), before)
    assert torch.equal(outputs(model, inputs()), output)


@pytest.mark.parametrize("merged", [False, True], ids=["first", "second"])
def test_merge_that_fails_leaves_the_layer_unmerged(method, kind, merged, monkeypatch):
    """PEFT's backend for torchao removes the weight before it quantizes the new one."""
    model = adapt(method, kind)
    model.add_adapter("other", method.config(init_weights=False, seed=4))
    layer, before = tuner_layer(model), codes(model)
    if merged:
        model.merge_adapter(["other"])

    def fail(peft_layer, weight):
        base = peft_layer.get_base_layer()
        if hasattr(base, "weight"):
            del base.weight
            base.weight = weight
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer.quantization_backend, "set_base_weight", fail)
    warned = pytest.warns(UserWarning, match="additionally merging") if merged else nullcontext()
    with pytest.raises(RuntimeError, match="out of memory"), warned:
        model.merge_adapter()
    monkeypatch.undo()
    assert not layer.merged
    assert layer.kept_bytes == 0
    assert_same_parts(codes(model), before)
    assert torch.equal(outputs(model, inputs()), outputs(adapt(method, kind), inputs()))


@pytest.mark.feature(TORCHAO.feature)
@pytest.mark.parametrize("embedding", METHODS, ids=str)
def test_torchao_embedding_trains_but_does_not_merge(embedding):
    """PEFT's backend quantizes linear layers again, and would leave an embedding unquantized."""

    def network():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Embedding(12, 32))
        quantize_(net, Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Embedding))
        net.hf_quantizer = TORCHAO.settings()
        return net

    model = get_peft_model(network(), embedding.config(target_modules=["0"], init_weights=False))
    tokens = torch.tensor([[3, 1, 4]])
    before, output = codes(model), outputs(model, tokens)
    assert distance(output, outputs(network(), tokens)) > 1e-3
    model(tokens).sum().backward()
    with pytest.raises(TypeError, match="torchao weights cannot be rewritten"):
        model.merge_adapter()
    assert_same_parts(codes(model), before)
    assert torch.equal(outputs(model, tokens), output)


class Scaled(torch.Tensor):
    """Integers and their scale in one tensor, as libraries that PEFT does not know may store a weight."""

    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        return function(*[a.dequantize() if isinstance(a, cls) else a for a in args], **(kwargs or {}))


class Quantized(nn.Linear):
    """Stores its weight so."""

    def quantize(self):
        scale = self.weight.detach().abs().max() / 127
        codes = (self.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(Scaled(codes, scale), requires_grad=False)
        return self


class Freezing(Quantized):
    """Can do it again, by the name that quanto uses."""

    def freeze(self):
        self.quantize()


@pytest.mark.parametrize("layer_cls", [Quantized, Freezing])
def test_a_weight_made_of_other_tensors_is_quantized_again_or_refused(method, layer_cls):
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": layer_cls(32, 32).quantize()})
    layer = get_peft_model(net, method.config(init_weights=False)).base_model.model["layer"]
    x, codes = torch.randn(3, 32), layer.get_base_layer().weight.codes.clone()
    live = outputs(layer, x)
    if layer_cls is Quantized:
        with pytest.raises(TypeError, match="Scaled weights cannot be rewritten"):
            layer.merge()
    else:
        layer.merge()
        assert isinstance(layer.get_base_layer().weight, Scaled)
        assert distance(outputs(layer, x), live) < 0.02
        layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight.codes, codes)
    assert torch.equal(outputs(layer, x), live)
