"""What every method promises on bases quantised by bitsandbytes, in 4 and 8 bits, on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import distance, tuner_layer
from methods import LINEAR
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_subspace

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merge lora module to .-bit linear may get different generations:UserWarning",
    "ignore:MatMul8bitLt. inputs will be cast from:UserWarning",
)


def linear(kind):
    torch.manual_seed(1)
    plain = nn.Linear(128, 32)
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(128, 32, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            128, 32, compute_dtype=torch.bfloat16 if kind == "4bit-bf16" else torch.float32,
            quant_type="nf4", compress_statistics=kind == "4bit-double",
        )  # fmt: skip
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


class Net(nn.Module):
    """A plain layer before the quantised one, so that gradients have to pass it."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(128, 128)
        self.layer = linear(kind)

    def forward(self, x):
        return self.layer(self.first(x))


KINDS = ["4bit", "4bit-double", "4bit-bf16", "8bit"]


@pytest.fixture(params=KINDS)
def kind(request, method):
    if not method.kinds >= LINEAR:
        pytest.skip("the method does not adapt linear layers")
    return request.param


def inputs():
    return torch.randn(5, 128, generator=torch.Generator().manual_seed(3))


def adapt(method, kind, **options):
    net = Net(kind)
    return get_peft_model(net, method.config(**{"init_weights": False, "seed": 3, **options}))


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def codes(model):
    """Everything that the quantised weight consists of."""
    base = tuner_layer(model).get_base_layer()
    weight = base.weight
    state = {"codes": weight.data.clone(), "dtype": weight.data.dtype, "shape": weight.data.shape}
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is not None:
        state |= {
            name: t.clone() for name, t in quant_state.as_dict(packed=True).items() if torch.is_tensor(t)
        }
    for name in ("SCB", "CB"):  # they move from the weight to the layer's state in the first forward
        places = (weight, getattr(base, "state", None))
        values = [getattr(place, name) for place in places if getattr(place, name, None) is not None]
        if values:
            state[name] = values[0].clone()
    return state


def assert_same_codes(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name], name


# A merged weight is quantised again: each entry moves by at most about half a step of its block.
REQUANTISED = {"4bit": 0.12, "4bit-double": 0.12, "4bit-bf16": 0.12, "8bit": 0.02}


def test_default_start_is_the_identity_and_forward_equals_the_dense_oracle(method, kind):
    x = inputs()
    base = outputs(Net(kind), x)
    assert distance(outputs(adapt(method, kind, init_weights=True), x), base) < 1e-6
    model = adapt(method, kind)
    delta = method.delta_weight(tuner_layer(model).deltas["default"], model.peft_config["default"])
    with torch.no_grad():
        branch = model.base_model.model.first(x).double() @ delta.T
    limit = 1e-2 if kind == "4bit-bf16" else 1e-5
    assert distance(outputs(model, x), base.double() + branch) < limit


@pytest.mark.filterwarnings("ignore:adapter .* trains in bases")  # LoRA-SB before its gradient start
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
    assert_same_codes(codes(model), before)


def test_gradient_passes_the_quantised_layer(method, kind):
    model = adapt(method, kind).train()
    model.base_model.model.first.weight.requires_grad_()
    model(inputs()).float().square().sum().backward()
    assert model.base_model.model.first.weight.grad.abs().sum() > 0


def test_merged_weight_is_the_sum_up_to_quantisation(method, kind):
    model = adapt(method, kind)
    layer = tuner_layer(model)
    wanted = layer.get_base_weight().double() + method.delta_weight(
        layer.deltas["default"], model.peft_config["default"]
    )
    model.merge_adapter(safe_merge=True)
    assert distance(layer.get_base_weight(), wanted) < REQUANTISED[kind]
    x = inputs()
    with torch.no_grad():
        expected = model.base_model.model.first(x).double() @ wanted.T + layer.get_base_layer().bias
    assert distance(outputs(model, x), expected) < 2 * REQUANTISED[kind]


