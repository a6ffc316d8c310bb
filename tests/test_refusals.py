"""What a refused call leaves: the model, its adapters, their order, flags and outputs as they were."""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import peft_subspace

WEIGHTS = "adapter_model.safetensors"
X = torch.linspace(-1, 1, 24).view(2, 12)


class Net(nn.Module):
    """A body of two layers, a head, and what no head can be."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, classes)
        self.parts = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def config(method, **options):
    return method.config(
        **{
            "target_modules": ["first", "second"],
            "modules_to_save": ["head"],
            "init_weights": False,
            **options,
        }
    )


@pytest.fixture
def saved(method, tmp_path):
    """A sound adapter, saved."""
    torch.manual_seed(1)
    get_peft_model(Net(), config(method)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(change):
    def damage(folder):
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def part(state, name):
    return next(key for key in sorted(state) if name in key and state[key].is_floating_point())


def fill(name, value):
    return edit(lambda state: state[part(state, name)].view(-1)[-1:].fill_(value))


DAMAGES = {
    "longer": edit(lambda state: state.update({(k := part(state, "first")): torch.cat([state[k]] * 2)})),
    "not finite": fill("first", float("nan")),
    "head of another size": edit(lambda s: s.update({(k := part(s, "head.weight")): torch.cat([s[k]] * 2)})),
    "no head": edit(lambda state: state.pop(part(state, "head.bias"))),
    "foreign": edit(
        lambda s: s.update({part(s, "head.w").replace("head", "first.base_layer"): torch.ones(12, 12)})
    ),
    "cut off": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]),
    "gone": lambda folder: (folder / WEIGHTS).unlink(),
}


def everything(model):
    """All that a refused call could have changed."""
    with torch.no_grad():
        output = model(X)
    return {
        "tensors": {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: (type(m), m.training) for name, m in model.named_modules()},
        "adapters": {name: m.__dict__.get("_active_adapter") for name, m in model.named_modules()},
        "kept": {name: sorted(m.scaling) for name, m in model.named_modules() if hasattr(m, "scaling")},
        "configs": list(getattr(model, "peft_config", {}).items()),
        "output": output,
    }


def assert_same(model, before):
    after = everything(model)
    for name, (place, tensor) in before["tensors"].items():
        assert torch.equal(after["tensors"][name][1], tensor), name
        assert after["tensors"][name][0] == place, name
    assert list(after["tensors"]) == list(before["tensors"])
    assert torch.equal(after["output"], before["output"])
    for what in ("flags", "modes", "adapters", "kept", "configs"):
        assert after[what] == before[what], what


def trained(method):
    """A model with two adapters, the second active."""
    torch.manual_seed(2)
    model = get_peft_model(Net(), config(method), adapter_name="one")
    model.add_adapter("two", config(method, target_modules=["first"]))
    model.set_adapter("two")
    return model.eval()


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_refused_change_nothing(method, saved, damage):
    DAMAGES[damage](saved)
    for name in ("one", "two", "new"):
        model = trained(method)
        before = everything(model)
        with pytest.raises((ValueError, OSError, KeyError, SafetensorError)):
            model.load_adapter(saved, name)
        assert_same(model, before)
        with pytest.raises((ValueError, OSError)):
            peft_subspace.load(model, saved, name)
        assert_same(model, before)


@pytest.mark.parametrize("damage", DAMAGES)
def test_base_model_is_what_it_was(method, saved, damage):
    DAMAGES[damage](saved)
    base = Net()
    base.first.weight.requires_grad_(False)
    before = everything(base)
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        with pytest.raises((ValueError, OSError, KeyError)):
            load(base, saved)
        assert_same(base, before)


@pytest.mark.parametrize("damage", ["longer", "not finite", "head of another size", "no head"])
def test_tensors_that_are_refused_change_nothing(method, saved, damage):
    good = load_file(saved / WEIGHTS)
    DAMAGES[damage](saved)
    for name in ("one", "two"):
        model = trained(method)
        before = everything(model)
        with pytest.raises((ValueError, KeyError)):
            set_peft_model_state_dict(model, load_file(saved / WEIGHTS), name)
        assert_same(model, before)
    set_peft_model_state_dict(model, good, "one")
    state = get_peft_model_state_dict(model, adapter_name="one")
    # what is projected again is the same but for rounding
    torch.testing.assert_close({key: state[key] for key in good}, good, rtol=0, atol=1e-6)


@pytest.mark.parametrize("other", [{"r": 1}, {"target_modules": ["first"], "rank_pattern": {"first": 1}}])
def test_adapter_of_another_rank_is_refused(method, saved, tmp_path, other):
    if method.name == "continual_svd":
        other = {**other, "preserve": 2, "r": None, "rank_pattern": {}}
    if method.pooled:
        other = {"equivalent_r": 2}
    get_peft_model(Net(), config(method, **other)).save_pretrained(tmp_path / "other")
    model = trained(method)
    before = everything(model)
    with pytest.raises((ValueError, RuntimeError)):
        model.load_adapter(tmp_path / "other", "one")
    assert_same(model, before)
    model.load_adapter(saved, "one")


class Words(nn.Module):
    """A body and a head on words, of which a few are trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.body = nn.Embedding(9, 12), Net()

    def forward(self, x):
        return self.body(self.words.weight[:2] + self.words(torch.arange(2)) + x)


