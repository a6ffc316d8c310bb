"""Learned masks of compositions: their equation, the two levels that train them, perturbations, bad input."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call

import oracles
import peft_subspace
from compositions import Network, X, logits, saved_and_exported, saved_sources, summed
from layers import BF16, FP32, adapt, dense, distance, outputs
from methods import Method
from peft_subspace.methods.composition.delta import CompositionDelta
from peft_subspace.methods.composition.perturbation import Perturbations
from test_algebra_contract import assert_gradients_equal_the_oracles

MASKS = ["structured", "entries"]
NAMES = {"structured": ("out", "rank", "in"), "entries": ("entries",)}
T = 0.5
METHODS = [
    Method(
        name,
        peft_subspace.CompositionConfig,
        oracles.composition,
        {"r": 2, "per": "component", "mask": name},
        stays_fp32=True,
    )
    for name in MASKS
]


class Worded(nn.Module):
    """A network with input embeddings."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.words, self.network = nn.Embedding(9, 6), Network()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids):
        return self.network(self.words(input_ids).mean(1))


WORDS = torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def sources(tmp_path):
    return saved_sources(tmp_path)


def composed(sources, mask="structured", **options):
    return peft_subspace.compose(Network(), sources, mask=mask, **{"start": 0.3, **options})


def deltas(model):
    return {m.spec.name: m for m in model.modules() if isinstance(m, CompositionDelta)}


def scatter(model, seed=0):
    """Random logits for all masks."""
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas(model).values():
        for name in delta.masks:
            delta.logits(name).data.normal_(generator=generator)


def entries(delta, c, x, u=None):
    """The update in double precision, entry by entry; `c` and `x` have gradients."""
    u = dict.fromkeys(x) if u is None else u
    masks = {name: oracles.relaxed(x[name], T, u[name]) for name in x}
    left, right = delta.left.double(), delta.right.double().flatten(1)
    owner = [t for t, rank in enumerate(delta.ranks) for _ in range(rank)]
    values = []
    for i, j in product(range(len(left)), range(right.shape[1])):
        total = 0.0
        for k, t in enumerate(owner):
            total = total + c[t] * masks.get("rank", torch.ones(len(owner)))[k] * left[i, k] * right[k, j]
        if "out" in masks:
            total = masks["out"][i] * total * masks["in"].flatten()[j]
        else:
            total = masks["entries"].flatten()[i * right.shape[1] + j] * total
        values.append(total)
    return torch.stack(values).reshape(delta.shape.dims)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("per", ["task", "module", "component"])
def test_masks_begin_as_ones(mask, per, sources):
    model = composed(sources, mask, per=per)
    assert distance(logits(model), summed(sources, [0.3] * 3)) < 1e-5
    for delta in deltas(model).values():
        assert delta.masks == NAMES[mask]


@pytest.mark.parametrize("mask", MASKS)
def test_update_is_that_of_loops_with_and_without_samples(mask, sources):
    model = composed(sources, mask, temperature=T)
    scatter(model)
    for number, delta in enumerate(deltas(model).values()):
        c = delta.coefficients.data.normal_(generator=torch.Generator().manual_seed(number)).double()
        x = {name: delta.logits(name).detach() for name in delta.masks}
        assert distance(delta.update(None).detach(), entries(delta, c, x)) < 1e-5
        generator = torch.Generator().manual_seed(7)
        u = {name: torch.rand(x[name].shape, generator=generator) for name in x}
        delta.draw(torch.Generator().manual_seed(7))
        assert distance(delta.update(None).detach(), entries(delta, c, x, u)) < 1e-4
        delta.noise = {}
        assert distance(delta.update(None).detach(), entries(delta, c, x)) < 1e-5


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("per", ["task", "module"])
def test_masked_composition_is_saved_loaded_exported_and_merged(mask, per, sources, tmp_path):
    model = composed(sources, mask, per=per)
    scatter(model)
    assert distance(logits(model), summed(sources, [0.3] * 3)) > 1e-3
    again, lora = saved_and_exported(model, tmp_path)
    rank = max(sum(delta.spec.ranks) for delta in deltas(model).values())
    assert mask == "entries" or lora.peft_config["default"].r == rank
    model.add_weighted_adapter(["default"], [0.5], "two", combination_type="cat")
    model.set_adapter("two")
    half = {name: m.get_delta_weight("two") for name, m in model.named_modules() if hasattr(m, "deltas")}
    for name, update in half.items():
        assert distance(update, model.get_submodule(name).get_delta_weight("default") / 2) < 1e-5
    assert distance(logits(again.merge_and_unload()), logits(lora)) < 1e-5


