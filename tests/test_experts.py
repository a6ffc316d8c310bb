"""Fused experts, and other parameters that are no layer's weight, through `target_parameters`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.func import functional_call

import peft_subspace
from layers import distance
from methods import METHODS
from models import LLAMA, TEXT, build
from peft_subspace.merging import merge
from peft_subspace.tuner.parameter_layer import ParameterLayer
from quantized import KINDS, quantized_model

IDS = torch.arange(3, 18).reshape(3, 5)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FLORA = next(method for method in METHODS if method.name == "flora")


def looping(model):
    """The other implementations know no double precision."""
    model.set_experts_implementation("eager")
    return model


def mixtral(**options):
    """Stacks its weights as `(experts, out, in)`."""
    options = {"num_local_experts": 3, "num_experts_per_tok": 2, **options}
    config = hf.MixtralConfig(**TEXT, **LLAMA, **options)
    return looping(build(hf.MixtralForCausalLM, config))


def qwen(**options):
    """Has its own width of the experts."""
    config = hf.Qwen3MoeConfig(
        **TEXT, **LLAMA, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, **options
    )
    return looping(build(hf.Qwen3MoeForCausalLM, config))


def gpt_oss(**options):
    """Stacks its weights as `(experts, in, out)`, with biases beside them."""
    config = hf.GptOssConfig(**TEXT, **LLAMA, num_local_experts=3, num_experts_per_tok=2, **options)
    return looping(build(hf.GptOssForCausalLM, config))


@pytest.fixture(params=[mixtral, qwen, gpt_oss], ids=["mixtral", "qwen3_moe", "gpt_oss"])
def moe(request):
    return request.param


def wrap(model, adapter="default", **options):
    config = FLORA.config(
        **{"target_modules": None, "target_parameters": EXPERTS, "init_weights": False, "seed": 1, **options}
    )
    return get_peft_model(model, config, adapter)


def add(model, adapter="other", **options):
    options = {"target_modules": None, "target_parameters": EXPERTS, "seed": 2, **options}
    model.add_adapter(adapter, FLORA.config(init_weights=False, **options))
    return model


def two_adapters(model):
    return add(wrap(model)).eval()


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def wrappers(model):
    """Wrappers by the full name of the parameter that they adapt."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParameterLayer):
            owner = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{owner}.{module.parameter_name}"] = module
    return found


def updates(model, adapter="default", method=FLORA):
    """The oracle's update of every adapted parameter, in the order of its axes."""
    result = {}
    for name, layer in wrappers(model).items():
        update = method.delta_weight(layer.deltas[adapter], model.peft_config[adapter])
        if update.ndim == 3:
            transposed = "GptOss" in type(layer.get_base_layer()).__name__
            update = update.permute(2, 1, 0) if transposed else update.permute(2, 0, 1)
        result[name] = update
    return result


def dense(base, *changes):
    """Logits, in double precision, of a plain model whose parameters are the sums."""
    parameters = {name: p.detach().double() for name, p in base.named_parameters()}
    for change in changes:
        for name, update in change.items():
            assert parameters[name].shape == update.shape
            parameters[name] = parameters[name] + update
    return functional_call(base.double(), parameters, (), {"input_ids": IDS}).logits


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------ what is computed


@pytest.mark.feature("fused experts (target_parameters)")
def test_experts_equal_a_model_with_the_dense_update(method, moe):
    options = {"target_modules": None, "target_parameters": EXPERTS, "init_weights": False, "seed": 1}
    model = get_peft_model(moe().double(), method.config(**options)).double().eval()
    assert set(wrappers(model)) == {
        f"model.layers.{i}.mlp.{name}" for i in range(LLAMA["num_hidden_layers"]) for name in EXPERTS
    }
    base = moe()
    assert distance(logits(model), dense(base, updates(model, method=method))) < 1e-10
    assert distance(logits(model), logits(base)) > 1e-2


def test_end_of_a_parameters_name_names_no_parameter(tmp_path):
    model = wrap(mixtral(), target_parameters=["gate_up_proj", "wn_proj"])
    model.save_pretrained(tmp_path)
    for adapted in (model, peft_subspace.load(mixtral(), tmp_path)):
        assert {name.rpartition(".")[2] for name in wrappers(adapted)} == {"gate_up_proj"}