@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "after-eval"])
def test_unmerge_restores_the_codes_bit_for_bit(method, kind, evaluated):
    """Evaluating repacks 4-bit codes on some CPUs; that must neither spoil the merge nor the way back."""
    model = adapt(method, kind)
    layer, x = tuner_layer(model), inputs()
    before, output = codes(model), outputs(model, x)
    dequantised = layer.get_base_weight().clone()
    if evaluated:
        model.eval()
        outputs(model, x)
        outputs(model, x)
    for _ in range(3):
        model.merge_adapter()
        if evaluated:
            outputs(model, x)
        model.unmerge_adapter()
    assert torch.equal(layer.get_base_weight(), dequantised)
    assert_same_codes(codes(model), before)
    limit = 1e-2 if kind in ("4bit-bf16", "8bit") else 1e-6  # evaluating runs other kernels than training
    assert distance(outputs(model, x), output) < limit


def test_merge_after_an_evaluation_equals_merge_before_it(method, kind):
    fresh, evaluated = adapt(method, kind), adapt(method, kind).eval()
    outputs(evaluated, inputs())
    fresh.merge_adapter()
    evaluated.merge_adapter()
    assert torch.equal(tuner_layer(fresh).get_base_weight(), tuner_layer(evaluated).get_base_weight())


def test_merge_into_a_base_that_was_evaluated_before_it_was_wrapped(method, kind):
    """Then the codes may be repacked already, with scales that bitsandbytes has rounded."""
    net = Net(kind).eval()
    outputs(net, inputs())
    weight = tuner_layer(adapt(method, kind)).get_base_weight()
    model = get_peft_model(net, method.config(init_weights=False, seed=3)).eval()
    layer = tuner_layer(model)
    assert distance(layer.get_base_weight(), weight) < 1e-2
    before = outputs(model, inputs())
    model.merge_adapter()
    assert distance(outputs(model, inputs()), before) < 2 * REQUANTISED[kind]
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
    assert_same_codes(codes(single), before)


def test_merged_layer_reports_the_memory_it_keeps(method, kind):
    layer = tuner_layer(adapt(method, kind))
    layer.merge()
    assert layer.kept_bytes >= layer.get_base_layer().weight.data.nbytes
    layer.unmerge()
    assert layer.kept_bytes == 0


def test_disabled_adapter_gives_exactly_the_base_output(method, kind):
    model = adapt(method, kind)
    x = inputs()
    base = outputs(Net(kind), x)
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), base)


def test_merge_and_unload_gives_a_quantised_layer(method, kind):
    model = adapt(method, kind).eval()
    x = inputs()
    before = outputs(model, x)
    plain = model.merge_and_unload()
    assert type(plain.layer) is type(linear(kind))
    assert distance(outputs(plain, x), before) < 2 * REQUANTISED[kind]


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
        assert distance(mixed[row], outputs(model, x)[row]) < (1e-2 if kind == "4bit-bf16" else 1e-6)


def test_saved_adapter_gives_the_same_outputs_when_loaded(method, kind, tmp_path):
    model = adapt(method, kind).eval()
    x = inputs()
    model.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        assert torch.equal(outputs(load(Net(kind), tmp_path).eval(), x), outputs(model, x))


def test_exported_lora_gives_the_same_outputs_in_peft(method, kind, tmp_path):
    model = adapt(method, kind).eval()
    x = inputs()
    peft_subspace.save_as_lora(model, tmp_path)
    net = Net(kind)
    net.layer.support_avx512bf16_for_cpu = False  # PEFT's LoRA lets bitsandbytes round the base's scales
    served = PeftModel.from_pretrained(net, tmp_path).eval()
    assert isinstance(served.peft_config["default"], LoraConfig)
    assert distance(outputs(served, x), outputs(model, x)) < (1e-2 if kind == "4bit-bf16" else 1e-5)


def test_copy_of_a_quantised_model_is_equal_and_independent(method, kind):
    model = adapt(method, kind).eval()
    x = inputs()
    before = outputs(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, x), before)
    twin.merge_adapter()
    assert torch.equal(outputs(model, x), before)
