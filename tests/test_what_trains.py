"""What trains after loading, switching and deleting, heads included: as with LoRA."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_subspace
from peft_subspace.continual import next_task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.l1, self.l2, self.h1, self.h2 = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.h2(self.h1(self.l2(self.l1(x))))


NAMES = ["default", "aa", "bb"]
HEADS = {
    "none": {},
    "one_for_two": {"default": ["h1"], "aa": ["h1"], "bb": ["h2"]},
    "different": {"default": ["h1"], "aa": ["h2"]},
    "of_the_second": {"aa": ["h1", "h2"]},
}
SEQUENCES = {
    "switching": "add aa; set aa; set default; list default aa; list aa; disabled; list default",
    "deleting": "add aa; add bb; list aa bb; list default bb; list bb default; delete bb; delete default",
    "frozen": "add aa; add bb; inference default bb; inference aa; set aa; off; on; disabled",
    "loading": "load aa True; set aa; load bb False; set bb; set default; disabled; list aa bb",
    "unknown": "list default nope; set default; set nope; list aa",
    "merging": "add aa; merge; set aa; merge; unmerge; list aa default; merge; unmerge",
}


def what_trains(model):
    """By adapter and module: whether all, some or none of it trains, layers of the update taken together."""
    found = {}
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        owner = next((name for name in NAMES if name in parts), "base")
        head = parts[parts.index("modules_to_save") - 1] if "modules_to_save" in parts else "update"
        found.setdefault((owner, head), set()).add(parameter.requires_grad)
    return found


def run(make, first, sequence, heads, folder):
    """What trains after each call, and which calls were refused."""

    def config(name):
        return make(target_modules=["l1", "l2"], modules_to_save=heads.get(name))

    for name in NAMES:
        get_peft_model(Net(), config(name)).save_pretrained(folder / name)
    model = first(folder / "default", lambda: get_peft_model(Net(), config("default")))
    seen = [what_trains(model)]
    calls = {
        "add": lambda name: model.add_adapter(name, config(name)),
        "load": lambda name, train: model.load_adapter(folder / name, name, is_trainable=train == "True"),
        "set": lambda name: model.set_adapter(name),
        "list": lambda *names: model.base_model.set_adapter(list(names)),
        "inference": lambda *names: model.base_model.set_adapter(list(names), inference_mode=True),
        "delete": lambda name: model.delete_adapter(name),
        "off": lambda: model.base_model.disable_adapter_layers(),
        "on": lambda: model.base_model.enable_adapter_layers(),
        "disabled": lambda: contextlib.ExitStack().enter_context(model.disable_adapter()) and None,
        "merge": lambda: model.merge_adapter(),
        "unmerge": lambda: model.unmerge_adapter(),
    }
    for step in sequence.split("; "):
        call, *names = step.split()
        try:
            calls[call](*names)
            seen.append((step, model.active_adapters, what_trains(model)))
        except ValueError:
            seen.append((step, "refused", model.active_adapters, what_trains(model)))
    return seen


FIRST = {
    "made": lambda folder, make: make(),
    "loaded": lambda folder, make: PeftModel.from_pretrained(Net(), folder),
    "loaded to train": lambda folder, make: PeftModel.from_pretrained(Net(), folder, is_trainable=True),
}


@pytest.mark.filterwarnings("ignore")  # of PEFT: merged adapters, unknown names
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.feature("`requires_grad` after loading and switching, heads included, as with LoRA")
def test_as_much_trains_as_with_lora(method, tmp_path, heads, sequence):
    for first, start in FIRST.items():
        found = [
            run(make, start, SEQUENCES[sequence], HEADS[heads], tmp_path / first / str(i))
            for i, make in enumerate([method.config, LoraConfig])
        ]
        assert found[0] == found[1], first


def test_a_list_of_tasks_has_the_heads_of_the_last_one():
    config = peft_subspace.ContinualSVDConfig(r=2, target_modules=["l1", "l2"], modules_to_save=["h1"])
    model = get_peft_model(Net(), config, "aa")
    next_task(model, "bb", keep="stack")
    model.base_model.set_adapter(["aa", "bb"])
    assert what_trains(model)["bb", "h1"] == what_trains(model)["bb", "update"] == {True}
    assert what_trains(model)["aa", "h1"] == what_trains(model)["aa", "update"] == {False}
    assert model.base_model.model.h1.active_adapters == ["bb"]
    model.base_model.set_adapter(["bb", "aa"])
    assert model.base_model.model.h1.active_adapters == ["aa"]
    assert {True} not in [v for k, v in what_trains(model).items() if k[0] == "aa"]