def test_gradients_equal_those_through_the_dense_update(moe):
    model = wrap(moe().double()).double().train()
    truth = copy.deepcopy(model)
    weights = torch.randn(3, 5, 37, dtype=torch.float64)
    (model(input_ids=IDS).logits * weights).sum().backward()
    (dense(moe(), updates(truth)) * weights).sum().backward()
    expected = trained(truth)
    assert len(expected) == 4 * 2 * 3  # core and three factors, two parameters, three blocks
    for name, parameter in trained(model).items():
        assert distance(parameter.grad, expected[name].grad) < 1e-8, name


@pytest.mark.parametrize("start", [True, "zero_output"])
def test_starts_are_the_identity(moe, start):
    assert torch.equal(logits(wrap(moe(), init_weights=start).eval()), logits(moe()))


def test_a_start_keeps_the_variance_of_the_input_of_every_expert():
    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(40, 60, 500))

    model = wrap(torch.nn.ModuleDict({"stack": Stack()}), target_parameters=["stack.weight"], r=50, alpha=50,
                 init_weights="zero_output")  # fmt: skip
    (layer,) = wrappers(model).values()
    delta = layer.deltas["default"]
    assert not delta.mode_factor_1.any()
    delta.mode_factor_1.data = torch.eye(60)[:, :50]
    inputs = torch.randn(500, 200, generator=torch.Generator().manual_seed(0))
    assert (layer.get_delta_weight("default")[:, :50] @ inputs).std().item() == pytest.approx(1, rel=0.1)


def test_all_experts_share_the_factors_of_input_and_output():
    model = wrap(mixtral(), r=[4, 2, 2])
    delta = wrappers(model)["model.layers.0.mlp.experts.gate_up_proj"].deltas["default"]
    assert {name: tuple(p.shape) for name, p in delta.named_parameters()} == {
        "core": (4, 2, 2),
        "mode_factor_0": (16, 4),
        "mode_factor_1": (48, 2),
        "mode_factor_2": (3, 2),
    }
    assert distance(logits(model.eval()), dense(mixtral(), updates(model))) < 1e-5


def test_rank_of_the_experts_is_theirs_unless_told():
    shapes = [
        tuple(
            wrappers(wrap(qwen(), **options))["model.layers.1.mlp.experts.down_proj"]
            .deltas["default"]
            .core.shape
        )
        for options in ({"r": 2}, {"r": 2, "kernel_r": 1}, {"r": [3, 2]})
    ]
    assert shapes == [(2, 2, 3), (2, 2, 1), (3, 2, 3)]


def test_matrices_outside_layers_are_adapted_too():
    model = wrap(mixtral(), target_parameters=["gate.weight"]).eval()
    assert len(wrappers(model)) == 3
    assert distance(logits(model), dense(mixtral(), updates(model))) < 1e-5
    assert distance(logits(model), logits(mixtral())) > 1e-3


def test_modules_and_parameters_are_adapted_together(tmp_path):
    model = wrap(mixtral(), target_modules=["q_proj"]).eval()
    names = {name for name in trained(model) if "q_proj" in name}
    assert len(names) == 3 * 3
    assert len(wrappers(model)) == 6
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft_subspace.load(mixtral(), tmp_path).eval()), logits(model))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts_sees_the_update(implementation):
    model = wrap(mixtral()).eval()
    expected = dense(mixtral(), updates(model))
    model.get_base_model().set_experts_implementation(implementation)
    assert distance(logits(model), expected) < 1e-5


def test_output_under_autocast_is_that_without_but_for_rounding():
    every = {"num_experts_per_tok": 3}  # else rounding may choose other experts
    model = wrap(mixtral(**every), scale=0.3).eval()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model)
    assert 0 < distance(mixed, dense(mixtral(**every), updates(model))) < 2e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_model_gives_the_same_outputs_and_gradients():
    torch._dynamo.reset()
    model = wrap(mixtral()).train()
    model.get_base_model().set_experts_implementation("batched_mm")
    plain = model(input_ids=IDS, labels=IDS).loss
    plain.backward()
    expected = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager")(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert distance(loss, plain) < 1e-6
    for name, parameter in trained(model).items():
        assert distance(parameter.grad, expected[name]) < 1e-4, name


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradients_are_the_same_with_gradient_checkpointing(moe, reentrant):
    def gradients(checkpointing):
        model = wrap(moe()).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in trained(model).items()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert distance(checkpointed[name], gradient) < 1e-4, name


def test_training_lowers_the_loss(moe):
    model = wrap(moe(), init_weights=True, r=8).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=2e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