def test_only_a_mask_of_entries_raises_the_rank(sources):
    for mask in MASKS:
        model = composed(sources[:1], mask)
        scatter(model)
        delta = deltas(model)["layer"]
        rank = torch.linalg.matrix_rank(delta.update(None).detach(), rtol=1e-4)
        assert rank == 3 if mask == "structured" else rank > 3


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("setting", [FP32, BF16], ids=str)
def test_masks_on_every_kind_of_layer_equal_the_dense_oracle(method, case, setting):
    model, x = adapt(method, case, setting), case.inputs(setting.dtype)
    expected = dense(model, method, x)
    assert distance(outputs(model, x), expected) < setting.tolerance
    assert_gradients_equal_the_oracles(model, method, x, setting.tolerance)
    model.merge_adapter()
    assert distance(outputs(model, x), expected) < setting.tolerance


# --------------------------------------------------------------------------------------- two levels


class Adam:
    """Adam on lists of tensors, by its formulas."""

    def __init__(self, rate):
        self.rate, self.count, self.means = rate, 0, {}

    def step(self, values, gradients):
        self.count += 1
        result = []
        for key, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
            first, second = self.means.get(key, (0.0, 0.0))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            self.means[key] = first, second
            mean, square = first / (1 - 0.9**self.count), second / (1 - 0.999**self.count)
            result.append(value - self.rate * mean / (square.sqrt() + 1e-8))
        return result


def entropy(found):
    p = found.softmax(-1)
    return sum(-(q * q.log()).sum() for q in p) / len(p)


def outputs_with(made, c, x, u, rows, network=Network):
    """Outputs of the base model plus the updates of loops."""
    base = network().double()
    state = dict(base.named_parameters())
    for name, delta in made.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + entries(delta, c[name], x[name], u[name])
    return functional_call(base, state, (rows,))["logits"]


def learned_by_loops(made, steps, rate, inner_steps, inner_rate, seed):
    """Logits of the masks after some steps on batches by task."""
    generator, outer = torch.Generator().manual_seed(seed), Adam(rate)
    places = [(name, mask) for name, delta in made.items() for mask in delta.masks]
    x = {name: {m: delta.logits(m).detach().double() for m in delta.masks} for name, delta in made.items()}
    start = {name: delta.coefficients.detach().double() for name, delta in made.items()}
    for tasks in steps:
        u = {
            name: {m: torch.rand(x[name][m].shape, generator=generator) for m in delta.masks}
            for name, delta in made.items()
        }
        c, inner = dict(start), Adam(inner_rate)
        for _ in range(inner_steps):
            c = {name: value.detach().requires_grad_() for name, value in c.items()}
            loss = sum(entropy(outputs_with(made, c, x, u, rows)) for rows in tasks.values()) / len(tasks)
            gradients = torch.autograd.grad(loss, list(c.values()))
            c = dict(zip(c, inner.step([v.detach() for v in c.values()], gradients), strict=True))
        for name, mask in places:
            x[name][mask] = x[name][mask].detach().requires_grad_()
        loss = sum(entropy(outputs_with(made, c, x, u, rows)) for rows in tasks.values()) / len(tasks)
        held = [x[name][mask] for name, mask in places]
        moved = outer.step([v.detach() for v in held], torch.autograd.grad(loss, held))
        for (name, mask), value in zip(places, moved, strict=True):
            x[name][mask] = value
    return x


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("inner_steps", [0, 2])
def test_masks_are_learned_in_two_levels_as_loops_learn_them(mask, inner_steps, sources):
    model = composed(sources[:2], mask, temperature=T).eval()
    made = deltas(model)
    steps = [{"a": X[:2], "b": X[2:]}, {"a": X[1:3], "b": X[3:]}]
    wanted = learned_by_loops(
        made, [{t: r.double() for t, r in s.items()} for s in steps], 0.1, inner_steps, 0.2, 3
    )
    options = {"learning_rate": 0.1, "inner_steps": inner_steps, "inner_learning_rate": 0.2, "seed": 3}
    losses = peft_subspace.learn_masks(model, steps, **options)
    assert len(losses) == 2
    for name, delta in made.items():
        assert not delta.noise
        assert torch.equal(delta.coefficients, torch.full_like(delta.coefficients, 0.3))
        for mask_ in delta.masks:
            found = delta.logits(mask_).detach()
            assert found.abs().max() > 0.05
            assert distance(found, wanted[name][mask_]) < 1e-3, (name, mask_)


