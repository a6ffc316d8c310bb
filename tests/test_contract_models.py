"""What every method promises on whole models: targets, other training, generation, saving, loading."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig

import peft_subspace
from layers import Net, distance
from models import ARCHITECTURES, bert, convnext, gemma, gpt2, llama, resnet, t5
from peft_subspace.tuner.layer import SubspaceLayer

IDS = torch.arange(3, 18).reshape(3, 5)
TARGETS = ["q_proj", "v_proj"]


def adapted(model):
    """Names of the adapted modules, without the wrappers'."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, SubspaceLayer)
    }


def last_parts(names):
    return {name.rpartition(".")[2] for name in names}


def logits(model, inputs=None, **options):
    inputs = {"input_ids": IDS} if inputs is None else inputs
    with torch.no_grad():
        return model(**inputs, **options).logits


def wrap(method, model=None, adapter="default", **options):
    options = {"target_modules": TARGETS, "init_weights": False, "seed": 1, **options}
    return get_peft_model(model or llama(), method.config(**options), adapter)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def two_adapters(method, model=None, **options):
    model = wrap(method, model, **options)
    options = {"target_modules": TARGETS, "init_weights": False, "seed": 2, **options}
    model.add_adapter("other", method.config(**options))
    return model.eval()


# --------------------------------------------------------------------------------------- target_modules


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.feature("default `target_modules` of known architectures")
def test_known_architectures_need_no_target_modules(method, architecture):
    model = architecture.build()
    inputs = architecture.inputs()
    before = logits(model, inputs)
    model = get_peft_model(model, method.config(target_modules=None, init_weights=False))
    assert adapted(model)
    if architecture.defaults:
        assert last_parts(adapted(model)) == set(architecture.defaults)
    assert not torch.equal(logits(model, inputs), before)
    loss = model(**inputs).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_unknown_architecture_without_target_modules_is_refused(method):
    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), method.config(target_modules=None))


@pytest.mark.parametrize("targets", [["layer"], "layer", "lay.*"])
def test_default_targets_that_are_added_to_pefts_table_are_used(method, targets, monkeypatch):
    monkeypatch.setitem(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "stranger", targets)
    model = Net(torch.nn.Linear(12, 10))
    model.config = PretrainedConfig()
    model.config.model_type = "stranger"
    assert get_peft_model(model, method.config()).targeted_module_names == ["layer"]


@pytest.mark.parametrize("architecture", ARCHITECTURES[:6], ids=str)
@pytest.mark.feature('`"all-linear"`')
def test_all_linear_adapts_every_linear_layer_but_the_head(method, architecture):
    model = architecture.build()
    linear = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    heads = {"lm_head"}
    model = get_peft_model(model, method.config(target_modules="all-linear"))
    assert adapted(model) == linear - heads
    model.add_adapter("second", method.config(target_modules="all-linear"))
    assert all("second" in m.deltas for m in model.modules() if isinstance(m, SubspaceLayer))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, r".*\.q_proj"),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, r".*layers\.1\.mlp\.up_proj"),
        ({"target_modules": r".*layers\.[02]\..*(k|o)_proj"}, r".*layers\.[02]\..*(k|o)_proj"),
        ({"target_modules": TARGETS, "exclude_modules": ["v_proj"]}, r".*\.q_proj"),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, r".*self_attn.*"),
        ({"target_modules": TARGETS, "layers_to_transform": 1}, r".*layers\.1\..*[qv]_proj"),
        ({"target_modules": ["up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
         r".*layers\.[02]\..*up_proj"),
        ({"target_modules": ["lm_head"]}, r"lm_head"),
    ],
)  # fmt: skip
@pytest.mark.feature("`exclude_modules`, `layers_to_transform`")
def test_targets_are_chosen_as_in_peft(method, options, expected):
    model = llama()
    wanted = {
        n for n, m in model.named_modules()
        if re.fullmatch(expected, n) and type(m).__name__ in ("Linear", "Embedding")
    }  # fmt: skip
    assert adapted(wrap(method, model, **options)) == wanted
    assert wanted


@pytest.mark.feature("`exclude_modules`, `layers_to_transform`")
def test_embeddings_are_targets_as_in_peft(method):
    model = wrap(method, llama(), target_modules=["embed_tokens", "lm_head"])
    assert adapted(model) == {"model.embed_tokens", "lm_head"}