@pytest.mark.typical("methods")
def test_rows_of_tokens_and_heads_that_are_refused_change_nothing(method, tmp_path):
    options = {"trainable_token_indices": {"words": [1, 4]}}
    torch.manual_seed(1)
    get_peft_model(Words(), config(method, **options)).save_pretrained(tmp_path / "saved")
    damages = {
        "narrower": edit(lambda s: s.update({(k := part(s, "tokens")): s[k][:, 1:].clone()})),
        "fewer": edit(lambda s: s.update({(k := part(s, "tokens")): s[k][1:].clone()})),
        "gone": edit(lambda s: s.pop(part(s, "tokens"))),
        "not finite": fill("tokens", float("nan")),
        "head not finite": fill("head", float("inf")),
        "head of whole numbers": edit(lambda s: s.update({(k := part(s, "head")): s[k].long()})),
    }
    for name, damage in damages.items():
        shutil.copytree(tmp_path / "saved", tmp_path / name)
        damage(tmp_path / name)
        torch.manual_seed(2)
        model = get_peft_model(Words(), config(method, **options), "one")
        model.add_adapter("two", config(method, **options))
        for target, calls in ((model.eval(), (model.load_adapter,)), (Words().eval(), ())):
            before = everything(target)
            for call in (*calls, lambda *a, to=target: peft_subspace.load(to, *a)):
                with pytest.raises(ValueError, match=r"words|tokens|head"):
                    call(tmp_path / name, "new")
                assert_same(target, before)
        base = Words().eval()
        before = everything(base)
        with pytest.raises(ValueError, match=r"words|tokens|head"):
            PeftModel.from_pretrained(base, tmp_path / name)
        assert_same(base, before)
        model.load_adapter(tmp_path / "saved", "new")


def test_adapter_that_loads_after_a_refusal_is_sound(method, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "bad")
    DAMAGES["not finite"](tmp_path / "bad")
    model = trained(method)
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(tmp_path / "bad", "new")
    model.load_adapter(saved, "new")
    model.set_adapter("new")
    with torch.no_grad():
        assert torch.equal(model(X), PeftModel.from_pretrained(Net(), saved)(X))


def test_config_that_fails_half_way_changes_nothing(method):
    """PEFT finds out that a module can be no head when the layers have been replaced."""
    model, bare = trained(method), Net()
    for target, add in ((model, model.add_adapter), (bare, lambda _, c: get_peft_model(bare, c))):
        before = everything(target)
        with pytest.raises(TypeError, match="ModuleList"):
            add("new", config(method, modules_to_save=["head", "parts"]))
        assert_same(target, before)


def test_sizes_that_are_to_be_ignored_are(method, saved):
    DAMAGES["head of another size"](saved)
    model = trained(method)
    head = copy.deepcopy(model.base_model.model.head.original_module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(saved, "new", ignore_mismatched_sizes=True)
    assert torch.equal(model.base_model.model.head.modules_to_save["new"].weight, head.weight)