@pytest.mark.parametrize("per", ["task", "component"])
def test_masks_lower_the_loss_and_nothing_else_changes(per, sources):
    model = composed(sources, per=per, modules_to_save=["conv"] if per == "task" else None).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    at_first = peft_subspace.entropy_loss(model(X)).detach()
    drawn = torch.random.get_rng_state()
    peft_subspace.learn_masks(model, [{"all": X}] * 30, learning_rate=0.05)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert peft_subspace.entropy_loss(model(X)).detach() < at_first
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("mask_" in name), name
        assert parameter.grad is None


def test_labels_serve_as_well(sources):
    model = composed(sources)
    batch = {"input_ids": X, "labels": torch.arange(5) % 4}
    at_first = model(**batch)["loss"].detach()
    peft_subspace.learn_masks(
        model, [{"all": batch}] * 30, loss=lambda outputs, batch: outputs["loss"], learning_rate=0.05
    )
    assert model(**batch)["loss"].detach() < at_first


def test_learning_is_repeated_by_its_seed(sources):
    found = []
    for seed in (1, 1, 2):
        model = composed(sources)
        peft_subspace.learn_masks(model, [{"all": X}] * 3, seed=seed)
        found.append(deltas(model)["layer"].mask_out.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ------------------------------------------------------------------------------------ perturbations


def test_perturbations_change_predictions_within_their_radius():
    model = Worded()
    attack = Perturbations.of(model, 2.0)
    plain = model(WORDS)["logits"]

    def disagreement():
        with attack.added("a"), torch.no_grad():
            return float(nn.functional.cross_entropy(model(WORDS)["logits"], plain.argmax(-1)))

    before = disagreement()
    for _ in range(30):
        attack.ascend("a", lambda: model(WORDS))
        assert attack.values["a"].norm() < 2.0 + 1e-5
    assert disagreement() > before + 0.1
    assert attack.values["a"].norm() > 1.9
    # in units of the mean norm of the embeddings, at every token
    words = model.words(WORDS)
    moved = words + words.norm(dim=-1).mean() * attack.values["a"]
    with attack.added("a"):
        found = model(WORDS)["logits"]
    assert distance(found, model.network(moved.mean(1))["logits"]) < 1e-5
    assert torch.equal(model(WORDS)["logits"], plain)
    attack.ascend("b", lambda: model(WORDS))
    assert math.isclose(float(attack.values["b"].detach().norm()), 0.2, rel_tol=1e-4)


def test_perturbed_inputs_add_their_loss_as_loops_add_it(tmp_path):
    folders = []
    for number, rank in enumerate((2, 3)):
        config = peft_subspace.FLoRAConfig(r=rank, target_modules=["layer"], init_weights=False, seed=number)
        folders.append(tmp_path / str(number))
        get_peft_model(Worded(), config).save_pretrained(folders[-1])
    model = peft_subspace.compose(Worded(), folders, mask="structured", start=0.3, temperature=T).eval()
    made = deltas(model)
    generator = torch.Generator().manual_seed(0)
    x = {
        n: {m: torch.zeros(d.logits(m).shape, dtype=torch.float64) for m in d.masks} for n, d in made.items()
    }
    u = {n: {m: torch.rand(d.logits(m).shape, generator=generator) for m in d.masks} for n, d in made.items()}
    c = {n: torch.full((2,), 0.3, dtype=torch.float64) for n in made}
    words = Worded().double().words(WORDS)
    size = words.detach().norm(dim=-1).mean()

    def outputs(vector):
        class Moved(Worded):
            def forward(self, input_ids):
                return self.network((words.detach() + size * vector).mean(1))

        return outputs_with(made, c, x, u, WORDS, Moved)

    vector = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    predicted = outputs(vector).argmax(-1)
    loss = nn.functional.cross_entropy(outputs(vector), predicted)
    (gradient,) = torch.autograd.grad(loss, vector)
    vector = 0.5 / 10 * gradient / gradient.norm()
    held = [x[n][m].requires_grad_() for n in made for m in made[n].masks]
    total = entropy(outputs(torch.zeros(6))) + 0.7 * entropy(outputs(vector))
    wanted = Adam(0.1).step([v.detach() for v in held], torch.autograd.grad(total, held))
    (found,) = peft_subspace.learn_masks(
        model, [{"a": {"input_ids": WORDS}}], learning_rate=0.1, inner_steps=0, perturbed=0.7
    )
    assert found == pytest.approx(float(total.detach()), rel=1e-5)
    for (name, mask), value in zip([(n, m) for n in made for m in made[n].masks], wanted, strict=True):
        assert distance(made[name].logits(mask).detach(), value) < 1e-3


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": "rows"}, ValueError, r"mask='rows' must be one of \(None, 'structured', 'entries'\)"),
        ({"temperature": 0}, ValueError, r"temperature=0 must be finite, at least 0\.001"),
        ({"temperature": "cold"}, TypeError, r"temperature='cold' must be a number"),
    ],
)
def test_bad_masks_are_refused(options, error, message, sources):
    with pytest.raises(error, match=message):
        composed(sources, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": []}, ValueError, r"batches=\[\] must have for each step a batch by the name"),
        ({"batches": [X]}, ValueError, r"must have for each step a batch by the name of its task"),
        ({"inner_steps": -1}, ValueError, r"inner_steps=-1 must be at least 0"),
        ({"learning_rate": -1.0}, ValueError, r"learning_rate=-1\.0 must be finite, at least 0"),
        ({"radius": float("nan")}, ValueError, r"radius=nan must be finite"),
        ({"perturbed": 0.1}, ValueError, r"has no get_input_embeddings\(\)"),
        ({"loss": lambda outputs, batch: outputs["logits"]}, TypeError, r"tensor with one entry"),
        (
            {"loss": lambda outputs, batch: outputs["logits"].detach().sum()},
            ValueError,
            r"batch 'a' has no gra",
        ),
        ({"batches": [{"a": X}, {"a": X * float("nan")}]}, ValueError, r"the loss of batch 'a' is nan"),
    ],
)
def test_a_refused_call_changes_nothing(options, error, message, sources):
    model = composed(sources)
    scatter(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        peft_subspace.learn_masks(model, **{"batches": [{"a": X}], **options})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert not any(delta.noise for delta in deltas(model).values())


def test_models_without_masks_are_refused(sources):
    model = peft_subspace.compose(Network(), sources)
    with pytest.raises(ValueError, match=r"model='PeftModel' has no active masks; make it by compose"):
        peft_subspace.learn_masks(model, [{"a": X}])


def test_several_processes_are_refused(sources, monkeypatch):
    model = composed(sources)
    monkeypatch.setattr("peft_subspace.runtime.distributed.world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="masks are learned in one process"):
        peft_subspace.learn_masks(model, [{"a": X}])