@pytest.mark.feature('`"all-linear"`')
def test_all_linear_leaves_the_classifier_of_its_task_out(method):
    model = wrap(method, bert(), target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    assert "dense" in last_parts(adapted(model))
    assert "classifier" not in last_parts(adapted(model))


def test_no_matching_module_is_an_error(method):
    for name in ("absent", "proj"):  # the end of a name, but none of its parts
        with pytest.raises(ValueError, match=r"[Tt]arget modules .*not found"):
            wrap(method, target_modules=[name])


def rank(layer):
    """Rank next to the input, the same for every kind of chain."""
    return layer.deltas["default"].factors()[-1].shape[0]


@pytest.mark.feature("`rank_pattern`")
def test_rank_and_alpha_patterns_apply_to_the_modules_they_name(method):
    options = {"r": 2, "rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 1}}
    if method.has_alpha:
        options |= {"alpha": 4, "alpha_pattern": {"v_proj": 5}}
    model = wrap(method, **options)
    sizes, scalings = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLayer):
            sizes[name] = rank(module)
            scalings[name.removeprefix("base_model.model.model.layers.")] = module.scaling["default"]
    plain = wrap(method, r=2)
    counts = {name: rank(m) for name, m in plain.named_modules() if isinstance(m, SubspaceLayer)}
    larger = {name for name in sizes if sizes[name] > counts[name]}
    smaller = {name for name in sizes if sizes[name] < counts[name]}
    assert larger == {name for name in sizes if name.endswith("q_proj")}
    assert smaller == {name for name in sizes if name.endswith("1.self_attn.v_proj")}
    if method.has_alpha:
        assert scalings["0.self_attn.q_proj"] == pytest.approx(4 / 3)
        assert scalings["0.self_attn.v_proj"] == pytest.approx(5 / 2)
        assert scalings["1.self_attn.v_proj"] == pytest.approx(5)


# -------------------------------------------------------------------------------- what trains besides


@pytest.mark.feature("`bias`")
def test_bias_options_train_the_biases_they_name(method):
    def biases(bias):
        model = wrap(method, bert(), target_modules=["query", "value"], bias=bias)
        return {name for name in trained(model) if name.endswith("bias")}

    assert not biases("none")
    assert biases("all") == {
        n
        for n, _ in wrap(method, bert(), target_modules=["query", "value"]).named_parameters()
        if n.endswith("bias")
    }
    own = biases(f"{method.prefix}only")
    assert own
    assert all(re.search(r"(query|value)\.base_layer\.bias$", name) for name in own)


@pytest.mark.parametrize("bias", ["all", "own"])
@pytest.mark.feature("`bias`")
def test_trained_biases_are_saved_and_loaded(method, bias, tmp_path):
    bias = f"{method.prefix}only" if bias == "own" else bias
    options = {"target_modules": ["query", "value"], "bias": bias}
    model = wrap(method, bert(), **options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.feature("`modules_to_save`")
def test_modules_to_save_are_trained_saved_and_loaded(method, tmp_path):
    model = wrap(method, modules_to_save=["lm_head"]).eval()
    head = [name for name in trained(model) if "lm_head.modules_to_save.default" in name]
    assert head
    for name in head:
        model.get_parameter(name).data.normal_()
    model.save_pretrained(tmp_path)
    for again in (PeftModel.from_pretrained(llama(), tmp_path), peft_subspace.load(llama(), tmp_path)):
        assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("tokens", [[4, 7], {"embed_tokens": [4, 7]}])
@pytest.mark.feature("`trainable_token_indices`")
def test_trainable_tokens_are_trained_saved_and_loaded(method, tokens, tmp_path):
    model = wrap(method, trainable_token_indices=tokens).eval()
    names = [name for name in trained(model) if "token_adapter.trainable_tokens_delta" in name]
    assert names
    for name in names:
        model.get_parameter(name).data.normal_()
    assert distance(logits(model), logits(wrap(method).eval())) > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.feature("`modules_to_save`")
def test_task_types_keep_the_head_that_peft_adds(method, tmp_path):
    model = wrap(method, bert(), target_modules=["query"], task_type=TaskType.SEQ_CLS)
    assert any("classifier.modules_to_save" in name for name in trained(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))


# ------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", [llama, gpt2, t5], ids=["llama", "gpt2", "t5"])
@pytest.mark.feature("one adapter per sample of a batch")
def test_each_sample_generates_with_its_own_adapter(method, build, beams):
    targets = {"gpt2": ["c_attn", "c_fc", "wte"], "t5": ["q", "v", "wi", "shared"]}.get(
        build.__name__, [*TARGETS, "up_proj", "embed_tokens"]
    )
    model = two_adapters(method, build(), target_modules=targets)
    for layer in (module for module in model.modules() if isinstance(module, SubspaceLayer)):
        layer.scale_layer(40)  # so that other tokens are generated by some
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    names = ["other", "__base__", "default"]
    mixed = model.generate(**prompt, adapter_names=names, **options)
    rows = []
    for row, name in enumerate(names):
        one = {key: value[[row]] for key, value in prompt.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model.generate(**one, **options))
        else:
            model.set_adapter(name)
            rows.append(model.generate(**one, **options))
    assert torch.equal(mixed, torch.cat(rows))
    options |= {"output_logits": True, "return_dict_in_generate": True}
    own, base = (model.generate(**prompt, adapter_names=n, **options) for n in (names, ["__base__"] * 3))
    assert distance(own.logits[0], base.logits[0]) > 1e-2


@pytest.mark.feature("one adapter per sample of a batch")
def test_mixed_batch_works_on_every_layer_of_a_model(method):
    model = two_adapters(
        method, convnext(), target_modules=["dwconv", "pwconv1", "pwconv2", "patch_embeddings"]
    )
    x = torch.randn(3, 3, 32, 32)
    names = ["default", "__base__", "other"]
    result = logits(model, {"pixel_values": x}, adapter_names=names)
    base = logits(convnext(), {"pixel_values": x})
    assert distance(result[1], base[1]) < 1e-5
    for row, name in ((0, "default"), (2, "other")):
        model.set_adapter(name)
        assert distance(result[row], logits(model, {"pixel_values": x})[row]) < 1e-5
        assert distance(result[row], base[row]) > 1e-3


@pytest.mark.feature("one adapter per sample of a batch")
def test_mixed_batch_uses_each_adapters_own_modules_to_save(method):
    model = two_adapters(method, modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "lm_head.modules_to_save.other" in name:
            parameter.data.normal_()
    result = logits(model, adapter_names=["default", "__base__", "other"])
    model.set_adapter("other")
    assert distance(result[2], logits(model)[2]) < 1e-5
    with model.disable_adapter():
        assert distance(result[1], logits(model)[1]) < 1e-5


# -------------------------------------------------------------------------------------- training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("build", [llama, gpt2, t5], ids=["llama", "gpt2", "t5"])
@pytest.mark.feature("gradient checkpointing (reentrant and not)")
def test_gradients_are_the_same_with_gradient_checkpointing(method, build, reentrant):
    targets = {"gpt2": ["c_attn"], "t5": ["q", "v"]}.get(build.__name__, TARGETS)

    def gradients(checkpointing):
        model = wrap(method, build(), target_modules=targets).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS, **({} if build is t5 else {"use_cache": False})).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert distance(checkpointed[name], gradient) < 1e-4, name


def test_training_a_whole_model_lowers_the_loss(method):
    model = wrap(method, init_weights=True, r=8).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def test_compiled_model_gives_the_same_outputs(method):
    torch._dynamo.reset()
    model = wrap(method).eval()
    compiled = torch.compile(model, backend="eager")
    assert distance(logits(compiled), logits(model)) < 1e-5


# ------------------------------------------------------------------------------- status, copy, merge


@pytest.mark.feature("`get_model_status`")
def test_model_status_names_the_method_and_its_adapters(method):
    model = two_adapters(method)
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.peft_types == dict.fromkeys(("default", "other"), method.config_cls.peft_type_name)
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"]
    assert status.enabled is True
    assert status.merged_adapters == []
    # PEFT looks for parameters in the layers only.
    assert status.requires_grad == {"default": True, "other": False}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.num_adapter_layers == len(adapted(model)) == 6
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    for layer in model.get_layer_status():
        assert layer.available_adapters == ["default", "other"]


@pytest.mark.feature("`merge_and_unload`, `unload`")
def test_merged_model_gives_the_same_logits_everywhere(method):
    for architecture in ARCHITECTURES:
        model = get_peft_model(
            architecture.build(), method.config(target_modules=None, init_weights=False)
        ).eval()
        for module in model.modules():
            if isinstance(
                module, SubspaceLayer
            ):  # updates many times larger than weights make chaos of depth
                module.set_scale("default", 0.1)
        inputs = architecture.inputs()
        before = logits(model, inputs)
        assert distance(logits(model.merge_and_unload(), inputs), before) < 1e-4, architecture


def test_copied_model_trains_apart_from_the_original(method):
    model = two_adapters(method)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    twin(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1.0).step()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_adapter_of_the_same_config_object_starts_from_the_same_frozen_tensors(method):
    model = llama()
    config = method.config(target_modules=TARGETS)
    model = get_peft_model(model, config)
    model.add_adapter("ref", config)
    for module in model.modules():
        if isinstance(module, SubspaceLayer):
            first, second = (dict(module.deltas[name].named_buffers()) for name in ("default", "ref"))
            assert first.keys() == second.keys()
            for name, buffer in first.items():
                assert torch.equal(buffer, second[name])
                assert buffer.data_ptr() != second[name].data_ptr()


def test_adapter_on_a_tied_embedding_leaves_the_head_alone(method):
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT's word of caution
        model = wrap(method, gemma(), target_modules=["embed_tokens"]).eval()
    base = gemma()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    inputs = model.get_base_model().model.embed_tokens(IDS)
    plain = base.model.embed_tokens(IDS)
    assert distance(inputs, plain) > 1e-2
    assert distance(model.base_model.model.lm_head(plain), base.lm_head(plain)) < 1e-6


# ----------------------------------------------------------------------------------- save and load


def test_saved_file_holds_the_adapter_and_nothing_else(method, tmp_path):
    model = wrap(method)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert state
    assert all(re.search(rf"\.{method.prefix}\w+\.\w+$", key) for key in state)
    assert sum(t.numel() for t in state.values()) >= sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


@pytest.mark.feature("`AutoPeftModel…`")
def test_auto_classes_of_peft_load_adapter_and_base(method, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = wrap(method, model, task_type=TaskType.CAUSAL_LM).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert type(config) is method.config_cls


@pytest.mark.feature("several adapters, several active ones")
def test_several_adapters_are_saved_in_folders_and_loaded_back(method, tmp_path):
    model = two_adapters(method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(logits(again), logits(model))


def test_loading_runs_no_initialization_from_the_weight(method, tmp_path, monkeypatch):
    model = wrap(method).eval()
    model.save_pretrained(tmp_path)

    def forbidden(*args, **kwargs):
        raise AssertionError("loading must not compute anything from the base weight")

    for module in model.modules():
        if isinstance(module, SubspaceLayer):
            monkeypatch.setattr(type(module.deltas["default"]), "reset_from_weight", forbidden)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.feature("transformers' `add_adapter`, `load_adapter`, `delete_adapter`")
def test_transformers_adds_saves_loads_switches_and_deletes_adapters(method, tmp_path):
    model = llama()
    base = logits(model)
    model.add_adapter(method.config(target_modules=TARGETS, init_weights=False), adapter_name="mine")
    changed = logits(model)
    assert distance(changed, base) > 1e-3
    model.save_pretrained(tmp_path)

    again = llama()
    again.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(logits(again), changed)
    again.disable_adapters()
    assert torch.equal(logits(again), base)
    again.enable_adapters()
    again.load_adapter(str(tmp_path), adapter_name="second")
    again.set_adapter("second")
    assert again.active_adapters() == ["second"]
    assert torch.equal(logits(again), changed)
    again.delete_adapter("loaded")
    assert torch.equal(logits(again), changed)
    assert not [name for name in again.state_dict() if ".loaded." in name]
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), changed)


@pytest.mark.feature("transformers' `add_adapter`, `load_adapter`, `delete_adapter`")
def test_transformers_loads_base_and_adapter_from_one_folder(method, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = wrap(method, model).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.feature("`inject_adapter_in_model`")
def test_injected_adapter_works_without_a_wrapper(method):
    model = resnet()
    x = {"pixel_values": torch.randn(2, 3, 32, 32)}
    config = method.config(target_modules=["convolution"], init_weights=False, seed=1)
    before = logits(model, x)
    model = inject_adapter_in_model(config, model)
    assert distance(logits(model, x), before) > 1e-3
    state = peft.get_peft_model_state_dict(model)
    fresh = inject_adapter_in_model(config, resnet(), low_cpu_mem_usage=True)
    peft.set_peft_model_state_dict(fresh, state, low_cpu_mem_usage=True)
    assert torch.equal(logits(fresh.eval(), x), logits(model, x))
    assert not any(p.is_meta for p in fresh.parameters())


def test_model_card_shows_the_import(method, tmp_path):
    wrap(method).save_pretrained(tmp_path)
    assert "import peft_subspace" in (tmp_path / "README.md").read_text()


@pytest.mark.feature("save and load, `low_cpu_mem_usage`")
def test_loading_twice_with_low_memory_use_leaves_nothing_on_meta(method, tmp_path):
    model = two_adapters(method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    again.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in [*again.parameters(), *again.buffers()])
    again.set_adapter("other")
    model.set_adapter("other")
    assert torch.equal(logits(again), logits(model))


# ------------------------------------------------------------------------------------- LoRA export


@pytest.mark.parametrize("build", [llama, gpt2, bert, resnet], ids=["llama", "gpt2", "bert", "resnet"])
@pytest.mark.feature("exact LoRA export")
def test_exported_model_gives_the_same_logits_in_peft(method, build, tmp_path):
    targets = {
        "gpt2": ["c_attn", "c_fc", "wte"],
        "bert": ["query", "word_embeddings", "dense"],
        "resnet": ["convolution"],
    }.get(build.__name__, ["q_proj", "down_proj", "embed_tokens"])
    model = wrap(method, build(), target_modules=targets, rank_pattern={targets[0]: 1}).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if build is resnet else None
    peft_subspace.export_lora(model, tmp_path)
    served = PeftModel.from_pretrained(build(), tmp_path)
    assert distance(logits(served, inputs), logits(model, inputs)) < 1e-5
    assert distance(logits(served, inputs), logits(build(), inputs)) > 1e-3
    config, state = peft_subspace.lora_state_dict(model)
    assert {t.shape[0] for key, t in state.items() if "lora_A" in key} <= {config.r}
    assert served.peft_config["default"].lora_alpha == config.r


@pytest.mark.feature("exact LoRA export")
def test_exported_adapter_keeps_its_biases_heads_and_tokens(method, tmp_path):
    options = {"modules_to_save": ["classifier"], "bias": "all", "target_modules": ["query"]}
    model = wrap(method, bert(), **options).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("bias" in name or "classifier" in name):
            parameter.data.normal_()
    peft_subspace.export_lora(model, tmp_path)
    assert distance(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model)) < 1e-5


def test_export_chooses_the_adapter_it_is_asked_for(method, tmp_path):
    model = two_adapters(method)
    peft_subspace.export_lora(model, tmp_path, "other")
    model.set_adapter("other")
    assert distance(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model)) < 1e-5
    with pytest.raises(ValueError, match="adapter_name='absent' is no adapter of peft_subspace"):
        peft_subspace.lora_state_dict(model, "absent")


@pytest.mark.feature("PEFT's `convert_to_lora`")
def test_pefts_own_conversion_to_lora_agrees(method):
    model = wrap(method).eval()
    own_config, own_state = peft_subspace.lora_state_dict(model)
    config, state = peft.convert_to_lora(model, rank=own_config.r)
    assert config.peft_type == own_config.peft_type
    for key in own_state:
        if "lora_A" in key:
            partner = key.replace("lora_A", "lora_B")
            pairs = [(s[partner] @ s[key]).float() for s in (state, own_state)]
            assert distance(*pairs) < 1e-4


# ------------------------------------------------------------------------------ combination refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["absent"], [1.0], "sum"), r"adapters=\['absent'\] must name adapters of the model"),
        (([], [], "sum"), r"adapters=\[\] must name adapters"),
        ((["default"], [1.0, 2.0], "sum"), r"weights=\[1.0, 2.0\] must have one entry for each of adapters"),
        ((["default"], [1.0], "other"), "adapter_name='other' exists already; choose a new name"),
        (
            (["default"], [1.0], "sum", "mean"),
            r"combination_type='mean' must be one of \('cat', 'linear', ",
        ),
    ],
)
def test_combinations_that_do_not_fit_are_refused(method, arguments, message):
    model = two_adapters(method)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default", "other"}


def test_combination_of_adapters_that_train_more_than_an_update_is_refused(method):
    model = wrap(method, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"trains more than its update .*lora_state_dict"):
        model.add_weighted_adapter(["default"], [2.0], "sum")


def test_combined_adapter_of_a_whole_model_is_the_sum_and_reloads(method, tmp_path):
    model = wrap(method, target_modules=["q_proj", "up_proj"])
    targets = ["q_proj", "embed_tokens"]
    options = {"target_modules": targets, "init_weights": False, "seed": 2}
    options |= {"r": 3} if method.config().r else {}
    model.add_adapter("other", method.config(**options))
    model.eval().add_weighted_adapter(["default", "other"], [0.5, -1.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "sum")), logits(model))
    for module in model.modules():
        if isinstance(module, SubspaceLayer):
            parts = {"default": 0.5, "other": -1.0}
            wanted = sum(w * module.get_delta_weight(n) for n, w in parts.items() if n in module.deltas)
            assert distance(module.get_delta_weight("sum"), wanted) < 1e-5
