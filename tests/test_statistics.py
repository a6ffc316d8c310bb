"""Second moments gathered from data: against explicit sums, and what gathering must leave alone."""

import random

import accelerate
import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_subspace
from models import bert, llama
from peft_subspace import FLoRAConfig, statistics
from peft_subspace.layers.choose import kind_of
from peft_subspace.merging import merge
from peft_subspace.statistics.moment import Rows, SecondMoment
from processes import run_in_two_processes
from quantized import KINDS, WARNINGS, marked

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "conv1d-transformers": (lambda: Conv1D(5, 6), (3, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 8)),
    "conv1d-single": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 4, 5)),
}


@pytest.mark.parametrize("size", [1, 511, 513, 1100])
def test_products_in_blocks_are_whole(size):
    rows = torch.randn(7, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = Rows(rows).product
    torch.testing.assert_close(product, sum(torch.outer(row, row) for row in rows))


class Model(nn.Module):
    """A layer after another, with a loss."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = torch.tanh(self.layer(x)).flatten(1)
        return {"loss": (y * torch.linspace(-1, 2, y.shape[1], dtype=y.dtype)).sum(1).mean()}


def tokens(seed=0, length=6):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, length, dtype=torch.int64)
    mask[0, 4:] = mask[2, 2:] = 0
    ids = torch.randint(3, 37, (4, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}


def inputs_by_hooks(model, batches, names):
    """All rows that layers get where there is no padding, stacked."""
    rows = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, a, y, name=name: rows[name].append(a[0]))
        for name in names
    ]
    for batch in batches:
        before = {name: len(found) for name, found in rows.items()}
        with torch.no_grad():
            model.eval()(**batch)
        kept = batch["attention_mask"].bool()
        for name, found in rows.items():
            new = found[before[name] :]
            found[before[name] :] = [x[kept] if x.shape[:2] == kept.shape else x for x in new]
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in found]) for name, found in rows.items()}


# -------------------------------------------------------------------------------------- against sums


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_what_the_layer_gives(name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    kind = kind_of(layer)
    rows = kind.input_rows(layer, x)
    weight = kind.from_layout(layer.weight).flatten(1)
    groups, axis = kind.shape.groups, -1 if kind.linear else x.ndim - len(kind.shape.kernel_size) - 1
    expected = (layer(x) - layer(torch.zeros_like(x))).movedim(axis, -1).unflatten(-1, (groups, -1))
    batch = 1 if name == "conv1d-single" else shape[0]
    by_group = rows.view(batch, groups, -1, rows.shape[1]) if not kind.linear else rows[None, None]
    for g, part in enumerate(weight.unflatten(0, (groups, -1))):
        found = by_group[:, g] @ part.T
        assert torch.allclose(found.flatten(0, -2), expected[..., g, :].reshape(-1, len(part)), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "conv1d-single"])
def test_moments_equal_explicit_sums(name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model = Model(build()).double()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    found = statistics.collect(model, batches, gradients=True, target_modules=["layer"])
    kind, layer = kind_of(model.layer), model.layer
    rows = torch.cat([kind.input_rows(layer, x) for x in batches])
    grads, columns = [], []
    for x in batches:
        y = layer(x).detach().requires_grad_()
        out = torch.tanh(y).flatten(1)
        (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sum(1).mean().backward()
        axis = -1 if kind.linear else 1
        grads.append(y.grad.movedim(axis, -1).flatten(0, -2))
        layer.zero_grad()
        model(x)["loss"].backward()
        columns.append(kind.from_layout(layer.weight.grad).flatten(1).T)
    layer.zero_grad()
    for moments, expected in [
        (found.inputs, rows),
        (found.output_gradients, torch.cat(grads)),
        (found.gradients, torch.cat(columns)),
    ]:
        moment = moments["layer"]
        scale = expected.T @ expected
        tolerance = 1e-12 if moments is not found.gradients else 1e-5  # sums of gradients are fp32
        assert (moment.dense() - scale).norm() <= tolerance * scale.norm()
        assert torch.allclose(moment.column_norms, expected.norm(dim=0), rtol=1e-5)
        assert moment.rows == len(expected)


def test_padding_does_not_count_and_equal_inputs_are_added_for_each_layer():
    model, batches = bert().double(), [tokens(0), tokens(1, 7)]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = statistics.collect(model, batches)
    assert set(found.modules) == set(names)
    for name, rows in inputs_by_hooks(model, batches, names).items():
        assert found.inputs[name].rows == len(rows)
        assert torch.allclose(found.inputs[name].dense(), rows.T @ rows, rtol=1e-10, atol=1e-12), name


def test_gradients_at_padding_do_not_count():
    model = bert()
    found = statistics.collect(model, [tokens()], inputs=False, gradients=True)
    assert not found.inputs
    moment = found.output_gradients["bert.encoder.layer.0.output.dense"]
    assert moment.rows == int(tokens()["attention_mask"].sum())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_counts_inputs_once():
    plain, saving = llama(), llama()
    saving.gradient_checkpointing_enable()
    saving.train()
    batch = {"input_ids": tokens()["input_ids"], "labels": tokens()["input_ids"]}
    one, two = (statistics.collect(m, [batch], gradients=True) for m in (plain, saving))
    for kind in ("inputs", "gradients"):
        for name, moment in getattr(one, kind).items():
            other = getattr(two, kind)[name]
            assert moment.rows == other.rows
            assert torch.allclose(moment.dense(), other.dense(), rtol=1e-4, atol=1e-9)


def test_adapters_that_are_active_count():
    batch = tokens()
    model = get_peft_model(bert(), FLoRAConfig(target_modules=["query"], init_weights=False))
    adapted = statistics.collect(model, [batch])
    with model.disable_adapter():
        plain = statistics.collect(model, [batch])
    first, second = adapted.modules
    assert torch.equal(adapted.inputs[first].dense(), plain.inputs[first].dense())
    assert not torch.allclose(adapted.inputs[second].dense(), plain.inputs[second].dense())
    assert adapted.modules == [n for n, m in bert().named_modules() if n.endswith("query")]


@WARNINGS
@pytest.mark.parametrize("kind", marked(KINDS))
def test_quantized_weights_are_not_read(kind, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    model = nn.Sequential(kind.quantize(layer))
    x = torch.randn(5, 32)
    x = x.to(getattr(model[0], "compute_dtype", None) or x.dtype)
    monkeypatch.setattr("peft_subspace.base_weights.weight.BaseWeight.read", None)
    found = statistics.collect(model, [x], target_modules=["0"])
    assert torch.allclose(found.inputs["0"].dense(), (x.float().T @ x.float()).double(), rtol=1e-2, atol=1e-2)


def test_offloaded_models_give_the_same():
    model, batches = bert(), [tokens()]
    expected = statistics.collect(model, batches, gradients=True)
    accelerate.cpu_offload(model, torch.device("cpu"))
    found = statistics.collect(model, batches, gradients=True, offload=True)
    for kind in ("inputs", "output_gradients", "gradients"):
        for name, moment in getattr(expected, kind).items():
            assert torch.allclose(getattr(found, kind)[name].dense(), moment.dense(), atol=1e-6)


# ------------------------------------------------------------------------------------------- sketches


@pytest.mark.parametrize("rank", [3, 40])
def test_a_sketch_never_says_too_much_and_is_exact_where_it_is_wide_enough(rank):
    torch.manual_seed(0)
    rows = torch.randn(200, rank, dtype=torch.float64) @ torch.randn(rank, 60, dtype=torch.float64)
    whole, sketch = SecondMoment.empty(60), SecondMoment.empty(60, 8)
    for chunk in rows.split(37):
        whole.add(Rows(chunk))
        sketch.add(Rows(chunk))
    left = whole.dense() - sketch.dense()
    assert len(sketch.matrix) <= 16
    assert torch.linalg.eigvalsh(left).min() >= -1e-9 * whole.energy
    assert torch.linalg.eigvalsh(left).max() <= whole.energy / 8
    assert (left.norm() <= 1e-9 * whole.energy) == (rank == 3)
    assert sketch.energy == pytest.approx(whole.energy) == pytest.approx(float(rows.square().sum()))


def test_memory_decides_how_wide_sketches_are():
    model, batches = llama(), [{"input_ids": tokens()["input_ids"]}]
    whole = statistics.collect(model, batches)
    sizes = [moment.size for moment in whole.inputs.values()]
    least = sum(4 * size * min(size, 16) for size in sizes)
    with pytest.raises(ValueError, match=f"max_memory={least - 1} bytes are too few; give at least {least}"):
        statistics.collect(model, batches, max_memory=least - 1)
    narrow = statistics.collect(model, batches, max_memory=least)
    assert {m.width for m in narrow.inputs.values()} == {None, 8}  # 16 columns are no larger whole
    assert all(m.width is None for m in statistics.collect(model, batches, max_memory="1MB").inputs.values())
    norms = statistics.collect(model, batches, inputs="norms")
    for name, moment in norms.inputs.items():
        assert moment.matrix.numel() == 0
        assert torch.allclose(moment.column_norms.square(), whole.inputs[name].dense().diagonal())
        with pytest.raises(ValueError, match="norms of columns alone"):
            moment.dense()
    with pytest.raises(ValueError, match=r"width=None.*width=0.*have no sum"):
        whole + norms


# ------------------------------------------------------------------------------------- sums and files


@pytest.mark.parametrize("memory", [None, 60_000])
def test_statistics_of_two_data_sets_add_up(memory):
    model, batches = bert(), [tokens(seed) for seed in range(4)]
    options = {"gradients": True, "max_memory": memory}
    first, second = (statistics.collect(model, part, **options) for part in (batches[:2], batches[2:]))
    total, whole = first + second, statistics.collect(model, batches, **options)
    for kind in ("inputs", "output_gradients", "gradients"):
        for name, moment in getattr(whole, kind).items():
            found = getattr(total, kind)[name]
            assert found.rows == moment.rows
            assert torch.allclose(found.squares, moment.squares)
            if memory is None:
                assert torch.allclose(found.dense(), moment.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", [None, 60_000])
def test_files_hold_all(memory, tmp_path):
    path = tmp_path / "folder" / "task.safetensors"
    saved = statistics.collect(bert(), [tokens()], gradients=True, max_memory=memory)
    saved.save(path)
    loaded = statistics.load(path)
    assert loaded.modules == saved.modules
    for kind in ("inputs", "output_gradients", "gradients"):
        for name, moment in getattr(saved, kind).items():
            found = getattr(loaded, kind)[name]
            assert (found.rows, found.width) == (moment.rows, moment.width)
            assert torch.equal(found.matrix, moment.matrix)
            assert torch.equal(found.squares, moment.squares)


def _spoiled(path, change):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


FIRST = "inputs/bert.encoder.layer.0.attention.self.query"
SPOILED = {
    "kind": (lambda t, m: m.update(kind="else"), "no file of statistics"),
    "header": (lambda t, m: m.update(moments="[1"), "damaged header"),
    "list": (lambda t, m: m.update(moments="[1]"), "damaged header"),
    "rows": (lambda t, m: m.update(moments=f'{{"{FIRST}": [-3, null]}}'), "impossible numbers"),
    "other": (lambda t, m: m.update(moments='{"__class__/x": [3, null]}'), "impossible numbers"),
    "lacks": (lambda t, m: t.pop(f"{FIRST}/matrix"), "lacks"),
    "shape": (lambda t, m: t.update({f"{FIRST}/matrix": torch.zeros(3, 4)}), "do not fit each other"),
    "square": (lambda t, m: t.update({f"{FIRST}/matrix": torch.zeros(3, 16)}), "no moment of width None"),
    "nan": (lambda t, m: t[f"{FIRST}/matrix"].fill_(float("nan")), "NaN or infinite"),
    "negative": (lambda t, m: t[f"{FIRST}/squares"].neg_(), "no data have this second moment"),
    "asymmetric": (lambda t, m: t[f"{FIRST}/matrix"][0].mul_(-1), "no data have this second moment"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_damaged_files_are_refused(case, tmp_path):
    path = tmp_path / "task.safetensors"
    change, message = SPOILED[case]
    statistics.collect(bert(), [tokens()]).save(path)
    _spoiled(path, change)
    with pytest.raises(ValueError, match=message):
        statistics.load(path)


def test_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "task.safetensors"
    statistics.collect(bert(), [tokens()]).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        statistics.load(path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        statistics.load(path)
    with pytest.raises(FileNotFoundError):
        statistics.load(tmp_path / "none.safetensors")


def test_statistics_of_different_models_do_not_add_up():
    one = statistics.collect(bert(), [tokens()])
    with pytest.raises(ValueError, match="in one of the statistics only"):
        one + statistics.collect(bert(), [tokens()], target_modules=["query"])
    with pytest.raises(ValueError, match="in one of the statistics only"):
        one + statistics.collect(bert(), [tokens()], gradients=True)


# ------------------------------------------------------------------------------- what is left alone


def _generators():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


def test_model_loader_and_generators_are_left_as_they_were():
    model = get_peft_model(bert(), FLoRAConfig(target_modules=["query"]))
    model.train()
    loader = torch.utils.data.DataLoader([tokens(i) for i in range(3)], shuffle=True, batch_size=None)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    torch.manual_seed(3)
    before = _generators()
    statistics.collect(model, loader, gradients=True)
    assert before == _generators()
    assert all(module.training for module in model.modules())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_inference_mode_changes_nothing():
    model, batches = bert(), [tokens()]
    expected = statistics.collect(model, batches)
    with torch.inference_mode():
        found = statistics.collect(model, batches)
    name = expected.modules[0]
    assert torch.equal(found.inputs[name].dense(), expected.inputs[name].dense())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inputs": "all"}, TypeError, r'inputs=.all. must be True, False or "norms"'),
        ({"inputs": False}, ValueError, "leaves nothing to gather"),
        ({"num_batches": 0}, ValueError, "num_batches=0"),
        ({"target_modules": ["nothing"]}, ValueError, "match no layer of BertForSequenceClassification"),
        ({"target_modules": ["word_embeddings"]}, TypeError, "word_embeddings: Embedding has no rows"),
        ({"dataloader": []}, ValueError, "the dataloader is empty"),
        ({"max_memory": 1}, ValueError, "max_memory=1 bytes are too few"),
    ],
)
def test_what_cannot_be_gathered_is_refused(options, error, message):
    options = {"dataloader": [tokens()], **options}
    with pytest.raises(error, match=message):
        statistics.collect(bert(), **options)


def test_broken_samples_are_named_and_unreached_layers_left_out():
    model = bert()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"query: inputs have NaN or infinite values"):
        statistics.collect(model, [{"input_ids": torch.full((2, 3), 5)}])
    model = Model(nn.Linear(6, 5))
    model.other = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"no input reached \['other'\]; they are left out"):
        found = statistics.collect(model, [torch.randn(2, 6)], target_modules=["layer", "other"])
    assert found.modules == ["layer"]
    with pytest.raises(ValueError, match="no sample reached any"):
        statistics.collect(model, [torch.randn(2, 6)], target_modules=["other"])


def test_loss_function_runs_batches_of_any_form():
    model = Model(nn.Linear(6, 5))
    batch = (torch.randn(3, 6), torch.randn(3))
    found = statistics.collect(model, [batch], gradients=True, loss_fn=lambda m, b: m(b[0])["loss"])
    assert found.inputs["layer"].rows == 3
    with pytest.raises(ValueError, match="has no gradient"):
        statistics.collect(model, [batch], gradients=True, loss_fn=lambda m, b: m(b[0])["loss"].detach())


# -------------------------------------------------------------------------------- processes, merging


def _gathered(rank, folder):
    torch.manual_seed(0)
    model = bert()
    for memory in (None, 60_000):
        mine = [tokens(2 * rank), tokens(2 * rank + 1)]
        found = statistics.collect(model, mine, gradients=True, max_memory=memory)
        found.save(folder / f"{memory}-{rank}.safetensors")


def test_two_processes_give_what_one_does(tmp_path):
    run_in_two_processes(_gathered, tmp_path)
    torch.manual_seed(0)
    whole = statistics.collect(bert(), [tokens(seed) for seed in range(4)], gradients=True)
    for memory in (None, 60_000):
        first, second = (statistics.load(tmp_path / f"{memory}-{rank}.safetensors") for rank in range(2))
        for kind in ("inputs", "output_gradients", "gradients"):
            for name, moment in getattr(first, kind).items():
                other, expected = getattr(second, kind)[name], getattr(whole, kind)[name]
                assert torch.equal(moment.matrix, other.matrix)
                assert moment.rows == expected.rows
                assert torch.allclose(moment.squares, expected.squares)
                if moment.width is None:
                    assert torch.allclose(moment.dense(), expected.dense(), rtol=1e-4, atol=1e-6)


def test_regmean_takes_what_was_gathered(tmp_path):
    batches, folders, gathered = [tokens(0), tokens(1)], [], []
    for seed, batch in enumerate(batches):
        model = get_peft_model(bert(), FLoRAConfig(target_modules=["query"], init_weights=False, seed=seed))
        gathered.append(statistics.collect(model, [batch]))
        folders.append(tmp_path / str(seed))
        model.save_pretrained(folders[-1])
    made = merge(folders, "regmean", base=bert(), grams=statistics.grams(gathered))
    for name in made.modules:
        updates = [merge([folder], base=bert()).update(name).double() for folder in folders]
        parts = zip(updates, gathered, strict=True)
        total = sum(one.inputs[name].dense() for one in gathered)
        target = sum(u @ one.inputs[name].dense() for u, one in parts)
        assert torch.allclose(made.update(name).double() @ total, target, atol=1e-3 * target.norm())


def test_package_offers_it():
    assert peft_subspace.statistics.collect is statistics.collect