# --------------------------------------------------------------------------------- merge and adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merged_weights_are_the_sums_and_unmerge_restores_every_bit(moe, dtype):
    model = wrap(moe().to(dtype)).eval()
    plain = {name: p.detach().clone() for name, p in moe().to(dtype).named_parameters()}
    before = logits(model)
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        for name, update in updates(model).items():
            layer = wrappers(model)[name]
            expected = (plain[name].double() + update).to(dtype)
            assert distance(layer.base_weight.stored, expected) < (1e-6 if dtype == torch.float32 else 2e-3)
            assert layer.base_weight.stored.dtype == dtype
        assert distance(logits(model), before) < (1e-5 if dtype == torch.float32 else 2e-2)
        model.unmerge_adapter()
        for name, layer in wrappers(model).items():
            assert torch.equal(layer.base_weight.stored, plain[name])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_gives_a_plain_model(moe, safe):
    model = wrap(moe()).eval()
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is type(moe())
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in moe().named_parameters()}
    assert distance(logits(merged), before) < 1e-5
    assert torch.equal(logits(wrap(moe()).unload()), logits(moe()))


def test_safe_merge_refuses_a_broken_adapter():
    model = wrap(mixtral()).eval()
    next(iter(wrappers(model).values())).deltas["default"].core.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)


def test_disabled_adapter_gives_exactly_the_base_output(moe):
    model = wrap(moe()).eval()
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(moe()))
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(moe()))


def test_adapters_are_summed_switched_and_deleted(moe):
    model = two_adapters(moe())
    assert len(wrappers(model)) == 6  # the second adapter is in the same wrappers
    first, second = updates(model), updates(model, "other")
    model.base_model.set_adapter(["default", "other"])
    assert distance(logits(model), dense(moe(), first, second)) < 1e-5
    model.merge_adapter(["other"])
    assert distance(logits(model), dense(moe(), first, second)) < 1e-5
    model.unmerge_adapter()
    model.set_adapter("other")
    assert distance(logits(model), dense(moe(), second)) < 1e-5
    assert all(".other." in name for name in trained(model))
    model.delete_adapter("default")
    assert distance(logits(model), dense(moe(), second)) < 1e-5
    assert not any(".default." in name for name in model.state_dict())


def test_weighted_adapter_is_the_exact_sum_and_survives_saving(tmp_path):
    model = two_adapters(mixtral())
    model.add_adapter(
        "wider", FLORA.config(r=3, target_modules=["q_proj"], target_parameters=EXPERTS, seed=3)
    )
    changes = [
        {name: weight * update for name, update in updates(model, adapter).items()}
        for adapter, weight in (("default", 0.5), ("other", -1.5))
    ]
    with warnings.catch_warnings():
        # PEFT looks for the patterns' targets among modules only.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        model.base_model.add_weighted_adapter(["default", "other"], [0.5, -1.5], "sum")
        model.set_adapter("sum")
        assert distance(logits(model), dense(mixtral(), *changes)) < 1e-5
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        again = peft_subspace.load(mixtral(), tmp_path / "sum").eval()
    assert distance(logits(again), logits(model)) < 1e-6


def test_copied_model_is_equal_and_independent():
    model = wrap(mixtral()).eval()
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    for parameter in trained(twin).values():
        parameter.data.zero_()
    assert torch.equal(logits(twin), logits(mixtral()))
    assert torch.equal(logits(model), before)


