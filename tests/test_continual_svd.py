"""Continual SVD: what is protected, how exactly, and what it takes to keep it so."""

import copy
import itertools
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

import peft_subspace
from layers import Net, distance
from models import bert, gpt2, llama, resnet
from peft_subspace import ContinualSVDConfig
from peft_subspace.base_weights.fingerprint import _waves, fingerprint
from peft_subspace.continual import (
    METRIC,
    continual_metrics,
    layer_importance,
    preserve_pattern,
    preserve_schedule,
    save_heatmap,
    subspace_leak,
)
from peft_subspace.core import complement, projection
from peft_subspace.core.shapes import WeightShape
from peft_subspace.methods.continual_svd import delta
from peft_subspace.tuner.layer import SubspaceLayer
from tables import failing

CONSTRAINTS = ["both", "core", "input", "output"]
SHAPES = [(12, 9), (9, 12), (10, 10)]
LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def linear(m, n, dtype=torch.float32):
    torch.manual_seed(m * n)
    return Net(nn.Linear(n, m)).to(dtype)


def adapted(model, **options):
    return get_peft_model(model, ContinualSVDConfig(**{"target_modules": ["layer"], **options}))


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SubspaceLayer)}


def only(model):
    (layer,) = layers(model).values()
    return layer


def trainables(model):
    return [p for p in model.parameters() if p.requires_grad]


def oracle_leaks(weight, update, k, constraint):
    """What of an update is protected, with projectors from an SVD of the weight in double precision."""
    U, _, Vh = torch.linalg.svd(weight.double().flatten(1))
    left, right = U[:, :k] @ U[:, :k].T, Vh[:k].T @ Vh[:k]
    update = update.double().flatten(1)
    found = {
        "both": [left @ update, update @ right],
        "core": [left @ update @ right],
        "input": [update @ right],
        "output": [left @ update],
    }[constraint]
    return max((part.norm() / update.norm()).item() for part in found)


def train(model, optimizer, steps=200, size=9):
    generator = torch.Generator().manual_seed(7)
    dtype = only(model).get_base_layer().weight.dtype
    for _ in range(steps):
        x = torch.randn(16, size, generator=generator).to(dtype)
        y = model(x)
        (y.float() - torch.randn(y.shape, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------ subspaces


@pytest.mark.parametrize(("size", "count"), [(9, 0), (9, 1), (9, 4), (9, 7), (9, 9)])
def test_reflection_gives_an_orthonormal_complement_of_any_number_of_directions(size, count):
    head = torch.linalg.qr(torch.randn(size, count, dtype=torch.float64)).Q
    reflector = complement.reflection(head)
    assert reflector.shape == (size, count)
    Q = torch.eye(size, dtype=torch.float64) - reflector @ reflector.T
    assert torch.allclose(Q @ Q, torch.eye(size, dtype=torch.float64), atol=1e-12)
    basis = complement.lift(reflector, torch.eye(size - count, dtype=torch.float64))
    assert torch.allclose(basis, Q[:, count:], atol=1e-12)
    assert (head.T @ basis).norm() < 1e-12
    assert torch.allclose(basis.T @ basis, torch.eye(size - count, dtype=torch.float64), atol=1e-12)


def spectrum(values, m, n):
    left, right = (torch.linalg.qr(torch.randn(d, len(values), dtype=torch.float64)).Q for d in (m, n))
    return (left * values) @ right.T


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40), (30, 30)])
@pytest.mark.parametrize("last", [1.0, -3.0, -9.0])
def test_singular_vectors_are_those_of_an_svd_for_any_spectrum(m, n, last):
    values = torch.logspace(1, last, 30, dtype=torch.float64)
    matrix = spectrum(values, m, n).float()
    U, _, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    for count in (0, 1, 12, 25):
        left, right = projection.singular_vectors(matrix, count)
        for found, true in ((left, U[:, :count]), (right, Vh[:count].T)):
            assert found.shape == true.shape
            assert (found.T @ found - torch.eye(count)).norm() < 1e-12
            if last < 1.0:  # equal values have no order
                assert (found - true @ (true.T @ found)).norm() < 1e-5


