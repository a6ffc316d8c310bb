"""Whole models as transformers' quantizers, and HQQ's own, load them: train, save, load and merge."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    HqqConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import peft_subspace
from layers import distance
from models import LLAMA, TEXT, build
from peft_subspace.tuner.layer import SubspaceLayer
from quantized import BNB4, BNB8, HQQ, TORCHAO, WARNINGS, assert_same_parts, parts

pytestmark = [
    WARNINGS,
    pytest.mark.filterwarnings(
        "ignore:.*pin_memory.*",  # torch's loader, where there is no accelerator
        "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning",  # PEFT asks for it by this name
        "ignore:Config Deprecation. _default is deprecated:UserWarning",  # torchao says so of any FqnToConfig
    ),
]


def transformers(folder, config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


def bnb4(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return transformers(folder, config)


def bnb8(folder):
    return transformers(folder, BitsAndBytesConfig(load_in_8bit=True))


def torchao(folder):
    return transformers(folder, TorchAoConfig(Int8WeightOnlyConfig()))


def hqq(folder):
    return copy.deepcopy(_hqq(folder))


@functools.cache
def _hqq(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
    return model.eval()


# How a model is loaded, what rounding a merged weight does to its outputs, and what kernels differ by:
# bitsandbytes evaluates layers in 4 bits in bf16, but none of a model with adapters, as that repacks weights.
LOADERS = [
    pytest.param(bnb4, 0.2, 1e-2, marks=pytest.mark.feature(BNB4), id="bnb4"),
    pytest.param(bnb8, 0.05, 1e-6, marks=pytest.mark.feature(BNB8), id="bnb8"),
    pytest.param(torchao, 0.02, 1e-6, marks=pytest.mark.feature(TORCHAO), id="torchao"),
    pytest.param(hqq, 0.2, 1e-6, marks=pytest.mark.feature(HQQ), id="hqq"),
]
IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    # Where a CPU evaluates in bf16, bitsandbytes takes weights in 4 bits in blocks of 32 by 64 only.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    build(LlamaForCausalLM, LlamaConfig(**TEXT, **{**LLAMA, **sizes})).save_pretrained(folder)
    return folder


def adapted(method, base, **options):
    return get_peft_model(base, method.config(target_modules=["q_proj", "v_proj"], seed=3, **options))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def layers(model):
    return {name: m.get_base_layer() for name, m in model.named_modules() if isinstance(m, SubspaceLayer)}


def train(model, folder):
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(("load", "rounding", "kernels"), LOADERS)
def test_train_save_load_merge_and_unmerge(method, load, rounding, kernels, saved, tmp_path):
    model = adapted(method, load(saved))
    before = {name: parts(layer) for name, layer in layers(model).items()}
    with model.disable_adapter():
        base = logits(model)
    assert distance(base, logits(load(saved))) < kernels
    assert distance(logits(model), base) < 1e-6
    losses = train(model, tmp_path / "run")
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert distance(trained, base) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path / "adapter")
    for read in (PeftModel.from_pretrained, peft_subspace.load):
        assert distance(logits(read(load(saved), tmp_path / "adapter")), trained) < 1e-6
    model.merge_adapter()
    assert distance(logits(model), trained) < rounding
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    for name, layer in layers(model).items():
        assert_same_parts(parts(layer), before[name])
    assert distance(logits(model.merge_and_unload()), trained) < rounding


@pytest.mark.parametrize(("load", "rounding", "kernels"), LOADERS[:3])
def test_merged_model_is_saved_and_loaded_by_transformers(method, load, rounding, kernels, saved, tmp_path):
    merged = adapted(method, load(saved), init_weights=False).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    for name, module in again.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert torch.equal(parts(module)["codes"], parts(merged.get_submodule(name))["codes"]), name
    assert distance(logits(again), logits(merged)) < kernels


@pytest.mark.parametrize(("load", "rounding", "kernels"), LOADERS)
def test_base_prepared_for_training_with_checkpointing(method, load, rounding, kernels, saved):
    """PEFT freezes the base, keeps norms in fp32, and turns gradient checkpointing on."""
    base = load(saved)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adapted(method, base, init_weights=False).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.feature(BNB4)
@pytest.mark.parametrize(("evaluated", "limit"), [("wrapped", 1e-6), ("base", 0.2)])
def test_gradients_after_an_evaluation_pass_all_layers(method, evaluated, limit, saved):
    """Except layers without adapter, whose weights bitsandbytes has repacked to evaluate them."""
    base = bnb4(saved)
    if evaluated == "base":
        logits(base)
    model = adapted(method, base, init_weights=False)
    if evaluated == "wrapped":
        logits(model)
    fresh = adapted(method, bnb4(saved), init_weights=False)
    for net in (model, fresh):
        net.train()(IDS, labels=IDS).loss.backward()
    wanted = dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert distance(parameter.grad, wanted[name].grad) < limit, name


@pytest.mark.feature(TORCHAO)
def test_settings_by_layer_train_but_do_not_merge(method, saved):
    """`FqnToConfig` says by full name how a layer is quantized, and PEFT hands torchao the layer alone."""
    config = TorchAoConfig(FqnToConfig({r"re:.*_proj": Int8WeightOnlyConfig()}))
    model = adapted(method, transformers(saved, config), init_weights=False)
    before = logits(model)
    assert distance(before, logits(torchao(saved))) > 1e-3
    with pytest.raises(TypeError, match=r"q_proj: torchao weights cannot be rewritten.*with one setting"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


@pytest.mark.feature(HQQ)
def test_transformers_does_not_load_hqq_models_yet(saved):
    """The day that it does, the loader above should be the one that users have."""
    with pytest.raises(NotImplementedError, match="HQQ is not available yet"):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=HqqConfig(nbits=4, group_size=32))
