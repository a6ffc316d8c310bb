"""Sums of adapters count every adapter that is listed, as strong as it is at that time."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_subspace.tuner.layer import SubspaceLayer

pytestmark = [
    pytest.mark.where(method="combines"),
    pytest.mark.filterwarnings("ignore:Adapter name .[ab]. should not"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.conv = nn.Linear(12, 12), nn.Linear(12, 8), nn.Conv1d(4, 6, 3)

    def forward(self, x):
        return self.conv(self.second(self.first(x)).view(-1, 4, 2).repeat(1, 1, 2))


TARGETS = ["first", "second", "conv"]


def adapted(method):
    """A model with the adapters `a` and `b`, of which `b` is on fewer layers, and its layers by name."""
    model = get_peft_model(Net(), method.config(target_modules=TARGETS, init_weights=False), "a")
    protected = "preserve" in vars(model.peft_config["a"])  # sums need equal directions
    if protected:
        model.add_adapter("b", model.peft_config["a"])
    else:
        model.add_adapter("b", method.config(target_modules=TARGETS[:2], init_weights=False))
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, SubspaceLayer)}
    return model, layers


def weighted(layers, weights):
    """`Σ w ΔW` of each layer, as it is live."""
    return {
        name: sum(
            (
                weight * layer.get_delta_weight(adapter).double()
                for adapter, weight in weights
                if adapter in layer.deltas
            ),
            start=torch.zeros_like(layer.get_base_layer().weight, dtype=torch.double),
        )
        for name, layer in layers.items()
    }


def assert_is(layers, adapter, expected):
    for name, layer in layers.items():
        torch.testing.assert_close(
            layer.get_delta_weight(adapter).double(), expected[name], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "weights",
    [
        [("a", 0.3), ("a", 0.7)],
        [("a", 1.0), ("b", -2.0), ("a", 0.5)],
        [("b", 0.25), ("b", 0.25), ("b", 0.25), ("a", 2.0), ("b", 0.25)],
        [("a", 1.0), ("a", -1.0), ("b", 1.0)],
    ],
)
def test_adapters_listed_twice_count_twice(method, weights):
    model, layers = adapted(method)
    expected = weighted(layers, weights)
    names, numbers = zip(*weights, strict=True)
    model.add_weighted_adapter(list(names), list(numbers), "sum", combination_type="cat")
    assert_is(layers, "sum", expected)


@pytest.mark.parametrize("scales", [(0.5, 1.0), (3.0, -0.25), (0.0, 2.0)])
def test_scales_of_run_time_count(method, scales):
    model, layers = adapted(method)
    for layer in layers.values():
        for name, scale in zip("ab", scales, strict=True):
            layer.set_scale(name, scale)
        layer.scale_layer(1.5)  # of the active adapter
    expected = weighted(layers, [("a", 0.5), ("b", 2.0)])
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", combination_type="cat")
    assert_is(layers, "sum", expected)
    for layer in layers.values():
        layer.set_scale("sum", 2.0)
    assert_is(layers, "sum", {name: 2 * update for name, update in expected.items()})


def test_both_count_in_averages(method):
    """Methods with frozen bases too, which an adapter of the same config object shares."""
    model, layers = adapted(method)
    if "linear" not in next(iter(layers.values())).delta_cls.combinations:
        with pytest.raises(ValueError, match="is not exact for"):
            model.add_weighted_adapter(["a", "a"], [0.3, 0.7], "sum", combination_type="linear")
        return
    model.add_adapter("c", model.peft_config["a"])
    for layer in layers.values():
        layer.set_scale("c", 0.5)
    expected = weighted(layers, [("a", 0.3), ("c", 1.0), ("a", 0.7)])
    model.add_weighted_adapter(["a", "c", "a"], [0.3, 1.0, 0.7], "sum", combination_type="linear")
    assert_is(layers, "sum", expected)
