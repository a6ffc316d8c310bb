"""Weights that a model does not use by calling a layer: the right value, or a refusal before changes.

The truth is the plain model whose weights are replaced by `W + ΔW`, one weight after the other.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import peft_subspace
from layers import distance
from models import TEXT, build
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.targets import weight_name

pytestmark = [
    pytest.mark.feature("any parameter of any module"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

IDS = torch.arange(4, 20).reshape(2, 8)


class Reader(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.proj.weight.T))


class Grandparent(nn.Module):
    """Reads the weight of a layer of its child, and calls it elsewhere."""

    def __init__(self):
        super().__init__()
        self.inner = Reader()
        self.mix = nn.Linear(4, 6)

    def forward(self, x):
        return F.linear(self.inner(self.mix(self.inner(x))), self.inner.head.weight.T)


class Twice(nn.Module):
    """Has one layer under two names, and in a list."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.more = nn.ModuleList([self.first, nn.Linear(6, 6)])

    def forward(self, x):
        return self.more[1](self.more[0](torch.tanh(self.second(torch.tanh(self.first(x))))))


class Normed(nn.Module):
    """One layer, changed by a function, before another."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer = change(layer)
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.layer(x).flatten(1))


class Wrapped(nn.Module):
    """A module whose first result counts."""

    def __init__(self, module, *more):
        super().__init__()
        self.module, self.more = module, more

    def forward(self, x):
        result = self.module(*[x] * (1 + len(self.more)))
        return result[0] if isinstance(result, tuple) else result


def small(model_cls: Any, config_cls: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: build(model_cls, config_cls(**{**TEXT, **options}))


@dataclass
class Use:
    """A model, what it is asked to adapt, and its input."""

    build: Callable[[], nn.Module]
    targets: dict[str, Any]
    x: Any = field(default_factory=lambda: torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))

    def model(self):
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            run(model, self.x)
        return model


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def modules(*names):
    return {"target_modules": list(names)}


def attention(**options):
    return Wrapped(nn.MultiheadAttention(8, 2, batch_first=True, **options), 1, 2)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


MAMBA = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4}
LFM = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
}  # fmt: skip


class Router(nn.Linear):
    """A layer that returns several tensors, as routers of experts do."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), (logits.argmax(-1), logits)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.out = Router(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        scores, (chosen, logits) = self.router(x)
        return self.out(scores * logits) + chosen[:, None]


USES = {
    "router": Use(Routed, modules("router", "out")),
    "reader": Use(Reader, modules("proj", "head")),
    "grandparent": Use(Grandparent, modules("head", "mix", "proj")),
    "twice": Use(Twice, modules("first", "second", "more.1")),
    "attention": Use(attention, modules("module"), normal(2, 5, 8)),
    "attention-parameters": Use(
        attention,
        {"target_modules": ["out_proj"], "target_parameters": ["module.in_proj_weight"]},
        normal(2, 5, 8),
    ),
    "attention-widths": Use(
        lambda: Wrapped(nn.MultiheadAttention(8, 2, kdim=8, vdim=8, bias=False, add_bias_kv=True), 1, 2),
        modules("module"), normal(2, 5, 8),
    ),
    "encoder": Use(encoder, modules("linear1", "linear2", "self_attn"), normal(2, 5, 8)),
    "encoder-feedforward": Use(encoder, modules("linear1", "linear2"), normal(2, 5, 8)),
    "encoder-out": Use(encoder, modules("out_proj"), normal(2, 5, 8)),
    "lstm": Use(lambda: Wrapped(nn.LSTM(6, 5, 2, bidirectional=True)), modules("module"), normal(4, 3, 6)),
    "gru": Use(
        lambda: Wrapped(nn.GRU(6, 5)), {"target_parameters": ["module.weight_hh_l0"]}, normal(4, 3, 6)
    ),
    "bilinear": Use(lambda: Wrapped(nn.Bilinear(6, 6, 3), 1), modules("module")),
    "transposed-1d": Use(
        lambda: Wrapped(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1)),
        modules("module"), normal(2, 4, 7),
    ),
    "transposed-2d-groups": Use(
        lambda: Wrapped(nn.ConvTranspose2d(4, 6, (3, 2), groups=2, dilation=2, bias=False)),
        modules("module"), normal(2, 4, 5, 4),
    ),
    "transposed-3d": Use(
        lambda: Wrapped(nn.ConvTranspose3d(3, 2, 2)), modules("module"), normal(1, 3, 3, 2, 2)
    ),
    "mamba": Use(
        small(hf.MambaForCausalLM, hf.MambaConfig, **MAMBA),
        modules("conv1d", "dt_proj", "x_proj", "in_proj", "out_proj"), IDS,
    ),
    "falcon-mamba": Use(
        small(hf.FalconMambaForCausalLM, hf.FalconMambaConfig, **MAMBA), modules("conv1d", "dt_proj"), IDS
    ),
    "lfm2": Use(small(hf.Lfm2ForCausalLM, hf.Lfm2Config, **LFM), modules("conv.conv", "in_proj"), IDS),
    "weight-norm": Use(
        lambda: Normed(nn.Conv1d(6, 4, 3, groups=2), parametrizations.weight_norm),
        modules("layer"), normal(2, 6, 5),
    ),
    "weight-norm-linear": Use(
        lambda: Normed(nn.Linear(6, 5), lambda m: parametrizations.weight_norm(m, dim=None)), modules("layer")
    ),
    "weight-norm-old": Use(
        lambda: Normed(nn.Linear(6, 5), lambda m: weight_norm(m, dim=1)), modules("layer")
    ),
    "weight-norm-transposed": Use(
        lambda: Normed(nn.ConvTranspose1d(6, 4, 3), weight_norm), modules("layer"), normal(2, 6, 5)
    ),
}  # fmt: skip