SPECTRA = {
    "flat": torch.ones(300),
    "linear": torch.linspace(1, 0.1, 300),
    "two decades": torch.logspace(0, -2, 300),
    "six decades": torch.logspace(0, -6, 300),
    "half the rank": torch.linspace(1, 0.1, 300) * (torch.arange(300) < 150),
    "less than half": torch.logspace(0, -1, 300) * (torch.arange(300) < 120),
    "two alike at the cut": torch.linspace(1, 0.1, 300).index_fill(0, torch.tensor([149, 150]), 0.55),
    "two almost alike at the cut": torch.linspace(1, 0.1, 300).index_put(
        (torch.tensor([149, 150]),), torch.tensor([0.55, 0.55 - 1e-6])
    ),
    "large ones first": torch.cat([torch.linspace(100, 10, 8), torch.linspace(1, 0.1, 292)]),
}


@pytest.mark.parametrize("spectrum_name", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(300, 300), (500, 300), (300, 500)])
def test_bases_of_large_weights_leak_less_than_promised(m, n, spectrum_name):
    """Whatever the precision in which they were found: against the SVD in double precision."""
    torch.manual_seed(3)
    whole = spectrum(SPECTRA[spectrum_name].double(), m, n)
    for matrix in (whole.float(), 1e-6 * whole.float(), whole.bfloat16().float()):
        check_bases(matrix)


def check_bases(matrix):
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    decided = (S[149] - S[150]) / S[0] > 1e-9  # else either side of the cut is as good
    for outside in ((False, False), (True, True)):
        for basis, true, other in zip(
            projection.singular_bases(matrix, 150, outside), (U, Vh.T), outside, strict=True
        ):
            basis = basis.double()
            count = basis.shape[1]
            assert count == (len(true) - 150 if other else 150)
            assert (basis.T @ basis - torch.eye(count)).norm() < 1e-5 * count**0.5
            inside = true[:, :150].T @ basis
            if decided:
                leaked = inside.norm() if other else (basis - true[:, :150] @ inside).norm()
                assert leaked < 3e-6 * min(count, 150) ** 0.5


def test_single_precision_does_for_most_weights(monkeypatch):
    """And not where the user has lowered the precision of products."""
    exact = []
    plain = projection.singular_vectors
    monkeypatch.setattr(projection, "singular_vectors", lambda *args: exact.append(args) or plain(*args))
    matrix = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    projection.singular_bases(matrix, 150, (True, False))
    assert not exact
    projection.singular_bases(spectrum(SPECTRA["six decades"].double(), 300, 400).float(), 150, (True, False))
    assert len(exact) == 1
    torch.set_float32_matmul_precision("high")
    try:
        projection.singular_bases(matrix, 150, (True, False))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(exact) == 2
    with torch.autocast("cpu", torch.bfloat16):
        projection.singular_bases(matrix, 150, (True, False))
    assert len(exact) == 3


def test_weight_of_zeros_still_gives_orthonormal_directions():
    left, right = projection.singular_vectors(torch.zeros(5, 8), 3)
    for found in (left, right):
        assert torch.allclose(found.T @ found, torch.eye(3, dtype=torch.float64))


