"""Mean gradients from activations, and what starting an adapter from them must leave alone."""

import gc
import random

import accelerate
import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_subspace
from peft_subspace import LoRASBConfig, initialize_from_gradient
from peft_subspace.initialization import from_gradient as initialize
from peft_subspace.initialization.batches import Batches
from peft_subspace.initialization.gradients import GradientEstimate
from peft_subspace.initialization.loss import model_loss
from processes import run_in_two_processes, sharded
from quantized import KINDS, WARNINGS, marked


class PaddedConv(nn.Conv2d):
    """Pads by itself, as convolutions ported from other frameworks do."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale


class OneLayer(nn.Module):
    """A layer between others, whose loss is the mean over samples."""

    def __init__(self, layer, before=None, inplace=False):
        super().__init__()
        self.before, self.layer, self.inplace = before, layer, inplace

    def forward(self, x, target=None):
        x = x if self.before is None else self.before(x)
        y = self.layer(x)
        y = y if isinstance(y, torch.Tensor) else y[0] * y[1][1]
        y = y.mul_(1.5) if self.inplace else y * 1.5
        y = torch.tanh(y)
        return {
            "loss": (y * torch.linspace(-1, 2, y.numel() // len(y)).view(y[0].shape)).flatten(1).sum(1).mean()
        }


class Router(nn.Linear):
    """Returns several tensors."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), (logits.argmax(-1), logits)


LAYERS = {
    "linear-several": (lambda: Router(6, 5), lambda n: torch.randn(n, 4, 6)),
    "linear": (lambda: nn.Linear(6, 5), lambda n: torch.randn(n, 4, 6)),
    "linear-2d": (lambda: nn.Linear(6, 5, bias=False), lambda n: torch.randn(n, 6)),
    "conv1d-transformers": (lambda: Conv1D(5, 6), lambda n: torch.randn(n, 4, 6)),
    "embedding": (lambda: nn.Embedding(9, 5), lambda n: torch.randint(9, (n, 4))),
    "embedding-padding": (lambda: nn.Embedding(9, 5, padding_idx=2), lambda n: torch.randint(9, (n, 8))),
    "embedding-freq": (
        lambda: nn.Embedding(5, 6, scale_grad_by_freq=True),
        lambda n: torch.randint(5, (n, 8)),
    ),
    "embedding-scaled": (lambda: ScaledEmbedding(9, 5), lambda n: torch.randint(9, (n, 4))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda n: torch.randn(n, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2), lambda n: torch.randn(n, 4, 8, 8)),
    "conv2d-groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"),
        lambda n: torch.randn(n, 4, 5, 5),
    ),
    "conv2d-reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        lambda n: torch.randn(n, 4, 5, 5),
    ),
    "conv2d-padded": (lambda: PaddedConv(4, 6, 2), lambda n: torch.randn(n, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda n: torch.randn(n, 2, 4, 4, 4)),
}


def adapted(layer, r=2, **options):
    return get_peft_model(
        OneLayer(layer, **options), LoRASBConfig(r=r, target_modules=["layer"], init_weights="svd")
    )


def estimate(model, batches, loss_fn=model_loss, max_memory=None, offload=False):
    layers = initialize._fresh_layers(model, "default")
    stream = GradientEstimate(layers, "default", loss_fn, max_memory, offload)
    read = Batches.of_samples(batches, None, torch.device("cpu"))
    return dict(stream.means(model, read, progress=False))