def run(model, x):
    result = model(x)
    return getattr(result, "logits", result)


def fitting(method, use, **options):
    """Config of a method for a use; MoS has one pool for all shapes of a kind."""
    return method.config(
        **{"target_modules": None, "init_weights": False, "seed": 3, **use.targets, **options}
    )


def layers(model):
    return {
        weight_name(name, module).removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, SubspaceLayer)
    }


def plain(model, use, adapter="default"):
    """The base model, with `W + ΔW` in the place of each adapted weight."""
    base = use.model()
    for name, layer in layers(model).items():
        owner = base.get_submodule(name) if layer.parameter_name not in name.split(".")[-1:] else None
        owner = owner or base.get_submodule(name.rpartition(".")[0])
        own = layer.parameter_name
        weight = layer.base_weight.original().detach() + layer.get_delta_weight(adapter).detach()
        if own in owner._parameters:
            getattr(owner, own).data.copy_(weight)
        else:
            if parametrize.is_parametrized(owner, own):
                parametrize.remove_parametrizations(owner, own)
            else:
                torch.nn.utils.remove_weight_norm(owner, own)
            getattr(owner, own).data.copy_(weight)
    return base


@pytest.fixture(params=USES.values(), ids=USES)
def use(request):
    return request.param


def test_weight_is_updated_wherever_it_is_used_trains_and_merges(method, use):
    model = get_peft_model(use.model(), fitting(method, use)).train()
    run(model, use.x).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(model.prefix in name for name in trained)
    assert all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        base = run(use.model(), use.x)
        truth = run(plain(model, use), use.x)
        assert distance(truth, base) > 1e-4
        for training in (True, False):
            assert distance(run(model.train(training), use.x), truth) < 1e-5
        model.merge_adapter()
        assert distance(run(model, use.x), truth) < 1e-5
        model.unmerge_adapter()
        assert distance(run(model, use.x), truth) < 1e-5
        with model.disable_adapter():
            assert distance(run(model, use.x), base) < 1e-6
        merged = model.merge_and_unload()
        assert not layers(merged)
        assert distance(run(merged, use.x), truth) < 1e-5