# ------------------------------------------------------------------------------------------ the update


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("r", [None, 3])
def test_random_start_is_confined_and_counts_as_documented(constraint, r):
    def check(shape, preserve):
        m, n = shape
        model = adapted(linear(m, n), r=r, preserve=preserve, constraint=constraint, init_weights=False)
        layer = only(model)
        update = layer.get_delta_weight("default")
        assert update.norm() > 0.01
        assert oracle_leaks(layer.get_base_layer().weight, update, preserve, constraint) < 1e-6
        full = {
            "both": (m - preserve) * (n - preserve),
            "core": m * n - preserve**2,
            "input": m * (n - preserve),
            "output": (m - preserve) * n,
        }[constraint]
        expected = full if r is None else r * (m + n) * (2 if constraint == "core" else 1)
        assert sum(p.numel() for p in trainables(model)) == expected

    assert not failing(itertools.product(SHAPES, [0, 2, 5, 8]), check)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_whole_complement_reaches_every_allowed_update(constraint):
    def check(shape, preserve):
        model = adapted(linear(*shape), preserve=preserve, constraint=constraint, scaling="paper")
        layer = only(model)
        rows = []  # the update that each single entry of the parameter makes
        for parameter in trainables(model):
            for index in range(parameter.numel()):
                parameter.data.view(-1)[index] = 1.0
                rows.append(layer.get_delta_weight("default").double().flatten())
                parameter.data.zero_()
        reached = torch.stack(rows)
        # An isometry: as many orthonormal directions as there are numbers, so that none is missing.
        gram = reached @ reached.T
        assert torch.allclose(gram, torch.eye(len(rows), dtype=torch.float64), atol=1e-5)

    assert not failing(itertools.product(SHAPES, [2, 7]), check)


@pytest.mark.parametrize("build", [gpt2, resnet], ids=["Conv1D and Embedding", "Conv2d"])
@pytest.mark.parametrize("r", [None, 2])
def test_other_kinds_of_layers_are_confined_as_well(build, r):
    targets = ["c_fc", "c_attn", "wte"] if build is gpt2 else ["convolution"]
    model = adapted(build(), r=r, target_modules=targets, init_weights=False)
    found = layers(model)
    assert len(found) > 2
    for layer in found.values():
        weight = layer.kind.to_layout(layer.get_base_layer().weight)
        update = layer.kind.to_layout(layer.get_delta_weight("default"))
        assert oracle_leaks(weight, update, layer.deltas["default"].directions, "both") < 1e-5


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("r", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    ],
    ids=["adamw", "sgd"],
)
def test_nothing_leaks_in_200_steps(constraint, r, dtype, make):
    model = adapted(linear(12, 9, dtype), r=r, constraint=constraint)
    layer = only(model)
    train(model, make(trainables(model)))
    update = layer.get_delta_weight("default")
    assert update.norm() > 1e-2
    assert oracle_leaks(layer.get_base_layer().weight, update, 4, constraint) < 1e-5
    assert subspace_leak(model)["max"] < 1e-5
    assert subspace_leak(model, from_weight=True)["max"] < 1e-5


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("r", [None, 3])
@pytest.mark.parametrize("preserve", [3, 7])
def test_confinement_survives_autocast_and_casting_the_model(constraint, r, preserve):
    model = adapted(linear(12, 9), r=r, constraint=constraint, preserve=preserve).bfloat16()
    assert {p.dtype for p in trainables(model)} == {torch.float32}
    optimizer = torch.optim.AdamW(trainables(model), lr=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, optimizer, steps=20)
        factors = only(model).deltas["default"].factors()
    product = factors[0].double()
    for factor in factors[1:]:
        product = product @ factor.double()
    assert oracle_leaks(linear(12, 9).layer.weight, product, preserve, constraint) < 1e-5
    assert subspace_leak(model)["max"] < 1e-5


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("r", [None, 3])
@pytest.mark.parametrize("preserve", [3, 7])
def test_leak_is_measured_where_there_is_one(constraint, r, preserve):
    model = adapted(linear(12, 9), r=r, constraint=constraint, preserve=preserve, init_weights=False)
    layer = only(model)
    foreign = torch.randn(12, 9)
    layer.exact_update = lambda name: foreign
    expected = oracle_leaks(layer.get_base_layer().weight, foreign, preserve, constraint)
    assert expected > 0.1
    for from_weight in (False, True):
        report = subspace_leak(model, from_weight=from_weight)
        assert report["max"] == pytest.approx(expected, rel=1e-5)
        assert max(report["modules"]["layer"].values()) == report["max"]


