"""Combinations of adapters: what every method makes of all types, beside loops; all that is listed counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from layers import distance
from merge_oracles import by_entry, elected, total, trimmed
from peft_subspace.core.linalg import local_generator
from peft_subspace.merging.combinations import COMBINATIONS
from peft_subspace.tuner.layer import SubspaceLayer

pytestmark = [pytest.mark.filterwarnings("ignore:Adapter name .[abc]. should not")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.conv = nn.Linear(12, 12), nn.Linear(12, 8), nn.Conv1d(4, 6, 3)

    def forward(self, x):
        return self.conv(self.second(self.first(x)).view(-1, 4, 2).repeat(1, 1, 2))


TARGETS = ["first", "second", "conv"]


def adapted(method, **options):
    """A model with the adapters `a` and `b`, of which `b` is on fewer layers, and its layers by name."""
    model = get_peft_model(Net(), method.config(target_modules=TARGETS, init_weights=False), "a")
    protected = "preserve" in vars(model.peft_config["a"])  # sums need equal directions
    if protected:
        model.add_adapter("b", model.peft_config["a"])
    else:
        model.add_adapter("b", method.config(target_modules=TARGETS[:2], init_weights=False, **options))
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
    model.add_adapter("c", model.peft_config["a"])
    for layer in layers.values():
        layer.set_scale("c", 0.5)
    expected = weighted(layers, [("a", 0.3), ("c", 1.0), ("a", 0.7)])
    model.add_weighted_adapter(["a", "c", "a"], [0.3, 1.0, 0.7], "sum", combination_type="linear")
    assert_is(layers, "sum", expected)


# ------------------------------------------------------------------------------------- all types


def truncated(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def dropped(matrices, names, module, density, seed):
    """Entries that DARE keeps, one after the other."""
    result = []
    for matrix, name in zip(matrices, names, strict=True):
        generator = local_generator(seed, module, name)
        drawn = torch.rand(matrix.shape, generator=generator, dtype=torch.float64)
        kept = torch.zeros_like(matrix)
        for place in itertools.product(*map(range, matrix.shape)):
            if drawn[place] < density:
                kept[place] = matrix[place] / density
        result.append(kept)
    return result


def frequent(entries, weights):
    """TIES whose sign is that of the more entries."""
    scaled = [w * x for w, x in zip(weights, entries, strict=True)]
    sign = sum((x > 0) - (x < 0) for x in scaled)
    chosen = [(w, x) for w, x in zip(weights, scaled, strict=True) if x * sign > 0]
    return sum(x for _, x in chosen) / sum(abs(w) for w, _ in chosen) if chosen else 0.0


def combined(kind, taus, names, weights, module, options):
    """What a type makes of dense updates."""
    plain, cuts = kind.removesuffix("_svd"), kind.endswith("svd")
    density = options.get("density", 0.2 if plain == "ties" else 0.5)
    basis = torch.eye(len(taus[0]), dtype=torch.float64)
    if not cuts and plain not in ("cat", "linear"):
        U, S, _ = torch.linalg.svd(torch.cat(taus, 1), full_matrices=False)
        basis = U[:, 1e-6 * S[0] < S]
    parts = [basis.T @ tau for tau in taus]
    if plain in ("ties", "magnitude_prune"):
        parts = trimmed(parts, density)
    elif plain.startswith("dare"):
        parts = dropped(parts, names, module, density, options.get("seed", 0))
    mean = frequent if options.get("majority_sign_method") == "frequency" else elected
    merged = basis @ (by_entry(mean)(parts, weights) if "ties" in plain else total(parts, weights))
    return truncated(merged, options["svd_rank"]) if cuts else merged


def allowed(method, layer, update):
    """The nearest update that the method can be: Continual SVD leaves leading directions alone."""
    if "preserve" not in vars(method.config()):
        return update
    weight = layer.get_base_layer().weight.detach().double().flatten(1)
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    count = int(method.config().preserve * min(weight.shape))
    U, V = U[:, :count], Vh[:count].T
    return (update - U @ (U.T @ update)) - (update - U @ (U.T @ update)) @ V @ V.T


TYPES = {
    "linear": [{}],
    "svd": [{"svd_rank": 3}],
    "ties": [{"density": 0.4}, {"density": 0.4, "majority_sign_method": "frequency"}],
    "ties_svd": [{"density": 0.4, "svd_rank": 3}, {"density": None, "svd_rank": 2}],
    "dare_linear": [{"density": 0.6, "seed": 3}],
    "dare_linear_svd": [{"density": 0.6, "svd_rank": 3}],
    "dare_ties": [{"density": 0.6}],
    "dare_ties_svd": [{"density": 0.6, "svd_rank": 3, "majority_sign_method": "frequency"}],
    "magnitude_prune": [{"density": 0.4}],
    "magnitude_prune_svd": [{"density": 0.4, "svd_rank": 3}],
}


def test_the_types_are_those_of_peft():
    import typing

    from peft.tuners.lora import LoraModel

    theirs = typing.get_args(typing.get_type_hints(LoraModel.add_weighted_adapter)["combination_type"])
    assert set(theirs) == {"cat", *TYPES} == {*COMBINATIONS}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_what_loops_make_of_the_updates(method, kind, tmp_path):
    """Different ranks, a negative weight, an adapter listed twice, one that has not all layers, scales."""
    for options in TYPES[kind]:
        model, layers = adapted(method, **({"r": 3} if method.config().r else {}))
        if (method.name, kind) == ("lora_sb", "linear"):
            return  # needs equal bases: test_lora_sb.py
        for layer in layers.values():
            if "b" in layer.deltas:
                layer.set_scale("b", 0.5)
        wanted = {}
        for name, layer in layers.items():
            names = [n for n in ("b", "a") if n in layer.deltas]
            taus = [layer.get_delta_weight(n).detach().double().flatten(1) for n in names]
            weights = [{"a": 1.3, "b": -2.0}[n] for n in names]
            chosen = {k: v for k, v in options.items() if v is not None}
            wanted[name] = allowed(method, layer, combined(kind, taus, names, weights, name, chosen))
        model.add_weighted_adapter(["b", "a", "a"], [-2.0, 1.0, 0.3], "sum", kind, **options)
        for name, layer in layers.items():
            found = layer.get_delta_weight("sum").detach().double().flatten(1)
            assert distance(found, wanted[name]) < 1e-4, (name, options)
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        again = PeftModel.from_pretrained(Net(), tmp_path / "sum")
        for name, layer in layers.items():
            found = again.base_model.model.get_submodule(name).get_delta_weight("default")
            assert distance(found, layer.get_delta_weight("sum")) < 1e-6


def test_cuts_are_to_the_largest_rank_unless_told(method):
    if not method.config().r:
        return  # updates of full rank
    model, layers = adapted(method, r=3)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "svd")
    for layer in layers.values():
        most = max(
            int(torch.linalg.matrix_rank(layer.get_delta_weight(n).flatten(1), rtol=1e-4))
            for n in ("a", "b")
            if n in layer.deltas
        )
        assert int(torch.linalg.matrix_rank(layer.get_delta_weight("sum").flatten(1), rtol=1e-4)) == most


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("ties", {"density": 0.0001}, ValueError, "density=0.0001 keeps nothing"),
        ("ties", {"density": 0}, ValueError, "density=0 must be above 0"),
        ("ties_svd", {"svd_rank": 0}, ValueError, "svd_rank=0 must be at least 1"),
        ("ties", {"rank": 2}, ValueError, r"rank=2 is no option of combination_type='ties'"),
        ("ties", {"majority_sign_method": "most"}, ValueError, "majority_sign_method='most' must be one of"),
        ("linear", {"seed": 1}, ValueError, "seed=1 is no option of combination_type='linear'"),
        ("dare_ties", {"seed": "a"}, TypeError, "seed"),
    ],
)
def test_bad_options_leave_nothing_behind(method, kind, options, error, message):
    model, _ = adapted(method)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(2):  # the second attempt is refused as well
        with pytest.raises(error, match=message):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", kind, **options)
    assert set(model.peft_config) == {"a", "b"}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cat", {"density": 0.5}),
        ("cat", {"svd_rank": 2, "majority_sign_method": "total"}),
        ("dare_linear", {"svd_rank": 2}),
        ("svd", {"svd_full_matrices": True, "svd_driver": None}),
        ("ties", {"svd_rank": 2}),
        ("magnitude_prune_svd", {"majority_sign_method": "frequency", "svd_clamp": 0.9}),
    ],
)
def test_options_of_pefts_that_a_type_does_not_use_change_nothing(method, kind, options):
    model, layers = adapted(method)
    model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "plain", kind)
    with pytest.warns(UserWarning, match=rf"is no option of combination_type='{kind}'.* it has no effect"):
        model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "sum", kind, **options)
    for layer in layers.values():
        assert torch.equal(layer.get_delta_weight("sum"), layer.get_delta_weight("plain"))