def by_autograd(layer, batches, **options):
    """Mean over samples of the gradient of the layer's weight, laid out `(out, in, *kernel)`."""
    model = OneLayer(layer, **options).eval()
    weight = layer.weight.requires_grad_()
    total, samples = 0, 0
    for batch in batches:
        total = total + torch.autograd.grad(model(**batch)["loss"], weight)[0] * len(batch["x"])
        samples += len(batch["x"])
    transposed = isinstance(layer, Conv1D | nn.Embedding)
    return total.T / samples if transposed else total / samples


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_equals_autograd_over_batches_of_different_size(kind, inplace):
    torch.manual_seed(0)
    make, data = LAYERS[kind]
    layer = make()
    batches = [{"x": data(n)} for n in (3, 1, 2)]
    wanted = by_autograd(layer, batches, inplace=inplace)
    found = estimate(adapted(layer, inplace=inplace), batches)["layer"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_weighs_samples_and_not_batches():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(5, 6)
    whole = estimate(adapted(layer), [{"x": x}])["layer"]
    layer = nn.Linear(6, 5).requires_grad_(False)
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    parts = estimate(adapted(layer), [{"x": x[:4]}, {"x": x[4:]}])["layer"]
    torch.testing.assert_close(parts, whole)


def test_sum_of_outer_products_by_loops():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    y = torch.tanh(layer(x) * 1.5)
    weights = torch.linspace(-1, 2, 2)
    wanted = torch.zeros(2, 3)
    for i in range(4):
        for o in range(2):
            for j in range(3):
                wanted[o, j] += weights[o] * (1 - y[i, o].item() ** 2) * 1.5 * x[i, j] / 4
    torch.testing.assert_close(estimate(adapted(layer), [{"x": x}])["layer"], wanted)


def test_single_sample_without_a_batch_axis():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(4, 5, 5)
    loss_fn = lambda model, batch: model.get_base_model().layer(batch["x"]).square().sum()  # noqa: E731
    wanted = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    found = estimate(adapted(layer), [{"x": x}], loss_fn)["layer"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Stack(nn.Module):
    """Two blocks with a normalization, dropout, and one layer that is called twice."""

    def __init__(self, width=16, dropout=0.5):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.dropout = nn.BatchNorm1d(2 * width), nn.Dropout(dropout)
        self.unused = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x, labels=None):
        for _ in range(2):
            x = x + self.second(self.dropout(nn.functional.relu(self.norm(self.first(x)), inplace=True)))
        logits = self.head(x)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def stack(**options):
    torch.manual_seed(1)
    model = Stack()
    options = {"target_modules": ["first", "second"], "init_weights": "svd", "r": 4, **options}
    return get_peft_model(model, LoRASBConfig(**options))


def data(count=3, size=4, width=16):
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "x": torch.randn(size, width, generator=generator),
            "labels": torch.randint(3, (size,), generator=generator),
        }
        for _ in range(count)
    ]


def start(model, batches=None, **options):
    options = {"learning_rate": 1e-3, "progress": False, **options}
    initialize_from_gradient(model, data() if batches is None else batches, **options)


def snapshot(model):
    """Everything that an initialization must leave alone."""
    return {
        "state": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "active": model.active_adapters,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
    }


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def noisy_loss(model, batch):
    """Draws from every generator."""
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)
    return model(**batch)["loss"]


def test_leaves_everything_but_the_adapter_alone():
    model = stack(modules_to_save=["head"])
    model.train()
    model.get_base_model().first.eval()
    model(**data()[0])["loss"].backward()  # gradients that must survive
    before = snapshot(model)
    start(model, loss_fn=noisy_loss)
    after = snapshot(model)
    changed = {key for key in before["state"] if not torch.equal(before["state"][key], after["state"][key])}
    assert changed == {key for key in before["state"] if "lorasb_delta" in key}
    assert same({**before, "state": {}}, {**after, "state": {}})


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_interrupted_the_model_is_unchanged(fails_at):
    model = stack()
    model.train()
    before, calls = snapshot(model), []

    def interrupted(model, batch):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return noisy_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        start(model, loss_fn=interrupted, max_memory=9_000)
    gc.collect()
    assert same(before, snapshot(model))
    start(model)  # and it can be started after all


def test_other_active_adapters_stay_in_the_model():
    model = stack()
    model.add_adapter("other", LoRASBConfig(r=4, target_modules=["first"], init_weights=False))
    alone = estimate(model, data())
    model.base_model.set_adapter(["other", "default"])
    together = estimate(model, data())
    assert not torch.allclose(alone["first"], together["first"])
    model.base_model.set_adapter("other")
    model.merge_and_unload()  # other's update becomes part of the base
    other = get_peft_model(
        model.get_base_model(), LoRASBConfig(r=4, target_modules=["first"], init_weights="svd")
    )
    torch.testing.assert_close(estimate(other, data())["first"], together["first"], rtol=1e-4, atol=1e-6)


def test_memory_limit_takes_several_passes_and_changes_nothing():
    whole, parts = stack(), stack()
    calls = []

    def counting(model, batch):
        calls.append(1)
        return model_loss(model, batch)

    start(whole, loss_fn=counting)
    assert len(calls) == 3
    calls.clear()
    start(parts, loss_fn=counting, max_memory="9KB")
    assert len(calls) == 2 * 3 + 1  # two groups, and a look at the sizes of the inputs
    assert same(dict(whole.state_dict()), dict(parts.state_dict()))


def test_memory_limit_below_one_module():
    model = stack()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"max_memory=1000 bytes are too few for 'second'; give \d+"):
        start(model, max_memory=1000)
    assert same(before, snapshot(model))


def test_sums_on_the_host():
    one, other = stack(), stack()
    start(one)
    start(other, offload=True)
    assert same(dict(one.state_dict()), dict(other.state_dict()))