def test_leak_of_no_update_is_zero_and_of_no_adapter_an_error():
    model = adapted(linear(12, 9))
    assert subspace_leak(model)["max"] == 0.0
    with pytest.raises(ValueError, match="'absent' is no Continual SVD adapter"):
        subspace_leak(model, "absent")


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (4, {}),
        (400, {}),
        (400, {"preserve": 3}),
        (400, {"constraint": "core"}),
        (400, {"constraint": "input"}),
    ],
    ids=["few tokens", "many tokens", "small head", "core", "input"],
)
def test_gradients_do_not_depend_on_how_the_product_is_taken(tokens, options, monkeypatch):
    from peft_subspace.layers import costs

    torch.manual_seed(0)
    model = adapted(Net(nn.Linear(48, 40)), **{"preserve": 0.5, "init_weights": False, **options})
    x = torch.randn(tokens, 48, requires_grad=True)
    chosen = []
    pays = costs._update_pays
    monkeypatch.setattr(costs, "_update_pays", lambda *args: chosen.append(pays(*args)) or chosen[-1])
    results = []
    for force in (None, True, False):
        if force is not None:
            monkeypatch.setattr(costs, "_update_pays", lambda *args, force=force: force)
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trainables(model)])])
    assert chosen == [tokens == 400]
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert distance(found, expected) < 1e-5


# --------------------------------------------------------------------------------- saving and resuming


def no_decomposition(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a decomposition ran")

    monkeypatch.setattr(delta, "singular_bases", refuse)
    for name in ("svd", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("r", [None, 3])
def test_loading_needs_no_decomposition_and_gives_equal_bits(constraint, r, tmp_path, monkeypatch):
    model = adapted(llama(), r=r, constraint=constraint, target_modules=LINEARS, init_weights=False).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 18).reshape(3, 5)
    no_decomposition(monkeypatch)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    own = peft_subspace.load(llama(), tmp_path).eval()
    for other in (again, own):
        for name, layer in layers(other).items():
            delta, wanted = layer.deltas["default"], layers(model)[name].deltas["default"]
            assert all(map(torch.equal, delta.factors(), wanted.factors()))
        with torch.no_grad():
            assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(("preserve", "r"), [(3, None), (7, None), (3, 4), (7, 4)])
def test_file_holds_the_documented_numbers(preserve, r, tmp_path):
    m, n = 12, 9
    adapted(linear(m, n), r=r, preserve=preserve).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        numbers = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 - no dict
    trained = (m - preserve) * (n - preserve) if r is None else r * (m + n)
    sides = 0 if r else m * min(preserve, m - preserve) + n * min(preserve, n - preserve)
    assert numbers == trained + sides + 6


def test_training_resumed_from_a_file_stays_in_the_same_subspace(tmp_path):
    model = adapted(linear(12, 9), r=3)
    train(model, torch.optim.AdamW(trainables(model), lr=1e-2), steps=20)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(linear(12, 9), tmp_path, is_trainable=True)
    for resumed in (model, again):
        train(resumed, torch.optim.AdamW(trainables(resumed), lr=1e-2, weight_decay=0.1), steps=50)
    updates = [only(resumed).get_delta_weight("default") for resumed in (model, again)]
    assert distance(*updates) < 1e-5
    assert oracle_leaks(only(again).get_base_layer().weight, updates[1], 4, "both") < 1e-5


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, peft_subspace.load], ids=["peft", "own"])
def test_adapter_is_refused_on_another_base(load, tmp_path):
    model = adapted(llama(), r=3, target_modules=LINEARS, init_weights=False)
    model.save_pretrained(tmp_path)
    other = llama()
    weight = other.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        change = torch.randn(weight.shape)
        weight += 1e-3 * weight.norm() / change.norm() * change
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: the base weight is not the one"):
        load(other, tmp_path)
    assert before.keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("shape", [(24, 3, 3, 3), (700, 400)], ids=str)