# ------------------------------------------------------------------------------ files, export to LoRA


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapter_gives_the_same_outputs_when_loaded(moe, low_cpu_mem_usage, tmp_path):
    model = wrap(moe()).eval()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == 4 * 2 * 3
    again = PeftModel.from_pretrained(moe(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(peft_subspace.load(moe(), tmp_path).eval()), logits(model))
    second = peft_subspace.load(wrap(moe(), seed=9), tmp_path, "again").eval()
    second.set_adapter("again")
    assert torch.equal(logits(second), logits(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_transformers_adds_saves_loads_and_deletes_adapters_of_experts(tmp_path):
    model, base = mixtral(), logits(mixtral())
    options = {"target_modules": None, "target_parameters": EXPERTS, "init_weights": False}
    model.add_adapter(FLORA.config(**options), adapter_name="mine")
    changed = logits(model)
    assert distance(changed, base) > 1e-3
    model.save_pretrained(tmp_path)
    again = mixtral()
    again.load_adapter(str(tmp_path), adapter_name="loaded")
    again.load_adapter(str(tmp_path), adapter_name="second")
    again.set_adapter("second")
    assert torch.equal(logits(again), changed)
    again.disable_adapters()
    assert torch.equal(logits(again), base)
    again.enable_adapters()
    again.delete_adapter("loaded")
    assert torch.equal(logits(again), changed)


def test_file_that_does_not_fit_is_refused_before_the_model_is_touched(tmp_path):
    wrap(mixtral()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    key = next(key for key in state if key.endswith("experts.base_layer.flora_delta.core"))
    save_file({**state, key: state[key][:, :, :2].contiguous()}, path)
    base = mixtral()
    with pytest.raises(ValueError, match=r"core has shape \(2, 2, 2\) in the file"):
        peft_subspace.load(base, tmp_path)
    assert not wrappers(base)


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], ["gate.weight"]], ids=["both", "one", "matrix"])
def test_exported_lora_gives_the_same_outputs_in_peft(moe, targets, tmp_path):
    if targets == ["gate.weight"]:
        targets = ["router.weight"] if moe is gpt_oss else targets
    model = wrap(
        moe(), target_parameters=targets, target_modules=["q_proj"], rank_pattern={"q_proj": 1}
    ).eval()
    peft_subspace.export_lora(model, tmp_path)
    served = PeftModel.from_pretrained(moe(), tmp_path).eval()
    assert type(served.peft_config["default"]).__name__ == "LoraConfig"
    assert distance(logits(served), logits(model)) < 1e-5
    assert distance(logits(served), logits(moe())) > 1e-3


# -------------------------------------------------------------------------------------------- refusals


def refused(base, message, error=ValueError, **options):
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(error, match=message):
        wrap(base, **options)
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_what_cannot_be_adapted_is_named_before_the_model_is_touched():
    refused(
        gpt_oss(),
        r"layers\.0\.self_attn\.sinks: it has shape \(2,\).*leave it out",
        target_parameters=["sinks"],
    )
    refused(mixtral(), r"gate_up_proj: r=\[1, 2, 3, 4\].*3 modes", r=[1, 2, 3, 4])
    refused(mixtral(), r"dropout=0.5 needs the input of a layer.*set dropout=0", dropout=0.5)
    refused(
        mixtral(), r"q_proj\.weight: its module is adapted as a whole; leave the module out",
        target_modules=["q_proj"], target_parameters=["q_proj.weight"],
    )  # fmt: skip
    refused(mixtral(), r"target_parameters='experts' must be a list", TypeError, target_parameters="experts")
    base = mixtral()
    for block in base.model.layers:
        block.mlp.experts.down_proj = torch.nn.Parameter(
            torch.zeros_like(block.mlp.experts.down_proj, dtype=torch.int8), requires_grad=False
        )
    refused(base, r"down_proj: it is quantized \(torch\.int8\)", TypeError)


def test_parameter_of_the_model_itself_is_refused():
    base = torch.nn.Module()
    base.weight = torch.nn.Parameter(torch.zeros(3, 3))
    refused(base, "the model itself cannot be wrapped", target_parameters=["weight", ".weight"])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["0.mlp.experts.gate_up_proj"], ["1.mlp.experts.gate_up_proj"]),
        (["0.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj"], ["1.mlp.experts.down_proj"]),
        (["0.mlp.experts.down_proj"], ["0.mlp.experts.down_proj", "1.mlp.gate.weight"]),
    ],
)
def test_adapters_may_adapt_parameters_of_different_modules(first, second, tmp_path):
    model = add(wrap(mixtral(), target_parameters=first), target_parameters=second).eval()
    found = {}
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        names = [active] if isinstance(active, str) else active
        total = {}
        for name in names:
            for key, layer in wrappers(model).items():
                if name in layer.deltas:
                    total[key] = total.get(key, 0) + layer.get_delta_weight(name).double()
        found[str(active)] = logits(model)
        assert distance(found[str(active)], dense(mixtral(), total)) < 1e-5
    model.save_pretrained(tmp_path)
    folders = {"default": tmp_path, "other": tmp_path / "other"}
    for name, folder in folders.items():
        assert distance(logits(PeftModel.from_pretrained(mixtral(), folder)), found[name]) < 1e-6
    again = PeftModel.from_pretrained(mixtral(), folders["other"], adapter_name="other")
    again.load_adapter(folders["default"], "default")
    again.base_model.set_adapter(["other", "default"])
    assert distance(logits(again), found["['default', 'other']"]) < 1e-6
    assert distance(logits(again.merge_and_unload()), found["['default', 'other']"]) < 1e-5
    model.base_model.set_adapter(["default", "other"])
    model.delete_adapter("default")
    assert distance(logits(model), found["other"]) < 1e-6


