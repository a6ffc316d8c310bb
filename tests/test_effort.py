"""Effort: initialization, regularizers against their definitions, and every way they reach a step."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel, Trainer, TrainingArguments

import oracles
import peft_subspace
from models import llama, vit
from peft_subspace import EffortConfig, RegularizationCallback, regularization_loss
from peft_subspace.core.chain import multiply
from peft_subspace.core.linalg import smallest_triples
from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.methods.effort import EffortDelta
from peft_subspace.tuner.layer import SubspaceLayer
from processes import run_in_two_processes
from quantized import KINDS, WARNINGS, marked

TARGETS = ["q_proj", "k_proj", "down_proj"]  # square, tall and wide
WEIGHTS = {"orthogonality_weight": 0.3, "energy_weight": 0.2}


def adapted(base=None, **options):
    return get_peft_model(base or llama(), EffortConfig(**{"target_modules": TARGETS, **options}))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SubspaceLayer)}


def deltas(model, adapter="default"):
    return [layer.deltas[adapter] for layer in layers(model).values()]


def move(model, scale=0.1, adapter="default"):
    """Take an adapter away from its start."""
    generator = torch.Generator().manual_seed(5)
    for delta in deltas(model, adapter):
        for parameter in delta.parameters():
            parameter.data.normal_(generator=generator).mul_(scale)
    return model


def one_layer(layer, **options):
    return get_peft_model(nn.Sequential(layer), EffortConfig(target_modules=["0"], **options))


def gaussian(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ decomposition


def with_values(values, rows=192):
    left, right = (torch.linalg.qr(gaussian(size, 192, seed=size).double()).Q for size in (rows, 193))
    return (left * torch.as_tensor(values).double()) @ right[:192].T


MATRICES = {
    "square": gaussian(192, 192),
    "tall": gaussian(500, 180),
    "wide": gaussian(180, 250),
    "tall-deficient": gaussian(500, 170) @ gaussian(170, 180, seed=1),
    "small": gaussian(6, 9),
    "condition-1e8": with_values(torch.logspace(0, -8, 192)).float(),
    "deficient": gaussian(192, 170) @ gaussian(170, 192, seed=1),
    "zero-row-and-column": gaussian(192, 192) * (torch.arange(192) > 0) * (torch.arange(192) > 3)[:, None],
    "repeated": with_values([1.0] * 186 + [0.5] * 6, rows=220).float(),
    "orthogonal": with_values([1.0] * 192).float(),
}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("kind", MATRICES)
def test_smallest_triples_equal_those_of_a_full_svd(kind, rank):
    W = MATRICES[kind].double()
    U, S, Vh = (tensor.double() for tensor in smallest_triples(W.float(), rank))
    exact = torch.linalg.svdvals(W)
    norm = exact[0]
    eye = torch.eye(rank, dtype=torch.float64)
    assert (S - exact[-rank:]).abs().max() < 1e-7 * norm
    assert torch.norm(W @ Vh.T - U * S) < 2e-7 * norm
    assert torch.norm(W.T @ U - Vh.T * S) < 2e-7 * norm
    assert torch.norm(U.T @ U - eye) < 1e-6
    assert torch.norm(Vh @ Vh.T - eye) < 1e-6


def test_ill_conditioned_triple_is_the_smallest_and_not_its_neighbor():
    W = MATRICES["condition-1e8"]
    U, _, Vh = torch.linalg.svd(W.double())
    found_U, _, found_Vh = smallest_triples(W, 2)
    assert torch.norm(U[:, :-2].T @ found_U.double()) < 1e-4
    assert torch.norm(found_Vh.double() @ Vh[:-2].T) < 1e-4


@pytest.mark.parametrize("W", [gaussian(200, 200), gaussian(400, 160), MATRICES["orthogonal"]])
def test_decomposition_draws_nothing_and_needs_no_full_svd(W, monkeypatch):
    state = torch.get_rng_state()
    svd = torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda A, **options: svd(A, **options) if min(A.shape) < 40 else None
    )
    one, other = (smallest_triples(W, 2) for _ in range(2))
    assert all(map(torch.equal, one, other))
    assert torch.equal(state, torch.get_rng_state())


def test_a_full_svd_steps_in_where_no_start_converges(monkeypatch):
    W, sizes, svd = gaussian(400, 160), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda A, **options: sizes.append(len(A)) or svd(A, **options))
    _, S, _ = smallest_triples(W, 2, tolerance=0.0)
    assert max(sizes) == 400
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[-2:])


# ------------------------------------------------------------------------------------- start and equation


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(40, 30), gaussian(3, 40)),
        (nn.Conv2d(8, 12, 3, groups=2, padding=1), gaussian(2, 8, 5, 5)),
    ],
)
def test_start_changes_no_bit_and_holds_the_smallest_triples(layer, x):
    wanted = layer(x)
    model = one_layer(copy.deepcopy(layer), r=2)
    assert torch.equal(model(x), wanted)
    (delta,) = deltas(model)
    assert not multiply(delta.factors()).any()
    exact = torch.linalg.svdvals(layer.weight.flatten(1))
    torch.testing.assert_close(delta.S0, exact[-2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.weight.flatten(1) @ delta.Vh0.flatten(1).T, delta.U0 * delta.S0)


def test_random_start_changes_the_output_and_reads_no_weight(monkeypatch):
    monkeypatch.setattr("peft_subspace.methods.effort.delta.smallest_triples", None)
    base = llama().eval()
    ids = torch.arange(5)[None]
    wanted = base(ids).logits
    assert not torch.allclose(adapted(base, init_weights=False).eval()(ids).logits, wanted)


def test_decay_pulls_toward_the_base_model():
    """With no gradient, AdamW's decay leaves the base weight, not one without its smallest triples."""
    model = move(adapted())
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [multiply(delta.factors()).norm() for delta in deltas(model)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=1.0)
    for _ in range(60):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for delta, norm in zip(deltas(model), before, strict=True):
        assert multiply(delta.factors()).norm() < 0.01 * norm