def test_fingerprint_is_that_of_its_definition(shape):
    weight = torch.randn(shape)
    matrix = weight.flatten(1).double()
    left, right = (torch.from_numpy(_waves(size)) for size in matrix.shape)
    projections = torch.einsum("wo,oi,wi->w", left, matrix, right)
    found = fingerprint(weight, weight.dtype)
    assert torch.allclose(found[1:-1], projections.float(), rtol=1e-5, atol=1e-7)
    assert found[0].item() == pytest.approx(matrix.square().mean().sqrt().item())


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,), (torch.float16,), (torch.float64,), (torch.float64, torch.float32)], ids=str
)
def test_adapter_fits_its_base_in_another_dtype(dtypes, tmp_path):
    adapted(llama(), r=3, target_modules=LINEARS).save_pretrained(tmp_path)
    base = llama()
    for dtype in dtypes:
        base = base.to(dtype)
    assert PeftModel.from_pretrained(base, tmp_path).peft_config["default"].initialized


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("preserve", [9, 40])
def test_nothing_left_to_train_is_an_error_that_names_the_module(preserve):
    net = linear(12, 9)
    with pytest.raises(ValueError, match=rf"^layer: preserve={preserve} must be below 9"):
        adapted(net, preserve=preserve)
    assert type(net.layer) is nn.Linear


def test_preserve_pattern_applies_to_the_modules_it_names():
    pattern = {"q_proj": 3, r"model\.layers\.1\.mlp\.up_proj": 0.25}
    model = adapted(llama(), preserve=0.5, preserve_pattern=pattern, target_modules=LINEARS)
    found = {
        name.removeprefix("base_model.model."): layer.deltas["default"].directions
        for name, layer in layers(model).items()
    }
    assert found["model.layers.0.self_attn.q_proj"] == 3
    assert found["model.layers.1.mlp.up_proj"] == 4
    assert found["model.layers.0.mlp.up_proj"] == 8
    assert found["model.layers.0.self_attn.v_proj"] == 4
    with pytest.raises(ValueError, match=r"q_proj: preserve=16 must be below 16"):
        adapted(llama(), preserve_pattern={"q_proj": 16}, target_modules=LINEARS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preserve": 1.0}, ValueError, "preserve=1.0 must be finite, at least 0 and below 1"),
        ({"preserve": -1}, ValueError, "preserve=-1 must be at least 0"),
        ({"preserve": True}, TypeError, "preserve=True must be a whole number"),
        ({"preserve": "half"}, TypeError, "preserve='half' must be a number"),
        ({"preserve_pattern": {"layer": 1.5}}, ValueError, r"preserve_pattern\['layer'\]=1.5"),
        ({"preserve_pattern": ["layer"]}, TypeError, "preserve_pattern"),
        ({"constraint": "left"}, ValueError, "constraint='left' must be one of"),
        ({"constraint": ["both"]}, ValueError, r"constraint=\['both'\] must be one of"),
        ({"directions": {"inputs": 1}}, ValueError, r"directions=\{'inputs': 1\} must be one of"),
        ({"earlier_tasks": {"a": ["merge"]}}, ValueError, r"earlier_tasks\['a'\]=\['merge'\] must be one of"),
        ({"dropout": 0.1}, ValueError, "dropout=0.1 needs a rank; set r"),
        ({"r": 0}, ValueError, "r=0 must be at least 1"),
        ({"r": 2.5}, TypeError, "r=2.5 must be a whole number"),
        ({"earlier_tasks": {"t1": "lost"}}, ValueError, r"earlier_tasks\['t1'\]='lost'"),
    ],
)
def test_impossible_values_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ContinualSVDConfig(**options)


