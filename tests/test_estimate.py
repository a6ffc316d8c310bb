"""Costs that are estimated without weights are the real ones."""

from __future__ import annotations

import json
import resource
import time

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

import peft_subspace
from layers import Net
from methods import METHODS
from models import LLAMA, TEXT, bert, gpt2, llama, mobilenet, resnet
from peft_subspace import estimate
from test_loading import snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

MODELS = {
    "llama": (llama, ["q_proj", "k_proj", "down_proj", "embed_tokens"], {}),
    "llama-bf16": (lambda: llama().bfloat16(), ["q_proj", "up_proj"], {"modules_to_save": ["lm_head"]}),
    "llama-tokens": (llama, ["q_proj"], {"trainable_token_indices": [3, 5]}),
    "bert-biases": (bert, ["query", "dense"], {"bias": "all", "task_type": "SEQ_CLS"}),
    "gpt2": (gpt2, ["c_attn", "c_fc"], {}),
    "resnet": (resnet, ["convolution"], {}),
    "depthwise": (mobilenet, ["convolution"], {}),
}


def config_for(method, name, **options):
    _, targets, more = MODELS[name]
    return method.config(**{"target_modules": targets, **more, **options})


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.feature("estimate of costs without weights")
@pytest.mark.parametrize("name", MODELS)
def test_estimate_equals_the_real_adapter(method, name, tmp_path):
    found = estimate(MODELS[name][0](), config_for(method, name))
    model = get_peft_model(MODELS[name][0](), config_for(method, name))
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(trained(model))
    sum(p.sum() for p in trained(model)).backward()
    optimizer.step()

    total = found.total
    assert total.trained == sum(p.numel() for p in trained(model))
    assert total.gradient_bytes == sum(p.grad.nbytes for p in trained(model))
    states = [t for state in optimizer.state.values() for t in state.values()]
    assert total.optimizer_bytes == sum(t.nbytes for t in states)
    path = tmp_path / "adapter_model.safetensors"
    assert found.file_bytes == path.stat().st_size
    assert found.header_bytes == 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert found.base == sum(p.numel() for p in MODELS[name][0]().parameters())


def test_model_and_config_are_left_alone(method):
    model = llama()
    before = snapshot(model)
    regularized = {"orthogonality_weight": 1.0} if method.name == "effort" else {}  # adds a hook to a model
    config = config_for(method, "llama", target_modules="all-linear", **regularized)
    fields = config.to_dict()
    estimate(model, config)
    assert config.to_dict() == fields
    modules, state, requires_grad = snapshot(model)
    assert (modules, requires_grad) == (before[0], before[2])
    assert all(torch.equal(state[key], before[1][key]) for key in before[1])
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hasattr(model, "peft_config")


def test_folder_is_enough_without_any_weights(method, tmp_path):
    config = transformers.LlamaConfig(**TEXT, **LLAMA, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    found = estimate(tmp_path, config_for(method, "llama"))
    assert found == estimate(llama(), config_for(method, "llama"))


def test_rows_are_kinds_of_layers_and_add_up():
    method = next(m for m in METHODS if m.name == "flora")
    found = estimate(llama(), method.config(target_modules=["q_proj", "k_proj"], modules_to_save=["lm_head"]))
    assert {name: cost.modules for name, cost in found.rows.items()} == {
        "q_proj Linear 16x16": 3,
        "k_proj Linear 8x16": 3,
        "lm_head": 0,
    }
    assert found.rows["q_proj Linear 16x16"].trained == 3 * (2 * 2 + 2 * 16 + 2 * 16)
    assert found.rows["lm_head"].trained == 16 * 37
    lines = str(found).splitlines()
    assert lines[0].startswith(f"FLORA on LlamaForCausalLM: {found.total.trained:,} trainable parameters, ")
    assert f"file {found.file_bytes:,} bytes" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == [*found.rows, "all"]


def test_what_trains_and_what_is_saved_of_it_share_a_row_with_a_name(method):
    rows = estimate(llama(), config_for(method, "llama", modules_to_save=["lm_head"])).rows
    assert all(name and cost.frozen >= 0 for name, cost in rows.items())


def test_frozen_numbers_are_counted_apart():
    method = next(m for m in METHODS if m.name == "lora_sb")
    found = estimate(Net(nn.Linear(7, 5)), method.config(r=3)).total
    assert (found.trained, found.frozen, found.modules) == (3 * 3, 3 * (7 + 5), 1)


@pytest.mark.parametrize("r", [None, 3], ids=["full", "r"])
@pytest.mark.parametrize("preserve", [0, 2, 4])
def test_file_of_continual_svd_follows_its_published_formula(r, preserve):
    """The formula is in the module's docstring and in the model card."""
    m, n, k = 6, 5, preserve
    config = peft_subspace.ContinualSVDConfig(r=r, preserve=preserve, target_modules=["layer"])
    whole = (m - k) * (n - k) + m * min(k, m - k) + n * min(k, n - k)
    numbers = (r * (m + n) if r else whole) + 6
    assert estimate(Net(nn.Linear(n, m)), config).total.tensor_bytes == 4 * numbers


@pytest.mark.parametrize("kind", ["4bit", "4bit-double", "8bit"])
def test_quantized_base_counts_as_a_plain_one_and_is_left_alone(method, kind, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    net = Net(nn.Linear(128, 32))
    if kind == "8bit":
        net.layer = bnb.nn.Linear8bitLt(128, 32, has_fp16_weights=False)
    else:
        net.layer = bnb.nn.Linear4bit(128, 32, compress_statistics=kind == "4bit-double")
    net.layer.load_state_dict(nn.Linear(128, 32).state_dict())
    net = net.to("cpu")
    weight, codes = net.layer.weight, net.layer.weight.data.clone()
    found = estimate(net, method.config())
    assert net.layer.weight is weight
    assert torch.equal(weight.data, codes)
    model = get_peft_model(net, method.config())
    model.save_pretrained(tmp_path)
    assert found.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found.total.trained == sum(p.numel() for p in trained(model))
    assert found == estimate(Net(nn.Linear(128, 32)), method.config())


def test_model_with_adapters_is_refused(method):
    model = get_peft_model(llama(), config_for(method, "gpt2", target_modules=["q_proj"]))
    for adapted in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"has adapters already; give the base model \(model.unload"):
            estimate(adapted, config_for(method, "llama"))


@pytest.mark.parametrize("name", ["OwnModel", "pipeline"])
def test_folder_of_an_unknown_architecture_is_refused(name, tmp_path):
    transformers.LlamaConfig(**TEXT, **LLAMA, architectures=[name]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"transformers .* has no model '{name}'; choose another model"):
        estimate(tmp_path, peft_subspace.FLoRAConfig())


def test_llama_of_a_billion_numbers_takes_seconds_and_almost_no_memory(method, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate(tmp_path, method.config_cls(target_modules="all-linear"))
    assert found.base == 1_235_814_400
    assert found.total.modules == 16 * 7
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB
    json.dumps({name: vars(cost) for name, cost in found.rows.items()})


def test_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"config of the base model .* cannot be read \(.*\); give the folder"
    ):
        estimate(tmp_path, peft_subspace.FLoRAConfig())