def test_tied_weights_are_decomposed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "peft_subspace.methods.effort.delta.smallest_triples",
        lambda *args: calls.append(1) or smallest_triples(*args),
    )
    base = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    base[2].weight = base[0].weight
    model = get_peft_model(base, EffortConfig(target_modules=["0", "1", "2"]))
    assert len(calls) == 2
    first, second, third = deltas(model)
    assert torch.equal(first.U0, third.U0)
    assert not torch.equal(first.U0, second.U0)
    first.U0.zero_()
    assert third.U0.any()


def test_initialization_shows_its_progress_where_it_is_long(capfd, monkeypatch):
    adapted()
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("peft_subspace.runtime.progress.DELAY", 0.0)
    adapted()
    assert "decomposing weights: 100%" in capfd.readouterr().err


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r=0 must be at least 1"),
        ({"orthogonality_weight": -1.0}, ValueError, "orthogonality_weight=-1.0 must be finite, at least 0"),
        ({"energy_weight": float("nan")}, ValueError, "energy_weight=nan must be finite"),
        ({"energy_weight": -0.1}, ValueError, "energy_weight=-0.1 must be finite, at least 0"),
        ({"energy_weight": "1"}, TypeError, "energy_weight='1' must be a number"),
        ({"init_weights": "svd"}, ValueError, "init_weights='svd' must be one of"),
        ({"bias": "lora_only"}, ValueError, "bias='lora_only' must be one of"),
    ],
)
def test_bad_configs(options, error, message):
    with pytest.raises(error, match=message):
        EffortConfig(**options)


def poisoned(value):
    base = llama()
    weight = base.model.layers[1].self_attn.k_proj.weight.data
    weight.zero_() if value == 0 else weight[1].fill_(value)
    return base


