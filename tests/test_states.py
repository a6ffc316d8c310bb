"""States of the base model below adapters, and of adapters that are handed over in memory."""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict
from torch import nn

WRAPPERS = {
    "layers": {},
    "biases": {"bias": "all"},
    "heads": {"modules_to_save": ["norm", "head"]},
    "tokens": {"trainable_token_indices": {"words": [1, 2]}},
}


class Small(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.layer, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 20)
        self.register_buffer("steps", torch.ones(3))
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        hidden = self.norm(self.layer(self.words(ids)))
        return self.head(self.conv(hidden.transpose(1, 2)).transpose(1, 2))


def adapted(method, tied=False, **options):
    options = {"target_modules": ["layer", "conv"], "init_weights": False, **options}
    return get_peft_model(Small(tied), method.config(**options)).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("wrappers", WRAPPERS)
def test_state_of_the_base_has_the_keys_and_values_of_the_base(method, wrappers, tied):
    if tied and wrappers == "heads":
        pytest.skip("a head tied to the embedding is no module to save")
    expected = Small(tied).state_dict()
    model = adapted(method, tied, **WRAPPERS[wrappers])
    model.add_adapter("other", method.config(target_modules=["layer"], **WRAPPERS["layers"]))
    found = get_base_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    changed = {key: tensor + 1 for key, tensor in expected.items()}
    set_base_model_state_dict(model, changed)
    assert all(torch.equal(get_base_model_state_dict(model)[key], tensor) for key, tensor in changed.items())


@pytest.mark.parametrize("bias", ["all", "own"])
def test_biases_handed_over_in_memory_are_loaded(method, bias):
    ids = torch.arange(12).view(2, 6)
    kind = f"{method.config_cls.peft_type_name.lower()}_only" if bias == "own" else "all"
    trained = adapted(method, bias=kind, seed=0)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and "bias" in name:
            parameter.data.fill_(1.23)
    state = get_peft_model_state_dict(trained)
    assert any("bias" in key for key in state)
    fresh = adapted(method, init_weights=True, seed=1)
    set_peft_model_state_dict(fresh, state)
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids), trained(ids))