def test_autocast_and_bf16_base():
    def autograd(model, batches):
        model = model.eval().get_base_model()
        weight = model.first.base_layer.weight.requires_grad_()
        losses = [model(**batch)["loss"] for batch in batches]
        return torch.autograd.grad(sum(losses) / len(losses), weight)[0].float()

    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = estimate(stack(), data())["first"], autograd(stack(), data())
    assert found.dtype == torch.float32
    assert torch.norm(found - wanted) < 0.01 * torch.norm(wanted)
    halves = [{"x": batch["x"].bfloat16(), "labels": batch["labels"]} for batch in data()]
    found = estimate(stack().to(torch.bfloat16), halves)["first"]
    wanted = autograd(stack().to(torch.bfloat16), halves)
    assert found.dtype == torch.float32
    assert torch.norm(found - wanted) < 0.01 * torch.norm(wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    batches = [{"input_ids": torch.randint(32, (2, 6)), "labels": torch.randint(32, (2, 6))}]
    base = LlamaForCausalLM(config)
    model = get_peft_model(base, LoRASBConfig(r=4, target_modules=["v_proj", "down_proj"]))
    wanted = estimate(model, batches)
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    model.train()
    forwards = []
    handle = base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = estimate(model, batches)
    handle.remove()
    assert len(forwards) == 2  # one of them the recomputation
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_cache_is_read_in_place_of_the_data(tmp_path):
    file = tmp_path / "deep" / "gradients.safetensors"
    one, other = stack(), stack()
    start(one, cache=file)
    initialize_from_gradient(other, None, learning_rate=1e-3, cache=file, progress=False)
    assert same(dict(one.state_dict()), dict(other.state_dict()))
    smaller = stack(r=2, target_modules=["second"])
    initialize_from_gradient(smaller, None, learning_rate=1e-3, cache=file, progress=False)
    delta = smaller.base_model.model.second.deltas["default"]
    wanted = one.base_model.model.second.deltas["default"]
    layers = (model.base_model.model.second for model in (smaller, one))
    small, large = (layer.scaling["default"] for layer in layers)
    torch.testing.assert_close(small * delta.R, large * wanted.R[:2, :2])
    with pytest.raises(ValueError, match=r"cache=.* holds no gradients .*unused"):
        initialize_from_gradient(
            stack(target_modules=["unused"]), None, learning_rate=1e-3, cache=file, progress=False
        )


def test_cache_of_an_interrupted_run_does_not_exist(tmp_path):
    file = tmp_path / "gradients.safetensors"
    model = stack()

    def broken(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(model, cache=file, loss_fn=broken)
    assert list(tmp_path.iterdir()) == []
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="delete the file"):
        start(model, cache=file)


def nan_in_first_gradient(model, batch):
    x = model.get_base_model().first(batch["x"])
    return (x.square().sum() * 0).sqrt()


def detached(model, batch):
    return model(**batch)["loss"].detach()


def test_modules_that_no_sample_reaches_keep_their_start():
    model = stack(target_modules=["first", "unused"])
    unused = model.base_model.model.unused.deltas["default"]
    before = {key: tensor.clone() for key, tensor in unused.state_dict().items()}
    with pytest.warns(UserWarning, match=r"no sample reached \['unused'\]"):
        start(model)
    assert same(before, dict(unused.state_dict()))
    model = stack(target_modules=["unused"])
    with pytest.raises(ValueError, match="has no gradient"):
        start(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": []}, ValueError, "dataloader is empty"),
        ({"loss_fn": detached}, ValueError, "loss of batch 0 has no gradient"),
        ({"loss_fn": nan_in_first_gradient}, ValueError, "first: the mean gradient has NaN"),
        ({"loss_fn": lambda m, b: m(**b)["loss"] * torch.inf}, ValueError, "loss of batch 0 is inf"),
        ({"loss_fn": lambda m, b: m(**b)["logits"]}, TypeError, "one entry"),
        ({"loss_fn": lambda m, b: 1.0}, TypeError, "one entry"),
        ({"adapter_name": "nobody"}, ValueError, "adapter_name='nobody' is no adapter"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate=-1.0 must be finite"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0 must be above zero"),
        ({"learning_rate": "a"}, TypeError, "learning_rate='a' must be a number"),
        ({"num_batches": 0}, ValueError, "num_batches=0 must be at least 1"),
    ],
)
def test_bad_input_changes_nothing(options, error, message):
    model = stack()
    model.train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        start(model, **options)
    assert same(before, snapshot(model))


def test_batches_without_a_loss():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoRASBConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"loss_fn\(model, batch\)"):
        initialize_from_gradient(model, [torch.randn(2, 4)], learning_rate=1.0, progress=False)


def test_starting_twice_merged_or_switched_off():
    model = stack()
    start(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="started from gradients before"):
        start(model)
    assert same(before, snapshot(model))
    model = stack()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"first: adapters \['default'\] are merged"):
        start(model)
    model = stack()
    model.base_model.model.first.set_scale("default", 0)
    with pytest.raises(ValueError, match="scale is 0"):
        start(model)


