"""What every method promises on layers whose weights can only be run: GPTQ, AWQ, AQLM, EETQ and unknown ones.

The classes here stand in for those of the libraries: they have the names and the attributes by which PEFT
knows them, and pack their weight. `tests/engines/test_gptqmodel.py` runs the real ones for GPTQ and AWQ; AQLM
has no backward pass on CPUs, and EETQ no kernels.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import quantization_utils
from safetensors.torch import load_file
from torch import nn

import peft_subspace
from layers import distance, tuner_layer
from methods import METHODS

METHODS_BY_NAME = {str(method): method for method in METHODS}
STARTS_FROM_WEIGHT = {"effort", "continual_svd", "continual_svd_r"}


class Codes(nn.Module):
    """Linear layer that keeps its weight as `round(W / scale)` in int8, one scale per output."""

    def __init__(self, plain):
        super().__init__()
        weight = plain.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scale)
        self.register_buffer("bias", plain.bias.detach().clone())
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.store((weight / scale).round().to(torch.int8))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.codes().float() * self.scales, self.bias)


class BaseQuantLinear(Codes):
    """Layer of gptqmodel, for GPTQ: integers side by side in int32, one row per input."""

    def store(self, codes):
        self.register_buffer("qweight", codes.T.contiguous().view(torch.int32))

    def codes(self):
        return self.qweight.view(torch.int8).T


class AwqLinear(BaseQuantLinear):
    """Layer of gptqmodel, for AWQ."""

    SUPPORTS_METHODS = (SimpleNamespace(value="awq"),)


class QuantizedLinear(Codes):
    """Layer of aqlm: parameters, none of which is named `weight`."""

    def store(self, codes):
        self.codebooks = nn.Parameter(torch.arange(-128.0, 128.0), requires_grad=False)
        self.code = nn.Parameter(codes, requires_grad=False)

    def codes(self):
        return self.codebooks[self.code.long() + 128]


class EetqLinear(Codes):
    """Layer of eetq, as transformers builds it: `weight` is packed, `(in, out)`, and tells the sizes."""

    def store(self, codes):
        del self.in_features, self.out_features
        self.register_buffer("weight", codes.T.contiguous())

    def codes(self):
        return self.weight.T


class NewQuantLinear(Codes):
    """Layer of a library that PEFT does not know, with older names for its sizes."""

    def store(self, codes):
        self.infeatures, self.outfeatures = self.in_features, self.out_features
        del self.in_features, self.out_features
        self.register_buffer("packed", codes)

    def codes(self):
        return self.packed


class Fp8Linear(nn.Linear):
    """A linear layer by its class, whose weight means nothing without the scales beside it."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 448
        self.weight = nn.Parameter((plain.weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)
        self.register_buffer("weight_scale_inv", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.float() * self.weight_scale_inv, self.bias)


KINDS = {
    "gptq": BaseQuantLinear,
    "awq": AwqLinear,
    "aqlm": QuantizedLinear,
    "eetq": EetqLinear,
    "unknown": NewQuantLinear,
    "fp8": Fp8Linear,
}


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch, record_property):
    """Class of a kind of layer, with PEFT believing that the libraries are there."""
    record_property("not run", "no backward or no kernels on CPUs; classes with their attributes stood in")
    modules = {
        "gptqmodel.nn_modules.qlinear": SimpleNamespace(BaseQuantLinear=BaseQuantLinear),
        "aqlm": SimpleNamespace(QuantizedLinear=QuantizedLinear),
        "eetq": SimpleNamespace(EetqLinear=EetqLinear),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for library in ("gptqmodel", "aqlm", "eetq"):
        monkeypatch.setattr(quantization_utils, f"is_{library}_available", lambda: True)
    return KINDS[request.param]


pytestmark = pytest.mark.feature("AQLM, EETQ (forward only)")


class Net(nn.Module):
    """Two plain layers around the one to adapt, the first of which is adapted where a test says so."""

    def __init__(self, kind=None):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.layer, self.last = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 4)
        if kind is not None:
            self.layer = kind(self.layer)

    def forward(self, x):
        return self.last(self.layer(self.first(x)))


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


def config(method, **options):
    return method.config(
        **{"target_modules": ["first", "layer"], "init_weights": False, "seed": 3, **options}
    )