def test_adapters_that_protect_different_directions_have_no_sum():
    model = adapted(linear(12, 9), r=2, init_weights=False)
    model.add_adapter("other", ContinualSVDConfig(r=2, preserve=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match=r"layer: .*protect different directions.*lora_state_dict"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


# ------------------------------------------------------------------------------------------ importance


def text_batches(count=3, size=4):
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        mask = torch.ones(size, 6, dtype=torch.long)
        mask[0, 4:] = 0
        batches.append(
            {"input_ids": torch.randint(3, 37, (size, 6), generator=generator), "attention_mask": mask}
        )
    return batches


def oracle_importance(model, names, batches):
    """Mean cosine by loops over positions that count."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen[name].append((args[0], output))
        )
        for name in names
    ]
    means = {}
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    for name in names:
        cosines = []
        for (x, y), batch in zip(seen[name], batches, strict=True):
            for i, row in enumerate(batch["attention_mask"].tolist()):
                for t in [t for t, kept in enumerate(row) if kept]:
                    width = min(x.shape[-1], y.shape[-1])
                    a, b = x[i, t, :width].double(), y[i, t, :width].double()
                    cosines.append((a @ b / (a.norm() * b.norm())).item())
        means[name] = max(sum(cosines) / len(cosines), 0.0)
    total = sum(means.values()) / len(means)
    return {name: mean / total for name, mean in means.items()}


def test_importance_is_the_normalized_mean_cosine():
    model = bert()
    for layer in model.bert.encoder.layer:  # so that outputs have to do with inputs
        for linear_layer in (layer.attention.self.query, layer.intermediate.dense):
            linear_layer.weight.data += torch.eye(*linear_layer.weight.shape)
    found = layer_importance(model, text_batches(), target_modules=["query", "intermediate.dense", "value"])
    expected = oracle_importance(model, list(found), text_batches())
    assert len(found) == 6
    assert found == pytest.approx(expected, abs=1e-5)
    assert sum(found.values()) / len(found) == pytest.approx(1.0)


def test_importance_leaves_the_model_alone_and_sees_its_adapters():
    targets = ["query", "key", "value", "dense"]
    model = adapted(bert().train(), target_modules=targets, init_weights=False, preserve=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    found = layer_importance(model, text_batches())
    assert list(found) == [name.removeprefix("base_model.model.") for name in layers(model)]
    with model.disable_adapter():
        assert layer_importance(model, text_batches()) != found
    assert model.training
    assert grads == [p.requires_grad for p in model.parameters()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())


def test_importance_of_convolutions_compares_channels_averaged_over_positions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(5, 4, 1))
    for layer in net:
        layer.bias.data += 1.0
    x = torch.rand(4, 3, 9, 9)
    found = layer_importance(net, [x], target_modules=["0", "1"])
    means = []
    with torch.no_grad():
        for layer, (a, b) in zip(net, ((x, net[0](x)), (net[0](x), net(x))), strict=True):
            width = min(layer.in_channels, layer.out_channels)
            a, b = a.mean((2, 3))[:, :width], b.mean((2, 3))[:, :width]
            means.append(nn.functional.cosine_similarity(a, b).mean().clamp_min(0).item())
    assert [found["0"], found["1"]] == pytest.approx([2 * m / sum(means) for m in means], abs=1e-5)


def test_importance_guards_against_means_that_cannot_be_divided_by():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[0].weight.data = -torch.eye(4)
    net[1].weight.data = -torch.eye(4)
    with pytest.warns(UserWarning, match="too close to zero to divide by"):
        found = layer_importance(net, [torch.randn(5, 4)], target_modules=["0", "1"])
    assert found == {"0": 1.0, "1": 1.0}


def test_importance_wants_enough_samples():
    with pytest.raises(ValueError, match="gave 12 samples, but min_samples=13"):
        layer_importance(bert(), text_batches(), target_modules=["query"], min_samples=13)
    with pytest.raises(ValueError, match="gave 4 samples"):
        layer_importance(bert(), text_batches(), target_modules=["query"], min_samples=5, num_batches=1)
    with pytest.raises(ValueError, match="gave 0 samples"):
        layer_importance(bert(), [], target_modules=["query"])
    with pytest.raises(ValueError, match="match no module"):
        layer_importance(bert(), text_batches(), target_modules=["absent"])


def test_pattern_from_importance_is_the_papers_formula_clamped():
    names = ["a.0.query", "a.1.query", "a.1.query.b", "c"]
    pattern = preserve_pattern(dict(zip(names, [0.0, 1.0, 0.5, 2.0], strict=True)), minimum=0.1, target=0.8)
    assert list(pattern) == [r"a\.1\.query\.b", r"a\.0\.query", r"a\.1\.query", "c"]
    assert list(pattern.values()) == pytest.approx([0.45, 0.1, 0.8, 0.99])
    config = ContinualSVDConfig(preserve_pattern=pattern)
    assert [config.spec_for(name, WeightShape(100, 100)).inputs / 100 for name in names] == pytest.approx(
        [0.1, 0.8, 0.45, 0.99]
    )
    with pytest.raises(ValueError, match=r"minimum=0\.9 must be at most target=0\.8"):
        preserve_pattern({"a": 1.0}, minimum=0.9)
    with pytest.raises(ValueError, match=r"target=1\.0"):
        preserve_pattern({"a": 1.0}, target=1.0)


def test_schedule_is_the_papers_fraction():
    assert [preserve_schedule(task, 4) for task in range(1, 5)] == [0.0, 0.25, 0.5, 0.75]
    for task in (0, 5):
        with pytest.raises(ValueError, match=f"task={task} must be from 1 to n_tasks=4"):
            preserve_schedule(task, 4)


# --------------------------------------------------------------------------------------------- metrics

NAN = math.nan
MATRIX = [[0.9, 0.3, 0.2], [0.8, 0.85, 0.25], [0.6, 0.88, 0.7]]


def test_metrics_equal_those_by_loops():
    baseline = [0.5, 0.25, 0.3]
    T = len(MATRIX)
    backward = forgetting = forward = 0.0
    for j in range(T - 1):
        backward += (MATRIX[T - 1][j] - MATRIX[j][j]) / (T - 1)
        best = 0.0
        for i in range(j, T - 1):
            best = max(best, MATRIX[i][j])
        forgetting += (best - MATRIX[T - 1][j]) / (T - 1)
        forward += (MATRIX[j][j + 1] - baseline[j + 1]) / (T - 1)
    expected = {
        "average_accuracy": sum(MATRIX[T - 1]) / T,
        "backward_transfer": backward,
        "forgetting": forgetting,
        "forward_transfer": forward,
    }
    assert continual_metrics(MATRIX, baseline) == pytest.approx(expected)
    assert "forward_transfer" not in continual_metrics(MATRIX)
    unseen = [[0.9, NAN, NAN], [0.8, 0.85, NAN], [0.6, 0.88, 0.7]]
    del expected["forward_transfer"]
    assert continual_metrics(unseen) == pytest.approx(expected)
    assert math.isnan(continual_metrics([[0.5]])["forgetting"])


def test_metrics_explain_wrong_shapes():
    with pytest.raises(ValueError, match=r"2 rows of lengths \[2, 1\]"):
        continual_metrics([[0.1, 0.2], [0.3]])
    with pytest.raises(ValueError, match="baseline has 1 entries for 3 tasks"):
        continual_metrics(MATRIX, [0.1])


def test_metric_loads_into_evaluate_offline(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate.load(METRIC, cache_dir=str(tmp_path))
    baseline = [0.5, 0.25, 0.3]
    found = metric.compute(accuracies=MATRIX, baseline=baseline)
    assert found == pytest.approx(continual_metrics(MATRIX, baseline))


def test_heatmap_is_a_picture_with_a_name_for_each_task(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "accuracies.png"
    save_heatmap([[0.9, NAN], [0.8, 0.7]], ["first", "second"], path, "two tasks")
    assert path.read_bytes().startswith(b"\x89PNG")
    width = image.imread(path).shape[1]
    save_heatmap([[0.9, NAN], [0.8, 0.7]], ["first", "second"], path, "two tasks " * 9)
    assert image.imread(path).shape[1] > 1.5 * width  # nothing of the title is cut off
    with pytest.raises(ValueError, match="1 names for 3 rows"):
        save_heatmap(MATRIX, ["first"], path)


def test_heatmap_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        save_heatmap(MATRIX, ["a", "b", "c"], tmp_path / "a.png")


def test_copies_share_nothing():
    model = adapted(linear(12, 9), r=2, init_weights=False)
    twin = copy.deepcopy(model)
    for parameter in trainables(twin):
        parameter.data.zero_()
    assert only(model).get_delta_weight("default").any()