def test_methods_that_do_not_start_from_gradients():
    model = get_peft_model(Stack(), peft_subspace.FLoRAConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="does not start from gradients"):
        start(model)


def test_the_loader_is_left_as_if_nobody_had_read_it():
    dataset = list(range(20))
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True, generator=generator)
    from peft_subspace.initialization.batches import read_batches

    first = [batch.tolist() for batch in read_batches(loader, None)]
    assert [batch.tolist() for batch in read_batches(loader, 3)] == first[:3]
    assert [batch.tolist() for batch in loader] == first
    assert [batch.tolist() for batch in loader] != first


def test_loaders_of_accelerate_shuffle_as_if_nobody_had_read_them():
    """They shuffle by the number of times that they have been read to the end."""
    from peft_subspace.initialization.batches import read_batches

    def loader():
        plain = torch.utils.data.DataLoader(list(range(20)), batch_size=2, shuffle=True)
        return accelerate.data_loader.prepare_data_loader(plain, use_seedable_sampler=True, data_seed=3)

    wanted = [[batch.tolist() for batch in found] for found in [loader()] for _ in range(3)]
    read = loader()
    for count in (None, 3, None):
        assert [batch.tolist() for batch in read_batches(read, count)] == wanted[0][:count]
    assert [[batch.tolist() for batch in read] for _ in range(3)] == wanted
    assert wanted[0] != wanted[1]


@WARNINGS
@pytest.mark.parametrize("kind", marked(KINDS))
def test_gradient_of_a_quantized_layer(kind):
    torch.manual_seed(0)
    layer = kind.quantize(nn.Linear(64, 32))
    before = nn.Linear(64, 64)
    torch.manual_seed(1)
    batches = [{"x": torch.randn(4, 64)} for _ in range(2)]
    model = adapted(layer, r=4, before=before)
    with torch.no_grad():
        dense = nn.Linear(64, 32)
        dense.weight.copy_(model.base_model.model.layer.get_base_weight())
        dense.bias.copy_(layer.bias)
    wanted = by_autograd(dense, batches, before=before)
    found = estimate(model, batches)["layer"]
    # LLM.int8 rounds its input as well: its output, and so the gradient of the loss there, is another one.
    limit = 0.02 if kind.name in ("bnb-8bit", "bnb-nf4-bf16") else 1e-3
    assert torch.norm(found - wanted) < limit * torch.norm(wanted)
    start(model, batches)
    delta = model.base_model.model.layer.deltas["default"]
    assert torch.norm(delta.B.T @ delta.B - torch.eye(4)) < 1e-5


def shares(rank):
    """Three of four batches for one of two processes, one for the other."""
    return data(4)[:3] if rank == 0 else data(4)[3:]


def start_distributed(rank, folder):
    start(nn.parallel.DistributedDataParallel(model := stack()), shares(rank))
    keep_state(model, rank, folder)


def start_sharded(rank, folder):
    """FSDP2: two batches for each process, which have to run equally often."""
    model = sharded(stack())
    start(model, data(4)[2 * rank :][:2])
    assert all(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    keep_state(model, rank, folder)


def fail_alone(rank, folder):
    """One process meets a broken batch; the other must not wait for it."""
    model = stack()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    batches = shares(rank)
    if rank == 1:
        batches[0]["x"][0] = float("nan")
    expected = (ValueError, "broken samples") if rank == 1 else (RuntimeError, "failed in 1 of 2 processes")
    with pytest.raises(expected[0], match=expected[1]):
        start(model, batches)
    assert same(before, model.state_dict())


def keep_state(model, rank, folder):
    state = {key: tensor for key, tensor in model.state_dict().items() if "delta" in key}
    full = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state.items()}
    torch.save(full, folder / f"{rank}.pt")


STARTS = [start_distributed, start_sharded]


def start_each_way(rank, folder):
    for way in STARTS:
        way(rank, folder / way.__name__)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    for way in STARTS:
        (folder / way.__name__).mkdir()
    run_in_two_processes(start_each_way, folder)
    return folder


@pytest.mark.parametrize("way", STARTS)
def test_two_processes_start_as_one_does(way, started):
    states = [torch.load(started / way.__name__ / f"{rank}.pt") for rank in range(2)]
    assert same(*states)
    model = stack()
    start(model, data(4))
    for key, tensor in states[0].items():
        torch.testing.assert_close(model.state_dict()[key], tensor, atol=1e-5, rtol=0)


def test_an_error_in_one_process_ends_all(tmp_path):
    run_in_two_processes(fail_alone, tmp_path)