@pytest.fixture
def saved(method, tmp_path):
    """Adapter that changes the output, made on the unquantized model."""
    model = get_peft_model(Net(), config(method))
    folder = tmp_path / "checkpoint-1"  # with what training needs, which cannot be computed from such weights
    model.save_pretrained(folder)
    return folder


def load(kind, folder):
    return PeftModel.from_pretrained(Net(kind), folder, is_trainable=True)


def outputs(model):
    with torch.no_grad():
        return model(X)


def wanted(model, method):
    """Outputs by the oracle: the quantized layers' own, and the update of each beside them."""
    net = model.base_model.model
    with torch.no_grad():
        x = X
        for layer in (net.first, net.layer):
            delta = method.delta_weight(layer.deltas["default"], model.peft_config["default"])
            x = layer.base_layer(x.float()).double() + x.double() @ delta.T
        return net.last(x.float())


def test_default_start_is_the_identity_or_asks_for_a_weight(method, kind, record_property):
    net = Net(kind)
    base, modules = outputs(net), dict(net.named_modules())
    if str(method) in STARTS_FROM_WEIGHT:
        with pytest.raises(ValueError, match=f"layer: the weight of {kind.__name__} cannot be read.*save it"):
            get_peft_model(net, config(method, init_weights=True))
        assert dict(net.named_modules()) == modules
        record_property(
            "no", "it is initialized by an SVD of the weight, which PEFT's backend cannot dequantize"
        )
    else:
        assert distance(outputs(get_peft_model(net, config(method, init_weights=True))), base) < 1e-6


def test_adapter_of_the_unquantized_model_is_loaded_and_trained(method, kind, saved, tmp_path):
    model = load(kind, saved)
    of_file = load_file(saved / "adapter_model.safetensors")
    assert all(torch.equal(t, of_file[name]) for name, t in get_peft_model_state_dict(model).items())
    assert distance(outputs(model), wanted(model, method)) < 1e-5
    assert distance(outputs(model), outputs(Net(kind))) > 1e-3
    held = {name: tensor.clone() for name, tensor in model.state_dict().items() if "delta" not in name}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 0.01)
    before = outputs(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        assert all(p.grad is not None and p.dtype == torch.float32 for p in parameters)
        optimizer.step()
    assert distance(outputs(model), before) > 1e-4
    assert distance(outputs(model), wanted(model, method)) < 1e-5
    assert all(torch.equal(model.state_dict()[n], t) for n, t in held.items() if "moshards" not in n)
    again = tmp_path / "checkpoint-2"
    model.save_pretrained(again)
    assert torch.equal(outputs(load(kind, again)), outputs(model))
    assert torch.equal(outputs(peft_subspace.load(Net(kind), again)), outputs(model))
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(Net(kind)))


@pytest.mark.parametrize("method", METHODS[:1], ids=str)  # PEFT asks for the kind of layer alone
def test_all_linear_includes_the_layer(method, kind):
    start = {"initialized": str(method) in STARTS_FROM_WEIGHT}  # if so, as if it were loaded
    model = get_peft_model(Net(kind), config(method, target_modules="all-linear", **start))
    assert model.targeted_module_names == ["first", "layer", "last"]


def test_gradient_passes_the_layer(method, kind, saved):
    model = load(kind, saved)
    first = model.base_model.model.first.base_layer.weight.requires_grad_()
    model(X).square().sum().backward()
    assert first.grad.any()


def test_each_sample_of_a_batch_gets_its_own_adapter(method, kind, saved):
    model = load(kind, saved)
    model.load_adapter(str(saved), "other")
    for delta in (layer.deltas["other"] for layer in model.modules() if hasattr(layer, "deltas")):
        for parameter in delta.parameters():
            parameter.data *= 0.5
    names = ["other", "__base__", "default"]
    mixed = model.eval()(X[:3], adapter_names=names).detach()
    with model.disable_adapter():
        assert distance(mixed[1], outputs(model)[1]) < 1e-5
    for row, name in ((0, "other"), (2, "default")):
        model.set_adapter(name)
        assert distance(mixed[row], outputs(model)[row]) < 1e-5


def test_exported_lora_has_the_same_update(method, kind, saved):
    model = load(kind, saved)
    lora, state = peft_subspace.lora_state_dict(model)
    assert lora.r == lora.lora_alpha
    for name in ("first", "layer"):
        pair = (state[f"base_model.model.{name}.lora_{side}.weight"].double() for side in ("B", "A"))
        delta = model.base_model.model.get_submodule(name).deltas["default"]
        update = method.delta_weight(delta, model.peft_config["default"])
        assert distance(torch.linalg.multi_dot(list(pair)), update) < 1e-5