def test_adapters_of_one_model_have_the_same_target_parameters():
    model = wrap(mixtral())
    with pytest.raises(
        ValueError, match=r"must be those of the other adapters.*experts\.gate_up_proj is in one"
    ):
        add(model, target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match="another adapter adapts a parameter of it"):
        add(
            wrap(mixtral(), target_parameters=["q_proj.weight"]),
            target_modules=["q_proj"],
            target_parameters=None,
        )
    names = [f"model.layers.{i}.mlp.{name}" for i in range(3) for name in EXPERTS]
    assert set(add(model, target_parameters=names).peft_config) == {"default", "other"}


def test_samples_of_a_batch_cannot_have_their_own_adapters():
    model = two_adapters(mixtral())
    with pytest.raises(ValueError, match="adapter_names cannot be used with target_parameters"):
        logits(model, adapter_names=["default", "other", "default"])


def test_offloaded_parameter_is_refused():
    model = wrap(mixtral())
    for layer in wrappers(model).values():
        layer.get_base_layer().to("meta")
    with pytest.raises(RuntimeError, match=r"the weight is offloaded.*give its module a device"):
        logits(model)


def afmoe(**options):
    """Has an expert beside the others, and gates of attention, with the names that fused experts once had."""
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_dense_layers": 1}
    config = hf.AfmoeConfig(**TEXT, **LLAMA, **sizes, **options)
    return looping(build(hf.AfmoeForCausalLM, config))


def with_dense_layers(**options):
    return qwen(mlp_only_layers=[0, 2], **options)


TAKEN_FOR_EXPERTS = {
    "all layers": (afmoe, {"target_modules": "all-linear"}),
    "layers without experts": (with_dense_layers, {"target_modules": "all-linear"}),
    "one of two that were fused": (with_dense_layers, {"target_modules": ["gate_proj", "q_proj"]}),
    "experts too": (afmoe, {"target_modules": ["up_proj", "down_proj"], "target_parameters": EXPERTS}),
}


@pytest.mark.parametrize(("make", "targets"), TAKEN_FOR_EXPERTS.values(), ids=TAKEN_FOR_EXPERTS)
def test_layers_whose_names_peft_gives_to_experts_are_exported(make, targets, tmp_path):
    """PEFT's LoRA of these names would adapt the experts alone."""
    model = get_peft_model(make(), FLORA.config(**targets, init_weights=False, seed=1)).eval()
    peft_subspace.export_lora(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        served = PeftModel.from_pretrained(make(), tmp_path).eval()
    with torch.no_grad():
        assert distance(served(input_ids=IDS).logits, model(input_ids=IDS).logits) < 1e-5


@pytest.mark.parametrize("known", ["folder", "model"])
def test_merges_of_layers_whose_names_peft_gives_to_experts_are_loaded(known, tmp_path):
    sources = []
    for i, targets in enumerate((["gate_proj", "q_proj"], ["gate_proj", "up_proj"])):
        config = FLORA.config(target_modules=targets, init_weights=False, seed=i)
        sources.append(get_peft_model(with_dense_layers(), config).eval())
        sources[-1].save_pretrained(tmp_path / str(i))
    base = with_dense_layers()
    base.save_pretrained(tmp_path / "base")
    merged = merge(
        [tmp_path / "0", tmp_path / "1"],
        weights=[1.0, 1.0],
        base=tmp_path / "base" if known == "folder" else base,
    )
    if known == "folder":
        merged.to_lora(tmp_path / "merged")
        served = PeftModel.from_pretrained(base, tmp_path / "merged")
    else:
        served = merged.add_to(base, "merged")
    wanted = sources[0].merge_and_unload()
    wanted = PeftModel.from_pretrained(wanted, tmp_path / "1").merge_and_unload().eval()
    with torch.no_grad():
        assert distance(served.eval()(input_ids=IDS).logits, wanted(input_ids=IDS).logits) < 1e-5


def test_quantized_layers_whose_names_peft_gives_to_experts_are_not_exported(tmp_path):
    base = quantized_model(with_dense_layers(), KINDS[0], ("gate_proj",))
    model = get_peft_model(base, FLORA.config(target_modules=["gate_proj"], init_weights=False))
    with pytest.raises(ValueError, match=r"gate_proj \(a name that PEFT gives to experts .* a quantized w"):
        peft_subspace.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
