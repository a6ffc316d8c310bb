"""Programs around PEFT that are not installed here, by stand-ins with the same interface."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model

import models
from peft_subspace import GradientInitCallback, RegularizationCallback

IDS = torch.tensor([[5, 9, 12, 33, 7, 20]])
LM_EVAL = "import peft_subspace, runpy; runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)"
"""What `python -c` gets so that lm-eval, which has no option to import packages, knows the methods."""


def target_options(method):
    return {**method.options, "target_modules": ["q_proj", "v_proj"], "seed": 0}


@pytest.fixture
def plugin(monkeypatch):
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin, base.AdapterCapabilities = object, SimpleNamespace
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "peft_subspace.axolotl", raising=False)
    return importlib.import_module("peft_subspace.axolotl")


@pytest.mark.feature("Axolotl plugin")
def test_axolotl_plugin(method, plugin, tmp_path, record_property):
    record_property(
        "not run", "Axolotl is none of the packages that tests install; a stand-in has its interface"
    )
    ours = plugin.SubspacePlugin()
    assert ours.get_input_args() == "peft_subspace.axolotl.SubspaceArgs"
    fields = plugin.SubspaceArgs(peft_subspace=target_options(method)).peft_subspace
    name = method.name.removesuffix("_r")
    cfg = SimpleNamespace(adapter=name, peft_subspace=fields, lora_model_dir=None)
    assert name in [capabilities.name for capabilities in ours.get_adapter_capabilities()]
    model, config = ours.load_adapter(None, cfg, config_only=True)
    assert model is None
    assert type(config) is method.config_cls
    model, _ = ours.load_adapter(models.llama(), cfg)
    assert model.peft_config["default"].r == config.r
    get_peft_model(
        models.llama(), method.config(init_weights=False, target_modules=["q_proj"])
    ).save_pretrained(tmp_path)
    cfg.lora_model_dir = str(tmp_path)
    for inference in (True, False):
        loaded, _ = ours.load_adapter(models.llama(), cfg, inference=inference)
        assert any(parameter.requires_grad for parameter in loaded.parameters()) != inference
    wanted = {"lora_sb": [GradientInitCallback], "effort": [RegularizationCallback]}.get(name, [])
    assert [type(callback) for callback in ours.add_callbacks_pre_trainer(cfg, model)] == wanted
    assert ours.load_adapter(model, SimpleNamespace(adapter="lora")) is None


def test_lm_eval_by_one_line(method, tmp_path, monkeypatch):
    adapted = get_peft_model(
        models.llama(), method.config(init_weights=False, target_modules=["q_proj"])
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    package = tmp_path / "lm_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys\n"
        "from peft import PeftModel\n"
        "import models\n"
        "options = dict(option.split('=') for option in sys.argv[1:])\n"
        "model = PeftModel.from_pretrained(models.llama(), options['peft'])\n"
        "models.evaluated = model.eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c", f"peft={tmp_path / 'adapter'}"])
    monkeypatch.setattr(models, "evaluated", None, raising=False)
    exec(LM_EVAL, {})
    assert isinstance(models.evaluated, PeftModel)
    assert torch.equal(models.evaluated(IDS).logits, adapted(IDS).logits)
    for name in ("lm_eval", "lm_eval.__main__"):
        sys.modules.pop(name, None)
