"""Methods of examples/methods: each is its equation, and lives like any other adapter."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import peft_subspace
from house import code_lines

FOLDER = Path(__file__).parent.parent / "examples" / "methods"
NAMES = ["conv", "transposed", "linear"]
X = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(2))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.transposed = Conv1D(7, 8)
        self.linear = nn.Linear(7, 5)

    def forward(self, x):
        return self.linear(self.transposed(self.conv(x).mT.contiguous()))


# ------------------------------------------------------------------------- equations, as loops over rows


def dora(delta, weight):
    """Rows of the tuned weight, `(out, columns)`, of those of the weight."""
    rows = weight + delta.B @ delta.A
    return torch.stack([m * row / row.square().sum().sqrt() for m, row in zip(delta.m, rows, strict=True)])


def lora_fa(delta, weight):
    A = delta.A.flatten(1)
    low = [[sum(b[k] * A[k, j] for k in range(len(A))) for j in range(A.shape[1])] for b in delta.B]
    return weight + 8 / len(A) * torch.stack([torch.stack(row) for row in low])


def diff_scaler(delta, weight):
    rows = [
        (1 + a) * row + sum(b[k] * delta.A[k] for k in range(len(delta.A)))
        for a, row, b in zip(delta.a, weight, delta.B, strict=True)
    ]
    return torch.stack(rows)


def moving_mask(delta, weight):
    tuned = [
        row + sum(b[k] * delta.A[k] for k in range(len(b))) for row, b in zip(weight, delta.B, strict=True)
    ]
    scores = [
        [
            abs(tuned[i][j]) + delta.Q[i] @ delta.P[:, j] + delta.u[i, 0] + delta.v[0, j]
            for j in range(len(row))
        ]
        for i, row in enumerate(weight)
    ]
    ordered = sorted((score.item(), i, j) for i, row in enumerate(scores) for j, score in enumerate(row))
    dropped = {(i, j) for _, i, j in ordered[: math.ceil(delta.sparsity.item() * len(ordered))]}
    rows = []
    for i, row in enumerate(tuned):
        kept = [float((i, j) not in dropped) + score - score.detach() for j, score in enumerate(scores[i])]
        rows.append(torch.stack(kept) * row)
    return torch.stack(rows)


def intrinsic_dimension(delta, weight):
    shared = delta.shared_tensors
    sizes = [6 * 3 * 8, 7 * 8, 5 * 7]
    first = sum(sizes[: NAMES.index(delta.spec.name)])
    entries = []
    for position in range(first, first + weight.numel()):
        x = position * 0x9E3779B1 % 2**32
        x = (x ^ (x >> 15)) * 0x85EBCA77 % 2**32
        x ^= x >> 13
        sign = -1 if x >= 2**31 else 1
        entries.append(sign * shared.theta[x % len(shared.theta)] * math.sqrt(len(shared.theta) / sum(sizes)))
    return weight + torch.stack(entries).view_as(weight)


@dataclass(frozen=True)
class Example:
    """A file, the first part of its names, what its update is, and what else is particular."""

    file: str
    name: str
    tuned: Callable[[Any, Tensor], Tensor]
    is_chain: bool = False
    belongs_to_base: bool = True
    options: dict[str, Any] = field(default_factory=lambda: {"r": 3})


EXAMPLES = [
    Example("dora", "DoRA", dora),
    Example("lora_fa", "LoRAFA", lora_fa, is_chain=True, belongs_to_base=False),
    Example("diff_scaler", "DiffScaler", diff_scaler),
    Example("moving_mask", "MovingMask", moving_mask),
    Example(
        "intrinsic_dimension", "Intrinsic", intrinsic_dimension, belongs_to_base=False, options={"r": 31}
    ),
]


@pytest.fixture(scope="module")
def modules():
    """The files, imported; other tests count the registered methods, so that these are forgotten again."""
    known = [
        (mapping, dict(mapping)) for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)
    ]
    sys.path.insert(0, str(FOLDER))
    yield {example.file: import_module(example.file) for example in EXAMPLES}
    sys.path.remove(str(FOLDER))
    for example in EXAMPLES:
        del sys.modules[example.file]
    for mapping, before in known:
        mapping.clear()
        mapping.update(before)


@pytest.fixture(params=EXAMPLES, ids=lambda example: example.file)
def example(request, modules):
    found = request.param
    config = getattr(modules[found.file], f"{found.name}Config")
    return SimpleNamespace(**vars(found), config=lambda **o: config(**{**found.options, **o}))


def adapted(example, **options):
    return get_peft_model(Network(), example.config(target_modules=NAMES, seed=4, **options))


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def dense(model, example):
    """Outputs of the base model with weights made row by row."""
    state = {}
    for name in NAMES:
        layer = model.base_model.model.get_submodule(name)
        weight = layer.get_base_layer().weight.detach()
        rows = (weight.T if name == "transposed" else weight).flatten(1)
        new = example.tuned(layer.deltas["default"], rows)
        state[f"{name}.weight"] = (new.T if name == "transposed" else new).reshape(weight.shape)
    return functional_call(Network(), state, (X,))


def test_starts_at_the_base_model_and_equals_the_loops_after_training(example):
    model = adapted(example)
    torch.testing.assert_close(model(X), Network()(X))
    optimizer = torch.optim.SGD(parameters(model), lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(X).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model(X), dense(model, example), rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_the_loops(example):
    model = adapted(example, init_weights=False)
    found, wanted = (
        torch.autograd.grad(y.sin().sum(), parameters(model)) for y in (model(X), dense(model, example))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_merges_unmerges_and_is_disabled_exactly(example):
    model = adapted(example, init_weights=False)
    expected, state = model(X), copy.deepcopy(model.state_dict())
    assert not torch.allclose(expected, Network()(X), atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with model.disable_adapter():
        assert torch.equal(model(X), Network()(X))
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_several_adapters_each_update_the_original_weight(example):
    model = adapted(example, init_weights=False)
    layer = model.base_model.model.linear
    model.add_adapter("other", example.config(target_modules=NAMES, seed=5, init_weights=False))
    updates = [layer.get_delta_weight(name) for name in ("default", "other")]
    weight = layer.get_base_layer().weight.clone()
    layer.merge(adapter_names=["default"])
    torch.testing.assert_close(layer.get_delta_weight("other"), updates[1])
    layer.merge(adapter_names=["other"])
    torch.testing.assert_close(layer.get_base_layer().weight, weight + sum(updates))


def test_saved_adapter_loads(example, tmp_path):
    model = adapted(example, init_weights=False)
    model.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        torch.testing.assert_close(load(Network(), tmp_path)(X), model(X))
        other = Network()
        other.linear.weight.data += 0.1
        if example.belongs_to_base:
            with pytest.raises(ValueError, match="linear: the base weight is not the one"):
                load(other, tmp_path)
        else:
            load(other, tmp_path)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
def test_what_needs_factors_is_refused_to_what_has_none(example, tmp_path):
    model = adapted(example, init_weights=False)
    if example.is_chain:
        peft_subspace.export_lora(model, tmp_path / "lora")
        torch.testing.assert_close(PeftModel.from_pretrained(Network(), tmp_path / "lora")(X), model(X))
        return
    with pytest.raises(ValueError, match="an update that is no chain of matrices"):
        peft_subspace.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with pytest.raises(ValueError, match="no adapter of this method is their sum"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


# --------------------------------------------------------------------------------- what single files promise


def test_scaler_trains_shifts_as_well(modules):
    config = modules["diff_scaler"].DiffScalerConfig(r=3, target_modules=NAMES, bias="examplediffscaler_only")
    model = get_peft_model(Network(), config)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a", "A", "B", "bias"}


def test_one_vector_trains_in_the_whole_model_and_its_projection_keeps_norms(modules):
    example = next(e for e in EXAMPLES if e.file == "intrinsic_dimension")
    config = modules[example.file].IntrinsicConfig(r=20, target_modules=NAMES, init_weights=False, seed=4)
    model = get_peft_model(Network(), config)
    (theta,) = parameters(model)
    assert theta.shape == (20,)
    layers = [model.base_model.model.get_submodule(name) for name in NAMES]
    total = sum(layer.get_delta_weight("default").square().sum() for layer in layers)
    torch.testing.assert_close(total, theta.square().sum(), rtol=0.3, atol=0.0)


def test_dimension_is_the_smallest_size_that_reaches_the_share(modules):
    measure = modules["intrinsic_dimension"].measure_dimension
    seen = []

    def train(model):
        size = sum(p.numel() for p in parameters(model))
        seen.append(size)
        return min(1.0, size / 50)

    size, scores = measure(Network, train, [80, 10, 46, 44], NAMES)
    assert size == 46
    assert scores == {None: 1.0, 10: 0.2, 44: 0.88, 46: 0.92}
    assert seen[1:] == [10, 44, 46]
    assert measure(Network, train, [10], NAMES)[0] is None


def test_callback_moves_the_mask(modules):
    """Nothing in the first tenth of the steps, and the final sparsity in the last 30 %."""
    file = modules["moving_mask"]
    model = get_peft_model(Network(), file.MovingMaskConfig(r=3, target_modules=NAMES, seed=4))
    callback, shares = file.SparsityCallback(0.5), []
    for step in range(100):
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=100), None, model=model)
        layer = model.base_model.model.linear
        shares.append((layer.with_updates(layer.get_base_weight(), ["default"]) == 0).float().mean().item())
    assert not any(shares[:10])
    assert shares == sorted(shares)
    assert shares[40] == pytest.approx(0.5 * (1 - 0.5**3), abs=0.03)
    assert shares[70:] == [pytest.approx(0.5, abs=0.02)] * 30


def test_files_are_short():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(example.file for example in EXAMPLES)
    for path in FOLDER.glob("*.py"):
        assert code_lines(path.read_text()) <= 60, path


def test_worked_example_is_the_text_of_its_file():
    guide = (FOLDER.parent.parent / "docs" / "developer" / "adding_a_method.md").read_text()
    text = guide.partition("<!-- example: method -->\n```python\n")[2].partition("```")[0]
    assert text
    assert (FOLDER / "lora_fa.py").read_text().endswith(text)
