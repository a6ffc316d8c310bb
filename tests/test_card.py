"""The model card: completed on every save path, and nothing that others wrote is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers import Trainer, TrainingArguments

import peft_subspace
from models import llama
from peft_subspace.persistence.card import equation_of
from peft_subspace.tuner.config import SubspaceConfig

pytestmark = pytest.mark.feature("model card")

DATA = """---
language: en
license: mit
datasets:
- fancyzhx/ag_news
model-index:
- name: mine
  results:
  - task:
      type: text-classification
    dataset:
      name: AG News
      type: fancyzhx/ag_news
    metrics:
    - type: accuracy
      value: 0.93
      name: Accuracy
---
# Mine

Some words of my own.
"""


def adapted(method, name="default", **options):
    config = method.config(target_modules=["q_proj"], **{"init_weights": False, "seed": 1, **options})
    return get_peft_model(llama(), config, name)


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def assert_complete(card, method):
    name = method.config_cls.peft_type_name
    assert card.text.count("import peft_subspace  #") == 1
    assert card.text.count("<!-- peft_subspace -->") == 2
    assert f"`KeyError: '{name}'`" in card.text
    assert re.search(r"\| Method \| [\w -]+: `ΔW", card.text)
    assert re.search(r"\| Reference \| .*arXiv \d{4}\.\d{5}", card.text)
    assert {"peft", "peft_subspace", method.config_cls.__name__[:-6].lower()} <= set(card.data.tags)
    assert len(card.data.tags) == len(set(card.data.tags))
    assert card.data.library_name == "peft"


def trainable_parameters(model):
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"| Trainable parameters, heads left out | {count:,} |"


def test_saving_completes_the_card(method, tmp_path):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert_complete(card, method)
    assert trainable_parameters(model) in card.text
    assert "Base model |" not in card.text
    assert card.data.base_model is None
    assert "base_model:adapter:" not in card.data.tags


@pytest.mark.typical("methods")
def test_base_model_is_named(method, tmp_path):
    base = llama()
    base.name_or_path = base.config._name_or_path = "org/base"
    model = get_peft_model(base, method.config(target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.peft_config["default"].save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.base_model == "org/base"
    assert "| Base model | org/base |" in card.text


@pytest.mark.typical("methods")
def test_a_folder_as_base_is_no_metadata_which_the_hub_would_refuse(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("models/base")
    for place in ("models/base", str(tmp_path / "models/base"), "/of/another/machine"):
        model = adapted(method)
        model.peft_config["default"].base_model_name_or_path = place
        model.peft_config["default"].save_pretrained(tmp_path)
        model.create_or_update_model_card(tmp_path)
        model.peft_config["default"].save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert card.data.base_model is None
        assert not [tag for tag in card.data.tags if place in tag]
        assert f"| Base model | {Path(place).name}, a folder |" in card.text


@pytest.mark.typical("methods")
def test_data_results_and_words_of_the_user_stay_and_are_repeated(method, tmp_path):
    (tmp_path / "README.md").write_text(DATA)
    model = adapted(method)
    for _ in range(3):
        model.save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert_complete(card, method)
        assert card.text.count("# Mine\n\nSome words of my own.") == 1
        assert "| Data | fancyzhx/ag_news |" in card.text
        assert "| Results | Accuracy 0.93 (AG News) |" in card.text
        assert card.data.license == "mit"
        assert card.data.eval_results[0].metric_value == 0.93


def test_section_stays_where_the_user_put_it(method, tmp_path):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    mark = "<!-- peft_subspace -->"
    header, section, rest = re.split(f"({mark}.*{mark})", path.read_text(), flags=re.DOTALL)
    path.write_text(f"{header}BEFORE\n\n{section.replace('KeyError', 'Changed')}\n\nAFTER {rest}")
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert_complete(card, method)
    assert 0 <= card.text.index("BEFORE") < card.text.index("import peft_subspace") < card.text.index("AFTER")


def test_half_a_section_costs_no_words(method, tmp_path):
    (tmp_path / "README.md").write_text(DATA + "\n<!-- peft_subspace -->\n\nMore words.\n")
    adapted(method).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert_complete(card, method)
    assert card.text.count("Some words of my own.") == card.text.count("More words.") == 1


@pytest.mark.typical("methods")
def test_each_adapter_gets_a_card_in_its_folder(method, tmp_path):
    model = adapted(method)
    model.add_adapter("other", method.config(target_modules=["k_proj", "o_proj"], seed=2))
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        card = card_of(folder)
        assert_complete(card, method)
        count = sum(p.numel() for key, p in model.named_parameters() if f".{name}." in key)
        assert f"| Trainable parameters, heads left out | {count:,} |" in card.text


def test_model_of_transformers_with_an_added_adapter_gets_a_card(method, tmp_path):
    model = llama()
    model.add_adapter(method.config(target_modules=["q_proj"], seed=1))
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert_complete(card, method)
    assert trainable_parameters(model) in card.text


def test_card_is_written_by_a_function_that_the_config_calls(method, tmp_path, monkeypatch):
    """Others can be added; all files of the adapter are there when they run."""
    seen = []

    def note(folder, config):
        seen.append((folder, config, sorted(path.name for path in folder.iterdir())))

    monkeypatch.setattr(SubspaceConfig, "on_save", [*SubspaceConfig.on_save, note])
    model = adapted(method)
    model.save_pretrained(tmp_path)
    written = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert seen == [(tmp_path, model.peft_config["default"], written)]


def test_equation_is_the_first_paragraph_of_the_updates_module(method):
    delta_cls = PEFT_TYPE_TO_TUNER_MAPPING[method.config().peft_type].tuner_layer_cls.delta_cls
    assert re.match(r"[\w -]+: `ΔW", equation_of(delta_cls))
    assert "\n\n" not in equation_of(delta_cls)
    assert equation_of(type("Update", (), {"__module__": "absent"})) == ""


def test_lora_export_beside_the_adapter_is_mentioned(method, tmp_path):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    assert 'subfolder="lora"' not in card_of(tmp_path).text
    peft_subspace.export_lora(model, tmp_path / "lora")
    assert_complete(card_of(tmp_path), method)
    assert 'subfolder="lora"' in card_of(tmp_path).text


def test_trainer_saves_the_card_and_completes_its_own(method, tmp_path):
    """`Trainer.create_model_card` writes the file anew; saving the model once more completes it again."""
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    model = adapted(method)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": torch.tensor([3, 4])}])
    trainer.save_model()
    assert_complete(card_of(tmp_path), method)
    trainer.create_model_card(model_name="Named", dataset="Data", dataset_tags="org/data")
    assert "# Named" in card_of(tmp_path).text
    trainer.save_model()
    card = card_of(tmp_path)
    assert_complete(card, method)
    assert "# Named" in card.text
    assert "| Data | org/data |" in card.text
    assert "fine-tuned" in card.text or "trained from scratch" in card.text