def test_merging_says_why_it_cannot_and_changes_nothing(method, kind, saved):
    model = load(kind, saved)
    before, output = {n: t.clone() for n, t in model.state_dict().items()}, outputs(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"^layer: .* weights cannot be rewritten.*export_lora"):
            merge()
    with pytest.raises(TypeError, match="weights cannot be rewritten"):
        model.base_model.model.layer.merge()
    assert not any(layer.merged for layer in model.modules() if hasattr(layer, "deltas"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(outputs(model), output)
    assert torch.equal(outputs(model.unload()), outputs(Net(kind)))


def test_reading_the_weight_is_an_error_that_names_the_layer_type(method, kind, saved):
    with pytest.raises(NotImplementedError, match=f"the weight of {kind.__name__} cannot be read"):
        tuner_layer(load(kind, saved).base_model.model.layer).get_base_weight()


# ------------------------------------------------------------------------------------- single methods


@pytest.mark.parametrize("single", ["flora", "mos", "lora_sb", "effort"])
def test_random_start_is_that_of_an_unquantized_layer(single, kind):
    """The type of packed weights, 8-bit floats in one kind, is no type for an adapter."""
    options = config(METHODS_BY_NAME[single])
    found, wanted = (get_peft_model_state_dict(get_peft_model(net, options)) for net in (Net(kind), Net()))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("single", ["lora_sb"])
def test_start_from_gradients(single, kind):
    """The gradient of a weight is taken from inputs and output gradients; nothing reads the weight."""
    model = get_peft_model(Net(kind), config(METHODS_BY_NAME[single], init_weights=True))
    twin = Net()
    layer = model.base_model.model.layer.base_layer
    scale = layer.weight_scale_inv if kind is Fp8Linear else layer.scales
    codes = layer.weight if kind is Fp8Linear else layer.codes()
    twin.layer.weight.data = codes.float() * scale
    twin = get_peft_model(twin, config(METHODS_BY_NAME[single], init_weights=True))

    def loss(model, x):
        return model(x).square().mean()

    for net in (model, twin):
        peft_subspace.initialize_from_gradient(net, [X], learning_rate=0.1, loss_fn=loss, progress=False)
    assert distance(outputs(model), outputs(twin)) < 1e-4
    assert distance(outputs(model), outputs(Net(kind))) > 1e-3


@pytest.mark.parametrize(
    ("single", "keep", "message"),
    [
        ("continual_svd", "merge", "layer: these quantized weights cannot be rewritten"),
        ("continual_svd_r", "merge", "layer: these quantized weights cannot be rewritten"),
        ("continual_svd_r", "stack", "layer: the weight of .* cannot be read"),
    ],
)
def test_next_task_is_refused_before_anything_is_changed(single, keep, message, kind, tmp_path):
    method = METHODS_BY_NAME[single]
    folder = tmp_path / "checkpoint-1"
    get_peft_model(Net(), config(method)).save_pretrained(folder)
    model = load(kind, folder)
    before, output = {n: t.clone() for n, t in model.state_dict().items()}, outputs(model)
    with pytest.raises(ValueError, match=message):
        peft_subspace.continual.next_task(model, "task2", keep=keep)
    assert peft_subspace.continual.list_tasks(model) == {"default": "open"}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(outputs(model), output)


# ------------------------------------------------------------------------------------- what is no layer


class ScaledLinear(nn.Module):
    """Says how many features it has, but has a weight of its own, and integers beside it."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 32, 64
        self.matrix = nn.Parameter(torch.randn(64, 32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return nn.functional.normalize(x) @ self.matrix.T


def test_layers_with_a_weight_of_their_own_kind_stay_refused(method):
    net = Net()
    net.layer = ScaledLinear()
    with pytest.raises(TypeError, match="layer: ScaledLinear cannot be adapted"):
        get_peft_model(net, config(method))


def test_plain_linear_layers_in_8_bit_floats_are_no_codes():
    """Layerwise casting keeps weights so between calls; they need no scales."""
    layer = nn.Linear(4, 4).to(torch.float8_e4m3fn)
    assert peft_subspace.base_weights.quantization.quantization_of(layer) is None
