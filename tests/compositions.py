"""A small network, three adapters of it in folders, and what their sum is."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

import peft_subspace
from layers import distance
from peft_subspace.merging import merge

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 8)
        self.other = nn.ModuleDict({"layer": nn.Linear(8, 8)})  # its name ends as the first one's
        self.conv = nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, input_ids, labels=None):
        y = self.other["layer"](self.layer(input_ids).tanh())
        logits = self.conv(y[..., None])[..., 0]
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}


def saved_sources(folder):
    """A LoRA, a FLoRA and a MoS, of different ranks and modules, in folders."""
    configs = {
        "lora": LoraConfig(r=3, target_modules=["layer", "conv"], init_lora_weights=False),
        "flora": peft_subspace.FLoRAConfig(
            r=2, target_modules=["^layer", "conv"], init_weights=False, seed=1
        ),
        "mos": peft_subspace.MoSConfig(target_modules="layer|other.layer", init_weights=False, seed=2),
    }
    for name, config in configs.items():
        torch.manual_seed(3)
        get_peft_model(Network(), config).save_pretrained(folder / name)
    return [folder / name for name in configs]


def summed(sources, weights):
    """Outputs of the base model plus `Σ w_t τ_t`."""
    merged = merge(sources, weights=weights, base=Network())
    state = Network().state_dict()
    for module in merged.modules:
        key = f"{module}.weight"
        state[key] = state[key] + merged.update(module).reshape(state[key].shape)
    return functional_call(Network(), state, (X,))["logits"]


def saved_and_exported(model, folder):
    """The composition loaded from its file, and its LoRA in PEFT, which give its outputs."""
    model.save_pretrained(folder / "composed")
    again = peft_subspace.load(Network(), folder / "composed")
    assert torch.equal(logits(again), logits(model))
    peft_subspace.export_lora(model, folder / "exported")
    lora = PeftModel.from_pretrained(Network(), folder / "exported")
    assert distance(logits(lora), logits(model)) < 1e-5
    return again, lora


def logits(model):
    with torch.no_grad():
        return model.eval()(X)["logits"]