@pytest.mark.parametrize(
    ("base", "options", "error", "message"),
    [
        (
            llama,
            {"rank_pattern": {"k_proj": 9}},
            ValueError,
            r"k_proj: r=9 exceeds 8, .* shape \(8, 16\); lower rank_pattern",
        ),
        (lambda: poisoned(0), {}, ValueError, r"layers\.1\.self_attn\.k_proj: the weight is zero"),
        (lambda: poisoned(float("inf")), {}, ValueError, r"layers\.1\.self_attn\.k_proj: .* NaN or infinite"),
    ],
)
def test_bad_layers_are_named_before_anything_is_replaced(base, options, error, message):
    base = base()
    with pytest.raises(error, match=message):
        adapted(base, **options)
    assert not any("effort" in name for name, _ in base.named_modules())


def test_weights_that_cannot_be_read(monkeypatch):
    def refuse(self):
        raise NotImplementedError("forward only")

    monkeypatch.setattr(SubspaceLayer, "get_base_weight", refuse)
    with pytest.raises(ValueError, match=r"0: the weight of Linear cannot be read.*exclude the module"):
        one_layer(nn.Linear(8, 8))


def test_default_rank_fits_every_layer_and_a_rank_pattern_is_checked():
    assert deltas(one_layer(nn.Linear(1, 5)))[0].S0.shape == (1,)
    with pytest.raises(ValueError, match="r=17 exceeds 16"):
        adapted(rank_pattern={"q_proj": 17})


# ----------------------------------------------------------------------------------------- counts, files


def test_counts_of_the_paper():
    with torch.device("meta"):
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                patch_size=14,
            )
        )
        attention = r".*self_attn\.(q_proj|k_proj|v_proj|out_proj)"
        model = get_peft_model(clip, EffortConfig(target_modules=attention))
        assert model.get_nb_trainable_parameters()[0] == 196_704
        blocks = nn.ModuleList(  # as in BEiT's own code; transformers has three layers in place of qkv
            nn.ModuleDict({"qkv": nn.Linear(1024, 3072), "proj": nn.Linear(1024, 1024)}) for _ in range(24)
        )
        fused = get_peft_model(blocks, EffortConfig(target_modules=["qkv", "proj"]))
    assert sum(p.numel() for p in fused.parameters() if p.requires_grad) == 147_504


