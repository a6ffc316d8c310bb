"""An adapter's name is data: whatever it is, files are complete and starts are the same."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

import peft_subspace

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]

X = torch.linspace(-1, 1, 24).view(2, 12)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"first": nn.Linear(12, 12), "core": nn.Linear(12, 8)})
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body["core"](self.body["first"](x)))


def config(method, **options):
    return method.config(
        **{"target_modules": ["first", "core"], "modules_to_save": ["head"], "init_weights": False, **options}
    )


PAIRS = [
    ("A", "B"),
    ("B", "R"),
    ("U", "V"),
    ("Z", "fingerprint"),
    ("core", "edge"),
    ("first", "core"),
    ("model", "body"),
    ("base_model", "weight"),
    ("index_A", "shards"),
    ("first__A", "core__B"),
    ("U0", "S_change"),
    ("task", "task2"),
    ("base_layer", "modules_to_save"),
    ("deltas", "original_module"),
]


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_files_are_complete(method, tmp_path, names):
    plain = get_peft_model(Net(), config(method))
    expected = {key: t.shape for key, t in get_peft_model_state_dict(plain).items()}
    model = get_peft_model(Net(), config(method), adapter_name=names[0])
    for name in (names[1], "another"):
        model.add_adapter(name, config(method))
    model.save_pretrained(tmp_path)
    for name in (*names, "another"):
        folder = tmp_path / name
        assert {
            key: t.shape for key, t in load_file(folder / "adapter_model.safetensors").items()
        } == expected
        assert model.peft_config[name].trained == plain.peft_config["default"].trained
        model.set_adapter(name)
        for again in (
            PeftModel.from_pretrained(Net(), folder, name),
            PeftModel.from_pretrained(Net(), folder),
            peft_subspace.load(Net(), folder, names[0]),
        ):
            assert torch.equal(again.eval()(X), model.eval()(X))


@pytest.mark.parametrize("names", PAIRS[:4] + PAIRS[6:8], ids="-".join)
def test_files_of_injected_adapters_are_complete(method, names):
    model = Net()
    for name in names:
        inject_adapter_in_model(config(method, modules_to_save=None), model, name)
    states = [get_peft_model_state_dict(model, adapter_name=name) for name in names]
    alone = inject_adapter_in_model(config(method, modules_to_save=None), Net())
    expected = {key: t.shape for key, t in get_peft_model_state_dict(alone).items()}
    for state in states:
        assert {key: t.shape for key, t in state.items()} == expected


@pytest.mark.parametrize("options", [{}, {"init_weights": False}, {"init_weights": False, "seed": 3}])
def test_start_depends_on_no_name(method, options):
    starts = []
    for names in (("default", "x"), ("some", "other"), ("A", "B")):
        model = get_peft_model(Net(), method.config(target_modules=["first", "core"], **options), names[0])
        model.add_adapter(names[1], method.config(target_modules=["first", "core"], **options))
        starts.append([get_peft_model_state_dict(model, adapter_name=name) for name in names])
    for other in starts[1:]:
        for mine, theirs in zip(starts[0], other, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_adapters_of_one_model_start_apart(method):
    """Also when an earlier one has been deleted: no new one starts where one that is there did."""
    model = get_peft_model(Net(), config(method, modules_to_save=None), "one").eval()
    model.add_adapter("two", config(method, modules_to_save=None))
    model.set_adapter("two")
    model.delete_adapter("one")
    model.add_adapter("three", config(method, modules_to_save=None))
    outputs = [(model.set_adapter(name), model(X))[1] for name in ("two", "three")]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["a.b", "", "keys", "training", "to"])
def test_names_that_no_module_can_have_are_refused(method, name):
    model, bare = get_peft_model(Net(), config(method)), Net()
    with pytest.raises(ValueError, match="cannot be the name of a module"):
        model.add_adapter(name, config(method))
    with pytest.raises(ValueError, match="cannot be the name of a module"):
        get_peft_model(bare, config(method), name)
    assert list(model.peft_config) == ["default"]
    assert type(bare.head) is nn.Linear
