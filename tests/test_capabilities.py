"""What PEFT's LoRA supports, feature by feature: it works, or a clear error says why not.

The contract tests look at most of it from all sides; here is what they leave out, and every refusal.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import check_hotswap_configs_compatible, hotswap_adapter

import peft_subspace
from layers import CASES, adapt, tuner_layer
from models import llama
from tables import failing
from test_loading import assert_untouched, snapshot

CASE = {case.name: case for case in CASES}
IDS = torch.arange(3, 18).reshape(3, 5)


@pytest.mark.feature("`dropout`")
def test_dropout(method, record_property):
    if not method.has_dropout:
        with pytest.raises((TypeError, ValueError), match="dropout"):
            method.config(dropout=0.5)
        reason = "the update is a difference of singular triples, or the whole complement"
        record_property("no", f"{reason}: no narrow input to drop (the config refuses it)")
        return
    model = adapt(method, CASE["linear"], dropout=0.5)
    x = CASE["linear"].inputs()
    assert not torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.feature("`alpha_pattern`")
def test_alpha_pattern(method, record_property):
    if not method.has_alpha:
        with pytest.raises(TypeError, match="alpha_pattern"):
            method.config(alpha_pattern={"layer": 5})
        record_property("no", "the update has no scaling `alpha / r`; `set_scale` changes it at run time")
        return
    model = adapt(method, CASE["linear"], r=2, alpha_pattern={"layer": 5})
    assert tuner_layer(model).scaling["default"] == 5 / 2


LORA_ONLY = (
    "use_rslora", "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens",
    "layer_replication", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "arrow_config", "kasa_config",
)  # fmt: skip


@pytest.mark.feature("variants of LoRA (`use_dora`, `use_rslora`, `lora_bias`, …)")
def test_variants_of_lora(method, record_property):
    def check(field):
        assert hasattr(LoraConfig(), field)
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{field}'"):
            method.config(**{field: None})

    assert not failing(LORA_ONLY, check)
    record_property("no", "they change the equation of LoRA (peft/tuners/lora/config.py); this is another")


@pytest.mark.feature("`ensure_weight_tying`")
def test_ensure_weight_tying(method, record_property):
    with pytest.raises(TypeError, match="unexpected keyword argument 'ensure_weight_tying'"):
        method.config(ensure_weight_tying=True)
    record_property(
        "no",
        "PEFT ties adapters of LoRA only (`BaseTuner._add_targets_to_tie`, peft/tuners/tuners_utils.py:1408)",
    )


@pytest.mark.feature("hotswap")
def test_hotswap(method, tmp_path, record_property):
    model = get_peft_model(llama(), method.config(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    message = f"Hotswapping only supports .*LORA.* but {method.config_cls.peft_type_name} was passed"
    with pytest.raises(ValueError, match=message):
        check_hotswap_configs_compatible(model.peft_config["default"], model.peft_config["default"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(tmp_path), "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    record_property("no", "PEFT swaps LoRA only (`CONFIG_KEYS_TO_CHECK`, peft/utils/hotswap.py:34)")


@pytest.mark.feature("tensor parallel base")
def test_tensor_parallel(method, record_property):
    model = llama()
    model._tp_size = 2
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"split over 2 devices .*LoRA only; load the model without"):
        get_peft_model(model, method.config(target_modules=["q_proj"]))
    assert_untouched(model, before)
    record_property(
        "no", "PEFT shards adapters of LoRA only (`add_lora_tp_hooks_dtensor`, peft/tuners/lora/model.py:130)"
    )


@pytest.mark.feature("start from gradients of the data (as LoRA-GA, EVA)")
def test_start_from_gradients(method, record_property):
    model = get_peft_model(llama(), method.config(target_modules=["q_proj"]))
    batches = [{"input_ids": IDS, "labels": IDS}]
    if method.name != "lora_sb":
        with pytest.raises(ValueError, match="is of a method that does not start from gradients"):
            peft_subspace.initialize_from_gradient(model, batches, learning_rate=1e-3, progress=False)
        record_property("no", "the method starts from the weight, or with an update of zero")
        return
    before = model.eval()(input_ids=IDS, labels=IDS).loss
    peft_subspace.initialize_from_gradient(model, batches, learning_rate=1e-3, progress=False)
    assert model(input_ids=IDS, labels=IDS).loss < before
