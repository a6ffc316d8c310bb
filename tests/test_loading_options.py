"""Options of PEFT's loaders, which `load` takes as they do."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

import peft_subspace
from peft_subspace.base_weights.weight import BaseWeight

X = torch.linspace(-1, 1, 24).view(2, 12)


class Block(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.fc = nn.Linear(12, width)
        self.head = nn.Linear(width, 12)

    def forward(self, x):
        return self.head(self.fc(x))


class Model(nn.Module):
    """A model whose blocks lie at a path that changes from version to version."""

    def __init__(self, path, **options):
        super().__init__()
        torch.manual_seed(0)
        self.path = path
        *parents, last = path.split(".")
        parent = self
        for name in parents:
            child = nn.Module()
            parent.add_module(name, child)
            parent = child
        parent.add_module(last, Block(**options))

    def forward(self, x):
        return self.get_submodule(self.path)(x)


@pytest.mark.parametrize(
    ("old", "new", "mapping"),
    [
        ("enc", "model.encoder", {"^enc": "model.encoder"}),
        ("model.encoder", "enc", {r"^model\.encoder": "enc"}),
        ("layers.0", "blocks.0", {"nothing": "else", r"^layers\.(\d+)": r"blocks.\1"}),
        ("model.model", "model", {r"^model\.model\.": "model."}),
        ("enc", "enc", {}),
    ],
)
@pytest.mark.feature("`key_mapping`")
def test_names_of_another_version_are_mapped(method, tmp_path, old, new, mapping):
    config = method.config(target_modules=["fc"], modules_to_save=["head"], init_weights=False)
    saved = get_peft_model(Model(old), config).eval()
    saved.save_pretrained(tmp_path)
    implied = Model(new)
    implied._checkpoint_conversion_mapping = mapping
    loaded = [
        peft_subspace.load(Model(new), tmp_path, key_mapping=mapping),
        PeftModel.from_pretrained(Model(new), tmp_path, key_mapping=mapping),
        peft_subspace.load(implied, tmp_path),
        peft_subspace.load(get_peft_model(Model(new), config), tmp_path, "more", key_mapping=mapping),
    ]
    loaded[-1].set_adapter("more")
    assert all(torch.equal(model(X), saved(X)) for model in loaded)


def test_a_mapping_may_move_everything(method, tmp_path):
    config = method.config(target_modules=["fc"], modules_to_save=["head"], init_weights=False)
    saved = get_peft_model(Model("enc"), config).eval()
    saved.save_pretrained(tmp_path)
    for load in (peft_subspace.load, PeftModel.from_pretrained):
        moved = load(nn.Sequential(OrderedDict(outer=Model("enc"))), tmp_path, key_mapping={"^": "outer."})
        assert torch.equal(moved(X), saved(X))


def test_a_module_may_be_named_none(tmp_path):
    config = peft_subspace.FLoRAConfig(r=2, target_modules=["fc"], init_weights=False)
    saved = get_peft_model(Model("stage.None"), config).eval()
    saved.save_pretrained(tmp_path)
    for load in (peft_subspace.load, PeftModel.from_pretrained):
        assert torch.equal(load(Model("stage.None"), tmp_path)(X), saved(X))


def test_mapping_that_leads_nowhere_is_refused(method, tmp_path):
    get_peft_model(Model("enc"), method.config(target_modules=["fc"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="in the file"):
        peft_subspace.load(Model("enc"), tmp_path, key_mapping={"^enc": "dec"})


@pytest.mark.typical("methods")
def test_file_without_a_tensor_of_the_adapter_is_refused(method, tmp_path):
    config = method.config(target_modules=["fc"])
    get_peft_model(Model("enc"), config).save_pretrained(tmp_path)
    save_file({"base_model.model.enc.fc.lora_A.weight": X}, tmp_path / "adapter_model.safetensors")
    model = get_peft_model(Model("enc"), config)
    before = dict(model.state_dict())
    for call in (
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: model.load_adapter(tmp_path, "new"),
        lambda: PeftModel.from_pretrained(Model("enc"), tmp_path),
    ):
        with pytest.raises(ValueError, match="the file has no tensor of adapter"):
            call()
    assert list(model.state_dict()) == list(before)


class Words(nn.Module):
    """Embedding and layer, as a model of transformers has them."""

    def __init__(self, rows):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.embed_tokens = nn.Linear(6, 6), nn.Embedding(rows, 6)

    def forward(self, x):
        return self.layer(self.embed_tokens(x))

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return None


@pytest.mark.parametrize("rows", [9, 12, 20])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.feature("`ignore_mismatched_sizes`")
def test_resized_embeddings_are_left_out_on_demand(method, tmp_path, rows):
    """The layer is loaded; an adapted embedding starts anew, as a whole, and so does one that was saved."""
    targets = ["embed_tokens", "layer"]
    saved = get_peft_model(Words(11), method.config(target_modules=targets, init_weights=False))
    saved.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = []
    for load in (peft_subspace.load, PeftModel.from_pretrained):
        base = Words(rows)
        own = base.embed_tokens.weight.clone()
        with pytest.raises(ValueError, match="has shape"):
            load(base, tmp_path)
        with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
            loaded.append(load(base, tmp_path, ignore_mismatched_sizes=True))
        layers = loaded[-1].base_model.model
        assert torch.equal(getattr(layers.embed_tokens, "base_layer", layers.embed_tokens).weight, own)
    layers, source = loaded[0].base_model.model, saved.base_model.model
    if not method.pooled:  # whose pools the embedding may share
        assert torch.equal(layers.layer.get_delta_weight("default"), source.layer.get_delta_weight("default"))


def test_file_is_checked_once(method, tmp_path, monkeypatch):
    """Hashing of base weights and reading of values take long for large adapters."""
    model = get_peft_model(Model("enc"), method.config(target_modules=["fc"]))
    model.save_pretrained(tmp_path)
    calls = []
    for owner, name in (
        (BaseWeight, "fingerprint"),
        (type(model.base_model.model.enc.fc.deltas["default"]), "check_values"),
    ):
        check = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=check, n=name: (calls.append(n), f(*a))[1])
    peft_subspace.load(Model("enc"), tmp_path)
    assert calls.count("check_values") == 1
    assert calls.count("fingerprint") <= 1