def test_loading_runs_no_decomposition(tmp_path, monkeypatch):
    model = move(adapted(**WEIGHTS)).eval()
    ids = torch.arange(6)[None]
    wanted = model(ids).logits
    loss = regularization_loss(model)
    model.save_pretrained(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a decomposition was computed")

    with monkeypatch.context() as patch:
        for name in ("svd", "svdvals", "eigh", "lu_factor_ex", "qr"):
            patch.setattr(torch.linalg, name, refuse)
        again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
        assert torch.equal(again.eval()(ids).logits, wanted)
        assert torch.equal(peft_subspace.load(llama(), tmp_path).eval()(ids).logits, wanted)
        low = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
        assert torch.equal(low.eval()(ids).logits, wanted)
    torch.testing.assert_close(regularization_loss(again), loss, rtol=1e-6, atol=0)


def test_checkpoint_holds_both_triples_and_nothing_of_the_regularizers(tmp_path):
    model = adapted(**WEIGHTS)
    regularization_loss(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        found = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    fingerprints = sum(d.fingerprint.numel() for d in deltas(model))
    assert found == 2 * sum(d.shape.out_features + d.shape.columns + 1 for d in deltas(model)) + fingerprints


THREADS = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads({threads})
from models import llama
from peft import PeftModel
import peft_subspace
torch.use_deterministic_algorithms(True)
model = PeftModel.from_pretrained(llama(), {folder!r}).eval()
torch.save(model(torch.arange(6)[None]).logits.detach(), {folder!r} + "/logits.pt")
"""


def test_reloads_on_another_thread_count(tmp_path):
    """The smallest singular vectors depend on the order of sums; the adapter must not."""
    model = move(adapted()).eval()
    wanted = model(torch.arange(6)[None]).logits
    model.save_pretrained(tmp_path)
    script = THREADS.format(tests=str(Path(__file__).parent), threads=2, folder=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("load", ["assign", "to_empty"])
def test_adapter_on_the_meta_device_starts_when_the_weights_are_there(load):
    with torch.device("meta"):
        model = adapted(llama(), **WEIGHTS)
    ids = torch.arange(6)[None]
    if load == "to_empty":
        model.to_empty(device="cpu")
    else:
        with pytest.raises(RuntimeError, match="which is on the meta device; load the base model first"):
            next(iter(layers(model).values()))(gaussian(2, 16))
    state = {k.replace(".weight", ".base_layer.weight") if k.split(".")[-2] in TARGETS else k: v
             for k, v in llama().state_dict().items()}  # fmt: skip
    model.get_base_model().load_state_dict(state, strict=False, assign=load == "assign")
    model.get_base_model().model.rotary_emb = llama().model.rotary_emb  # its buffer is not in the state
    assert torch.equal(model.eval()(ids).logits, llama().eval()(ids).logits)
    for one, other in zip(deltas(model), deltas(adapted()), strict=True):
        assert torch.equal(one.U0, other.U0)
        assert one.U_change.requires_grad


# ------------------------------------------------------------------------------------------ regularizers


def exact_delta(m, n, r, scale=1.0):
    """A delta in float64 on a random weight, away from its start."""
    weight = gaussian(m, n, seed=7).double()
    delta = EffortDelta(EffortConfig(r=r), ModuleSpec("", WeightShape(m, n), r)).double()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    state = {"U": U[:, -r:], "S": S[-r:], "Vh": Vh[-r:]}
    with torch.no_grad():
        for seed, (name, start) in enumerate(state.items()):
            getattr(delta, f"{name}0").copy_(start)
            getattr(delta, f"{name}_change").copy_(scale * gaussian(*start.shape, seed=seed))
    return delta, weight


SHAPES = [(12, 12, 3), (20, 8, 2), (8, 20, 2), (15, 11, 1), (11, 15, 4), (9, 6, 6), (7, 7, 7)]


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("number", [0, 1], ids=["orthogonality", "energy"])
def test_losses_and_gradients_equal_the_literal_formulas(m, n, r, number):
    delta, weight = exact_delta(m, n, r)
    wanted = oracles.effort_losses(delta, weight)[number]
    found = delta.energy_loss(lambda: weight) if number else delta.orthogonality_loss(lambda: weight)
    assert (found - wanted).abs() < 1e-9 * wanted
    parameters = [delta.U_change, delta.Vh_change, *([delta.S_change] if number else [])]
    both = (torch.autograd.grad(loss, parameters) for loss in (found, wanted))
    for mine, literal in zip(*both, strict=True):
        assert torch.norm(mine - literal) < 1e-9 * torch.norm(literal)


@pytest.mark.parametrize(
    ("m", "n", "kept"), [(12, 12, None), (20, 8, 8), (8, 20, 8), (15, 11, 4), (11, 15, 4)]
)
def test_orthogonality_keeps_the_narrower_basis(m, n, kept):
    delta, weight = exact_delta(m, n, 2)
    delta.orthogonality_loss(lambda: weight)
    assert (delta._range and tuple(delta._range.basis.shape)) == (kept and (max(m, n), kept))


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_no_digits_are_lost_near_the_start(m, n, r):
    """In fp32 the plain formulas would return noise of 1e-7 for values of 1e-8."""
    delta, weight = exact_delta(m, n, r, scale=1e-5)
    wanted = delta.orthogonality_loss(lambda: weight), delta.energy_loss(lambda: weight)
    single, weight = copy.deepcopy(delta).float(), weight.float()
    found = single.orthogonality_loss(lambda: weight), single.energy_loss(lambda: weight)
    for value, exact in zip(found, wanted, strict=True):
        assert (value.double() - exact).abs() < 1e-4 * exact


def test_both_losses_and_their_gradients_are_zero_at_the_start():
    model = adapted(r=2, **WEIGHTS)
    loss = regularization_loss(model)
    assert loss == 0
    loss.backward()
    assert not any(parameter.grad.any() for delta in deltas(model) for parameter in delta.parameters())


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 9, (3, 2)), nn.Conv2d(6, 9, 3, groups=3), nn.Linear(12, 9)])
def test_model_loss_is_the_weighted_mean_of_the_literal_formulas(layer):
    other = nn.Linear(10, 10)
    base = nn.Sequential(copy.deepcopy(layer), other)
    weights = [layer.weight.detach().flatten(1), other.weight.detach()]
    model = move(get_peft_model(base, EffortConfig(r=2, target_modules=["0", "1"], **WEIGHTS)))
    losses = [oracles.effort_losses(d, w) for d, w in zip(deltas(model), weights, strict=True)]
    wanted = sum(0.3 * orthogonality + 0.2 * energy for orthogonality, energy in losses) / 2
    torch.testing.assert_close(regularization_loss(model).double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("number", [0, 1], ids=["orthogonality", "energy"])
def test_one_loss_alone_is_added_to_the_loss_of_the_model(number):
    key, value = list(WEIGHTS.items())[number]
    inputs = {"input_ids": torch.arange(1, 9).reshape(2, 4), "labels": torch.arange(1, 9).reshape(2, 4)}
    model, plain = (move(adapted(**options)).train() for options in ({key: value}, {}))
    weights = [layer.get_base_layer().weight.detach() for layer in layers(model).values()]
    losses = [oracles.effort_losses(d, w)[number] for d, w in zip(deltas(model), weights, strict=True)]
    wanted = value * sum(losses) / len(losses)
    torch.testing.assert_close(regularization_loss(model).double(), wanted, rtol=1e-4, atol=0)
    added = model(**inputs).loss - plain(**inputs).loss
    torch.testing.assert_close(added.double(), wanted, rtol=1e-4, atol=1e-6)


def test_energy_holds_no_weight_for_the_backward_pass():
    """Dequantized weights of a whole model would not fit."""
    delta, weight = exact_delta(30, 40, 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        delta.energy_loss(lambda: weight)
    assert max(kept) < 30 * 40


def test_bf16_autocast_does_not_touch_the_losses():
    model = move(adapted(**WEIGHTS))
    wanted = regularization_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(regularization_loss(model), wanted)


def test_which_adapters_count():
    model = move(adapted(**WEIGHTS))
    one = regularization_loss(model)
    model.add_adapter("plain", EffortConfig(target_modules=TARGETS))
    move(model, adapter="plain")
    model.add_adapter("other", EffortConfig(target_modules=["q_proj"], energy_weight=0.1))
    for name in ("other",):
        for layer in layers(model).values():
            if name in layer.deltas:
                layer.deltas[name].S_change.data.fill_(0.2)
    other = regularization_loss(model, "other")
    assert torch.equal(regularization_loss(model), one)
    assert other > 0
    model.base_model.set_adapter(["default", "plain", "other"])
    torch.testing.assert_close(regularization_loss(model), one + other)
    model.set_adapter("plain")
    assert regularization_loss(model) == 0
    with pytest.raises(
        ValueError, match="adapter_name='nobody' is no adapter of this model that has loss terms"
    ):
        regularization_loss(model, "nobody")


def test_sharded_tensors_are_refused():
    model = adapted(**WEIGHTS)
    deltas(model)[0].U_change.data = torch.zeros(3)
    with pytest.raises(RuntimeError, match="need whole tensors"):
        regularization_loss(model)


# ---------------------------------------------------------------------- how they reach an optimizer step


class Texts(Dataset):
    """Four texts of which different parts count."""

    def __init__(self):
        self.ids = torch.randint(3, 37, (4, 9), generator=torch.Generator().manual_seed(7))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids.where(torch.arange(9) > 2 * index - 1, -100)}


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"pixel_values": gaussian(3, 16, 16, seed=index), "labels": torch.tensor(index % 3)}


def start(kind, way, **options):
    """A model whose adapter is regularized, added in one of three ways."""
    base = llama() if kind == "text" else vit()
    targets = TARGETS if kind == "text" else ["intermediate.dense", "attention.output.dense", "o_proj", "fc1"]
    config = EffortConfig(target_modules=targets, **{**WEIGHTS, **options})
    if way in ("peft", "task"):
        config.task_type = "CAUSAL_LM" if way == "task" else None  # PEFT has a forward of its own for it
        base = get_peft_model(base, config)
    elif way == "add_adapter":
        base.add_adapter(config)
    else:
        base = inject_adapter_in_model(config, base)
    return move(base)


def train(model, folder, data, callbacks=(), trainer=Trainer, **options):
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, optim="sgd",
        learning_rate=0.05, lr_scheduler_type="constant", num_train_epochs=3, logging_steps=1,
        remove_unused_columns=False, save_strategy="no", **options,
    )  # fmt: skip
    extra = {"compute_loss_func": own_loss} if options.get("label_names") == ["labels", "own"] else {}
    trainer = trainer(model, arguments, train_dataset=data, callbacks=list(callbacks), **extra)
    trainer.train()
    return trainer


def own_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    return total / (num_items_in_batch if num_items_in_batch is not None else targets.ne(-100).sum())


def expected(kind, way="peft"):
    """The same three steps, with the whole batch at once and a loss that is summed up here."""
    model = start(kind, way).train()
    data = Texts() if kind == "text" else Images()
    batch = {key: torch.stack([data[i][key] for i in range(4)]) for key in data[0]}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.no_grad():
            labels = batch.pop("labels")
        logits = model(**batch).logits
        batch["labels"] = labels
        if kind == "text":
            loss = own_loss({"logits": logits}, labels)
        else:
            loss = nn.functional.cross_entropy(logits, labels)
        (loss + regularization_loss(model)).backward()
        optimizer.step()
    return trained(model)


def trained(model):
    return [p.detach().clone() for delta in deltas(model) for p in delta.parameters()]


def assert_close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


SPLITS = [(4, 1), (1, 4), (2, 2)]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize(("size", "accumulation"), SPLITS)
@pytest.mark.parametrize("way", ["peft", "task", "add_adapter", "inject", "callback", "own-loss"])
def test_weight_depends_neither_on_accumulation_nor_on_the_way_of_adding(way, size, accumulation, tmp_path):
    model = start("text", "peft" if way in ("callback", "own-loss") else way)
    callbacks = [RegularizationCallback()] if way in ("callback", "own-loss") else []
    options = {"label_names": ["labels", "own"]} if way == "own-loss" else {}
    train(
        model, tmp_path, Texts(), callbacks, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, **options,
    )  # fmt: skip
    assert_close(trained(model), expected("text"))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize(("size", "accumulation"), SPLITS)
def test_weight_in_a_model_of_images(size, accumulation, tmp_path):
    model = start("image", "peft")
    train(
        model, tmp_path, Images(), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
    )
    assert_close(trained(model), expected("image"))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_label_smoothing_gets_the_regularizers_from_the_callback(tmp_path):
    """With a vanishing learning rate, the gradients of the last step tell what it was made of."""

    class Kept(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 0.0 * super().compute_loss(*args, **kwargs)

    class Gradients(RegularizationCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            before = [p.grad.clone() for delta in deltas(model) for p in delta.parameters()]
            assert not any(gradient.any() for gradient in before)
            super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
            self.found = [p.grad.clone() for delta in deltas(model) for p in delta.parameters()]

    model, callback = start("text", "peft"), Gradients()
    reference = start("text", "peft")
    regularization_loss(reference).backward()
    options = {"label_smoothing_factor": 0.1, "max_steps": 1, "gradient_accumulation_steps": 2}
    train(model, tmp_path, Texts(), [callback], Kept, per_device_train_batch_size=2, **options)
    assert_close(callback.found, [p.grad for delta in deltas(reference) for p in delta.parameters()])


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_callback_logs_both_losses(tmp_path):
    model = start("text", "peft")
    losses = {"orthogonality": 0.0, "energy": 0.0}
    trainer = train(model, tmp_path, Texts(), [RegularizationCallback()], per_device_train_batch_size=4)
    for layer in layers(model).values():
        delta, weight = layer.deltas["default"], layer.get_base_weight()
        orthogonality, energy = oracles.effort_losses(delta, weight)
        losses["orthogonality"] += orthogonality.item() / len(layers(model))
        losses["energy"] += energy.item() / len(layers(model))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert logged[-1]["orthogonality_loss"] == pytest.approx(losses["orthogonality"], rel=1e-4)
    assert logged[-1]["energy_loss"] == pytest.approx(losses["energy"], rel=1e-4)
    assert logged[0]["energy_loss"] != logged[-1]["energy_loss"]


class Scaler:
    """What the callback uses of a gradient scaler."""

    def __init__(self, parameters, unscaled):
        self.parameters, self.unscaled = parameters, unscaled

    def is_enabled(self):
        return True

    def unscale_(self, optimizer):
        if self.unscaled:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update()."
            )
        for parameter in self.parameters:
            parameter.grad.div_(1024)
        self.unscaled = True


@pytest.mark.parametrize("clipped", [False, True])
def test_callback_adds_to_unscaled_gradients(clipped):
    model, reference = start("text", "peft"), start("text", "peft")
    regularization_loss(reference).backward()
    wanted = [1.0 + p.grad for delta in deltas(reference) for p in delta.parameters()]
    parameters = [p for delta in deltas(model) for p in delta.parameters()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1.0 if clipped else 1024.0)

    class Optimizer:
        optimizer, scaler = None, Scaler(parameters, clipped)

    RegularizationCallback().on_pre_optimizer_step(None, None, None, model=model, optimizer=Optimizer)
    assert_close([parameter.grad for parameter in parameters], wanted)


def test_callback_adds_again_after_a_step_that_was_skipped():
    model, callback = start("text", "peft"), RegularizationCallback()
    parameters = [p for delta in deltas(model) for p in delta.parameters()]
    callback.on_pre_optimizer_step(None, None, None, model=model)
    once = [parameter.grad.clone() for parameter in parameters]
    callback.on_pre_optimizer_step(None, None, None, model=model)
    assert_close([parameter.grad for parameter in parameters], once)  # never twice in a step
    callback.on_optimizer_step(None, None, None, model=model)
    model.zero_grad()
    callback.on_pre_optimizer_step(None, None, None, model=model)
    assert_close([parameter.grad for parameter in parameters], once)


def own_steps(model, regularize=False):
    """Two steps on a loss that is not the model's."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(2):
        loss = model(torch.arange(6)[None]).logits.square().mean()
        (loss + regularization_loss(model) if regularize else loss).backward()
        optimizer.step()


@pytest.mark.parametrize("way", ["peft", "add_adapter", "inject"])
def test_warns_once_if_steps_go_without_the_regularizers(way):
    model = start("text", way).train()
    with pytest.warns(UserWarning, match="adapter 'default' has taken a step without") as found:
        own_steps(model)
    assert len(found) == 1
    own_steps(model)  # and never again
    own_steps(start("text", way).train(), regularize=True)
    own_steps(start("text", way, orthogonality_weight=0.0, energy_weight=0.0).train())
    model = start("text", way).eval()
    own_steps(model)


def test_loss_of_the_model_carries_them_in_training_only():
    model = start("text", "peft").train()
    batch = {key: value[None] for key, value in Texts()[0].items()}
    with_them, them = model(**batch).loss, regularization_loss(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss + them, with_them)
    torch.testing.assert_close(model.eval()(**batch).loss + them, with_them)
    plain = model.unload()
    assert not plain._forward_hooks
    assert plain.train()(**batch).loss.requires_grad is False


def test_copies_are_regularized_as_well():
    model = start("text", "peft").train()
    twin = copy.deepcopy(model)
    move(twin, 0.2)
    batch = {key: value[None] for key, value in Texts()[0].items()}
    with torch.no_grad():
        plain = twin(**batch).loss
    torch.testing.assert_close(twin(**batch).loss, plain + regularization_loss(twin))
    assert regularization_loss(twin) != regularization_loss(model)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_resumed_run_continues_with_the_same_losses(tmp_path):
    data, options = Texts(), {"per_device_train_batch_size": 4}
    whole = train(start("text", "peft"), tmp_path / "whole", data, **options)
    part = start("text", "peft")
    arguments = TrainingArguments(
        str(tmp_path / "part"), report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, optim="sgd",
        learning_rate=0.05, lr_scheduler_type="constant", num_train_epochs=3, logging_steps=1, save_steps=1,
        **options,
    )  # fmt: skip
    Trainer(part, arguments, train_dataset=data).train()
    again = adapted(**WEIGHTS)
    trainer = Trainer(again, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-1"))
    wanted = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert_close(trained(again), trained(part))


def train_together(rank, folder, kind):
    """One of two processes of a Trainer."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
        MASTER_ADDR="localhost", MASTER_PORT="0",  # asked for, and not used: the group is there
    )  # fmt: skip
    model = start(kind, "peft")
    train(
        model, folder / "run", Texts() if kind == "text" else Images(), per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    if rank == 0:
        torch.save(trained(model), folder / "trained.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image"])
def test_weight_does_not_depend_on_the_number_of_processes(kind, tmp_path):
    run_in_two_processes(partial(train_together, kind=kind), tmp_path)
    assert_close(torch.load(tmp_path / "trained.pt"), expected(kind))


# -------------------------------------------------------------------------------- combining, quantization


def test_concatenation_is_exact_and_reloads(tmp_path):
    model = move(adapted(r=2, **WEIGHTS))
    model.add_adapter("other", EffortConfig(r=3, target_modules=TARGETS))
    move(model, 0.3, "other")
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    for one, other, total in zip(*(deltas(model, name) for name in ("default", "other", "sum")), strict=True):
        wanted = 0.5 * multiply(one.factors()) - 2 * multiply(other.factors())
        torch.testing.assert_close(multiply(total.factors()), wanted, atol=1e-5, rtol=1e-4)
        assert len(total.S0) == 5
    assert model.peft_config["sum"].orthogonality_weight == 0
    energies = []
    for layer in layers(model).values():
        weight, update = layer.get_base_weight(), multiply(layer.deltas["sum"].factors())
        energies.append((weight + update).square().sum() - weight.square().sum())
    wanted = 0.2 * torch.stack(energies).abs().mean()
    torch.testing.assert_close(regularization_loss(model, "sum"), wanted, rtol=1e-4, atol=0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "sum")
    for one, other in zip(deltas(model, "sum"), deltas(again), strict=True):
        assert torch.equal(multiply(one.factors()), multiply(other.factors()))


def test_concatenation_beyond_the_rank_of_the_weight():
    model = move(adapted(r=6))
    model.add_adapter("other", EffortConfig(r=6, target_modules=TARGETS))
    move(model, 0.3, "other")
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum")
    for one, other, total in zip(*(deltas(model, name) for name in ("default", "other", "sum")), strict=True):
        wanted = 0.5 * multiply(one.factors()) + 2 * multiply(other.factors())
        torch.testing.assert_close(multiply(total.factors()), wanted, atol=1e-5, rtol=1e-4)
        assert len(total.S0) <= min(total.shape.out_features, total.shape.columns)


def test_twin_starts_at_the_base_model():
    model = move(adapted())
    model.add_adapter("twin", model.peft_config["default"])
    for one, other in zip(deltas(model), deltas(model, "twin"), strict=True):
        assert torch.equal(one.U0, other.U0)
        assert one.U0.data_ptr() != other.U0.data_ptr()
        assert not multiply(other.factors()).any()


@WARNINGS
@pytest.mark.parametrize("kind", marked(KINDS))
def test_regularizers_on_a_quantized_base(kind):
    model = move(one_layer(kind.quantize(nn.Linear(128, 32)), r=2, **WEIGHTS))
    weight = next(iter(layers(model).values())).get_base_weight().float()
    (delta,) = deltas(model)
    orthogonality, energy = oracles.effort_losses(delta, weight)
    wanted = 0.3 * orthogonality + 0.2 * energy
    torch.testing.assert_close(regularization_loss(model).double(), wanted, rtol=1e-4, atol=0)
    regularization_loss(model).backward()
    assert delta.S_change.grad.any()