def test_adapter_saves_and_loads(method, use, tmp_path):
    model = get_peft_model(use.model(), fitting(method, use)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad(), warnings.catch_warnings():
        expected = run(model, use.x)
        warnings.filterwarnings("error", "Found missing adapter keys")
        for load in (PeftModel.from_pretrained, peft_subspace.load):
            again = load(use.model(), tmp_path).eval()
            assert distance(run(again, use.x), expected) < 1e-6
        again.load_adapter(tmp_path, "second")
        again.set_adapter("second")
        assert distance(run(again, use.x), expected) < 1e-6
        again.delete_adapter("default")
        assert distance(run(again, use.x), expected) < 1e-6
        again.delete_adapter("second")


EXPORTED = ("lstm", "gru", "bilinear", "weight-norm-linear", "weight-norm-old")


def test_lora_export_gives_the_same_outputs_or_is_refused(method, use, tmp_path):
    model = get_peft_model(use.model(), fitting(method, use)).eval()
    try:
        peft_subspace.export_lora(model, tmp_path)
    except ValueError as error:
        assert "have no LoRA form that PEFT runs" in str(error)  # noqa: PT017 - right for the others
        assert not any(use is USES[name] for name in EXPORTED)
        assert not list(tmp_path.iterdir())
        return
    served = PeftModel.from_pretrained(use.model(), tmp_path).eval()
    with torch.no_grad():
        assert distance(run(served, use.x), run(model, use.x)) < 1e-5
        assert distance(run(served, use.x), run(use.model(), use.x)) > 1e-3


class Renamer(nn.Module):
    """Reads the weights of layers under names of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.stack = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.named = nn.ModuleDict({"own": nn.Linear(6, 6)})
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        layer = self.first
        x = torch.tanh(F.linear(x, layer.weight, layer.bias))
        x = F.linear(x, torch.stack([part.weight for part in (self.second, self.third)]).sum(0))
        for index, part in enumerate(self.stack):
            x = torch.tanh(x @ part.weight.T + index)
        for _, (part, scale) in enumerate(zip(self.named.values(), (2,), strict=True)):
            x = scale * F.linear(x, part.weight)
        return self.head(self.block[1](x @ self.block[0].weight))


RENAMED = Use(Renamer, modules("first", "second", "third", "stack.0", "stack.1", "own", "block.0", "head"))


@pytest.mark.typical("methods")
def test_weights_are_followed_under_other_names(method, tmp_path):
    test_weight_is_updated_wherever_it_is_used_trains_and_merges(method, RENAMED)
    model = get_peft_model(RENAMED.model(), fitting(method, RENAMED, target_modules="all-linear"))
    assert list(layers(model)) == ["block.0", "head"]  # a part of what is called
    for name in ("first", "stack.1"):
        targets = {"target_modules": None, "target_parameters": [f"{name}.weight"]}
        model = get_peft_model(RENAMED.model(), fitting(method, RENAMED, **targets))
        with pytest.raises(ValueError, match=f"{name} .a weight that the model computes with"):
            peft_subspace.export_lora(model, tmp_path)


@pytest.mark.typical("methods")
def test_parameter_that_a_fused_path_reads_has_no_lora_form(method, tmp_path):
    use = Use(
        encoder,
        {"target_modules": None, "target_parameters": ["self_attn.in_proj_weight"]},
        USES["encoder"].x,
    )
    model = get_peft_model(use.model(), fitting(method, use)).eval()
    assert distance(run(model, use.x), run(plain(model, use), use.x)) < 1e-5
    with pytest.raises(ValueError, match="a weight that the model computes with"):
        peft_subspace.export_lora(model, tmp_path)


# ------------------------------------------------------------------------------------------- computed


@pytest.mark.typical("methods")
def test_what_makes_a_weight_is_no_target_whatever_its_name(method, tmp_path):
    use = Use(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh()), modules("0"))
    test_weight_is_updated_wherever_it_is_used_trains_and_merges(method, use)
    test_lora_export_gives_the_same_outputs_or_is_refused(method, use, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()


@pytest.mark.typical("methods")
def test_copy_of_a_module_that_copies_itself_is_adapted(method):
    def half_parametrized():
        return Wrapped(parametrizations.weight_norm(nn.LSTM(6, 5), "weight_hh_l0"))

    use = Use(half_parametrized, {"target_parameters": ["module.weight_ih_l0"]}, normal(4, 3, 6))
    model = get_peft_model(use.model(), fitting(method, use))
    with torch.no_grad():
        assert torch.equal(run(copy.deepcopy(model), use.x), run(model, use.x))
        assert distance(run(model, use.x), run(use.model(), use.x)) > 1e-3


def routed(**options):
    torch.manual_seed(0)
    config = peft_subspace.FLoRAConfig(r=2, target_modules=["router"], init_weights=False, **options)
    return get_peft_model(Routed(), config)


def test_dropout_acts_on_layers_that_return_several_tensors():
    model, x = routed(dropout=0.9), USES["router"].x
    evaluated = [model.eval()(x) for _ in range(2)]
    trained = [model.train()(x) for _ in range(2)]
    assert torch.equal(*evaluated)
    assert not torch.equal(*trained)
    trained[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_one_adapter_per_sample_is_refused_where_layers_return_several_tensors():
    model, x = routed().eval(), USES["router"].x
    with pytest.raises(ValueError, match="adapter_names cannot be used where Router returns several tensors"):
        model(x, adapter_names=["default", "__base__", "default", "__base__"])
    assert torch.equal(model(x), model(x, adapter_names=None))


def permanent(layer):
    return prune.random_unstructured(layer, "weight", 0.5)


class Exponential(nn.Module):
    """A parametrization without an inverse."""

    def forward(self, x):
        return x.exp()


def exponential(layer):
    parametrize.register_parametrization(layer, "weight", Exponential())
    return layer


@pytest.mark.parametrize(
    "change",
    [parametrizations.spectral_norm, spectral_norm, permanent, parametrizations.orthogonal, exponential],
    ids=["spectral-norm", "spectral-norm-old", "pruning", "orthogonal", "no-inverse"],
)
def test_merge_into_a_weight_that_cannot_be_made_is_refused_before_anything_changes(method, change):
    torch.manual_seed(0)
    base = nn.ModuleDict({"before": nn.Linear(5, 5), "layer": change(nn.Linear(5, 5))})
    model = get_peft_model(base, method.config(target_modules=["before", "layer"], init_weights=False)).eval()
    layer = model.base_model.model["layer"]
    x = normal(3, 5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        found = layer(x)
        weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
        assert distance(found, F.linear(x, weight, layer.bias)) < 1e-5
        if method.name.startswith("continual") and change is parametrizations.spectral_norm:
            model.merge_adapter()  # the largest singular value is among those that stay
            assert distance(layer(x), found) < 1e-5
            return
        for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
            with pytest.raises(TypeError, match=r"its weight is made by .*serve the adapter unmerged"):
                merge()
            assert not any(layer.merged for layer in layers(model).values())
            assert torch.equal(layer(x), found)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_unmerging_restores_the_parts_of_a_weight_bit_for_bit(method):
    for change in (parametrizations.weight_norm, weight_norm):
        torch.manual_seed(0)
        base = nn.ModuleDict({"layer": change(nn.Linear(5, 4))})
        model = get_peft_model(base, method.config(init_weights=False))
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):
            model.merge_adapter()
            assert any(not torch.equal(before[name], t) for name, t in model.state_dict().items())
            model.unmerge_adapter()
            assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_parametrized_parameter_is_refused(method):
    base = nn.ModuleDict({"layer": parametrizations.weight_norm(nn.Linear(5, 4))})
    with pytest.raises(TypeError, match=r"layer\.weight: it is parametrized.*target_modules"):
        get_peft_model(base, method.config(target_modules=None, target_parameters=["layer.weight"]))
    assert type(base["layer"]).__name__ == "ParametrizedLinear"


# ---------------------------------------------------------------------------------------- all-linear


def test_all_linear_leaves_out_layers_that_are_never_called(method):
    cases = [(USES["mamba"], "dt_proj", "in_proj"), (USES["encoder"], "out_proj", "linear1")]
    cases.append((USES["reader"], "proj", "head"))
    for use, dead, live in cases:
        model = get_peft_model(use.model(), fitting(method, use, target_modules="all-linear")).train()
        names = {name.rpartition(".")[2] for name in layers(model)}
        assert live in names
        assert dead not in names
        run(model, use.x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------- what cannot be known


class Hidden(nn.Module):
    """Its layers are used in ways that no source shows."""

    def __init__(self, skip):
        super().__init__()
        self.skip = skip
        for name in ("a", "b", "c"):
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x):
        for name in ("a", "b", "c"):
            layer = getattr(self, name)
            if name != "b" or self.skip == "nothing":
                x = torch.tanh(layer(x))
            elif self.skip == "read":
                x = torch.tanh(F.linear(x, getattr(layer, "weight")))  # noqa: B009 - hides it
            elif self.skip == "detached":
                x = torch.tanh(x + layer(x).detach())
            elif self.skip == "no_grad":
                with torch.no_grad():
                    y = layer(x)
                x = x + y
        return x


@pytest.mark.parametrize("skip", ["uncalled", "read", "detached", "no_grad", "nothing"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_first_step_names_layers_that_got_no_gradient(method, skip, checkpointed):
    model = get_peft_model(Hidden(skip), method.config(target_modules=["a", "b", "c"], init_weights=False))
    x = normal(3, 6).requires_grad_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        optimizer.zero_grad()
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(model.base_model.model, x, use_reentrant=False)
        else:
            y = model(x)
        y.square().sum().backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        with torch.no_grad():
            model.eval()(x)
            model.train()
        if skip == "nothing":
            step()
            return
    with pytest.warns(UserWarning, match=r"'default' got no gradient in the first .* 1 of 3 layers: b\."):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


def test_one_adapter_per_sample_is_refused_where_the_weight_is_read(method):
    use = USES["reader"]
    model = get_peft_model(use.model(), fitting(method, use)).eval()
    with pytest.raises(ValueError, match=r"adapter_names cannot be used where the model itself computes"):
        model(use.x, adapter_names=["default"] * 4)
    assert torch.isfinite(run(model, use.x)).all()
