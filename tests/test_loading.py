"""Bad adapters: one clear error each, and the model as it was before."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import peft_subspace
from methods import METHODS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Network(nn.Module):
    """A layer of each kind, and one that cannot be adapted."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.conv = nn.Conv1d(4, width, 3, padding=1)
        self.upsample = nn.ConvTranspose1d(width, width, 1)
        self.norm = nn.LayerNorm(width)
        self.layer = nn.Linear(width, 5)

    def forward(self, x):
        x = self.conv(self.embed(x).transpose(1, 2))
        return self.layer(self.norm(self.upsample(x).transpose(1, 2)))


X = torch.arange(22).reshape(2, 11) % 11
ALL = ["conv", "layer"]


def base_model(width=6):
    torch.manual_seed(1)
    return Network(width)


@pytest.fixture
def saved(method, tmp_path):
    """A sound adapter, saved."""
    torch.manual_seed(2)
    config = method.config(target_modules=ALL, init_weights=False)
    model = get_peft_model(base_model(), config)
    model.save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensor(folder, change, part=".layer.", dtype=None):
    state = load_file(folder / WEIGHTS)
    key = next(key for key in sorted(state) if part in key and dtype in (None, state[key].dtype))
    state[key] = change(state[key])
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    return key


def with_value(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


def snapshot(model):
    modules = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return modules, state, {name: p.requires_grad for name, p in model.named_parameters()}


def assert_untouched(model, before):
    modules, state, trained = snapshot(model)
    assert modules == before[0]
    assert state.keys() == before[1].keys()
    assert all(torch.equal(state[name], before[1][name]) for name in state)
    assert trained == before[2]


def assert_refuses(folder, error, message):
    """Own loader: refused with this message on a bare model and on one with an adapter, both untouched."""
    for model in (base_model(), with_adapter()):
        before = snapshot(model)
        with pytest.raises(error, match=message):
            peft_subspace.load(model, folder, "new")
        assert_untouched(model, before)
        assert "new" not in getattr(model, "peft_config", {})
        model(X)


def with_adapter(folder=None):
    """A model with an adapter, if a folder is given of the same method as the one in there."""
    torch.manual_seed(3)
    name = json.loads((folder / CONFIG).read_text())["peft_type"] if folder else "FLORA"
    method = next(method for method in METHODS if method.config_cls.peft_type_name == name)
    return get_peft_model(base_model(), method.config(target_modules=["layer"], init_weights=False))


def assert_peft_refuses(folder, error, message):
    """PEFT's loader: refused with this message, the new adapter is gone, and the model works as before."""
    model = base_model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(model, folder)
    assert snapshot(model)[0] == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())

    model = with_adapter(folder).eval()
    before, output = snapshot(model), model(X)
    with pytest.raises(error, match=message):
        model.load_adapter(folder, "new")
    assert "new" not in model.peft_config
    assert not [name for name in model.state_dict() if ".new" in name]
    assert torch.equal(model(X), output)
    assert {n for n, trains in before[2].items() if trains} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


# ------------------------------------------------------------------------------------ sound adapters


def test_sound_adapter_loads_alike_through_both_loaders(saved):
    ours = peft_subspace.load(base_model(), saved)
    theirs = PeftModel.from_pretrained(base_model(), saved)
    assert torch.equal(ours(X), theirs(X))
    assert not torch.equal(ours(X), base_model()(X))


def test_own_loader_hands_its_options_on(saved):
    model = peft_subspace.load(base_model(), saved, is_trainable=True)
    assert any(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in peft_subspace.load(base_model(), str(saved)).parameters())


def test_name_that_exists_is_refused(saved):
    model = with_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_name='default' exists already"):
        peft_subspace.load(model, saved)
    assert_untouched(model, before)


# ------------------------------------------------------------------------------------- broken tensors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.feature("damaged or unfit files refused, the model untouched")
def test_values_that_are_not_finite_are_refused(saved, value):
    key = change_tensor(saved, with_value(value), ".layer", torch.float32)
    assert_refuses(saved, ValueError, f"{key} has NaN or infinite values.*train it again")
    assert_peft_refuses(saved, ValueError, r"layer.* has NaN or infinite values.*train it again")


@pytest.mark.parametrize("part", ALL)
@pytest.mark.feature("damaged or unfit files refused, the model untouched")
def test_tensors_of_another_shape_are_refused(saved, part):
    change_tensor(saved, lambda tensor: torch.cat([tensor, tensor]), f".{part}.")
    message = rf"{part}.* has shape .* but the base model needs .*; load the adapter on the base model"
    assert_refuses(saved, ValueError, message)
    assert_peft_refuses(saved, ValueError, message)


@pytest.mark.feature("damaged or unfit files refused, the model untouched")
def test_base_model_of_another_width_is_refused(saved):
    for load in (peft_subspace.load, PeftModel.from_pretrained):
        model = base_model(width=9)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"has shape .* but the base model needs .* trained on"):
            load(model, saved)
        assert snapshot(model)[0] == before[0]


@pytest.mark.feature("damaged or unfit files refused, the model untouched")
def test_missing_tensors_are_refused(saved):
    state = load_file(saved / WEIGHTS)
    key = sorted(state)[0]
    del state[key]
    save_file(state, saved / WEIGHTS, metadata={"format": "pt"})
    assert_refuses(saved, ValueError, f"1 tensors .* are missing, such as {key}; load")


# -------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("keep", [0, 4, 0.5, -1], ids=["empty", "in-the-length", "half", "last-byte"])
@pytest.mark.feature("damaged or unfit files refused, the model untouched")
def test_truncated_files_are_refused(saved, keep):
    path = saved / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert_refuses(saved, ValueError, r"adapter_model.safetensors is not a complete safetensors file.*again")


def test_truncated_file_is_refused_through_peft_before_the_adapter_is_added(saved):
    path = saved / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    assert_peft_refuses(saved, ValueError, "is not a complete safetensors file.*again")


@pytest.mark.feature("damaged or unfit files refused, the model untouched")
def test_pickled_files_are_refused(saved):
    torch.save({"tensor": torch.ones(1)}, saved / WEIGHTS)
    assert_refuses(saved, ValueError, "not a complete safetensors file")
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    assert_refuses(saved, FileNotFoundError, "has no adapter_model.safetensors; give the folder")


def test_missing_config_is_refused(saved):
    (saved / CONFIG).unlink()
    assert_refuses(saved, FileNotFoundError, "has no adapter_config.json; give the folder")


@pytest.mark.parametrize("text", ["", "{", "[]", '"flora"'])
def test_config_that_is_no_json_object_is_refused(saved, text):
    (saved / CONFIG).write_text(text)
    assert_refuses(saved, ValueError, "adapter_config.json is not a JSON object.*save the adapter again")


@pytest.mark.parametrize("peft_type", ["LORA", "NONE_OF_OURS", None])
def test_adapters_of_other_methods_are_refused(saved, peft_type):
    change_config(saved, peft_type=peft_type)
    assert_refuses(saved, ValueError, rf"peft_type={peft_type!r} is none of .*PeftModel.from_pretrained")


@pytest.mark.feature("damaged or unfit files refused, the model untouched")
def test_files_of_a_newer_format_are_refused(saved):
    change_config(saved, format_version=99)
    message = "format_version=99 is newer than 2.*upgrade peft_subspace"
    assert_refuses(saved, ValueError, message)
    assert_peft_refuses(saved, ValueError, message)


# ------------------------------------------------------------------------------------ broken configs


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": 0}, ValueError, r"r=0 must be at least 1; try r=8"),
        ({"r": -3}, ValueError, r"r=-3 must be at least 1; try r=8"),
        ({"r": "8"}, TypeError, r"r='8' must be a whole number, such as r=8"),
        ({"init_weights": "zeros"}, ValueError, r"init_weights='zeros' must be one of \(True, False"),
        ({"bias": "some"}, ValueError, r"bias='some' must be one of \('none', 'all', "),
    ],
    ids=["zero-rank", "negative-rank", "rank-of-text", "unknown-init", "unknown-bias"],
)
def test_configs_that_no_layer_could_take_are_refused(saved, changes, error, message):
    change_config(saved, **changes)
    assert_refuses(saved, error, message)
    assert_peft_refuses(saved, error, message)


def test_modules_that_cannot_be_adapted_are_refused(saved):
    change_config(saved, target_modules=["norm", "layer"])
    message = "norm: LayerNorm cannot be adapted; supported are Linear, Conv1D .*, Embedding, Conv1d"
    assert_refuses(saved, TypeError, message)
    assert_peft_refuses(saved, TypeError, message)


def test_targets_that_match_nothing_are_refused(saved):
    change_config(saved, target_modules=["q_proj", "v_proj"])
    assert_refuses(saved, ValueError, "target_modules=.*match no module of Network; load the adapter on")
    assert_peft_refuses(saved, ValueError, "[Tt]arget modules .*not found")


def test_groups_that_do_not_divide_are_refused(saved, method):
    for load in (peft_subspace.load, PeftModel.from_pretrained):
        model = base_model()
        model.conv.groups = 3
        before = snapshot(model)
        message = r"conv: groups=3 must divide in_channels=4 and out_channels=6; correct the layer"
        with pytest.raises(ValueError, match=message):
            load(model, saved)
        assert_untouched(model, before)


# ---------------------------------------------------------------------- the same without a file


def test_wrapping_refuses_before_it_replaces_anything(method):
    model = base_model()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"norm: .* cannot be adapted; supported are"):
        get_peft_model(model, method.config(target_modules=["layer", "conv", "norm"]))
    assert_untouched(model, before)


def test_adapter_that_fails_to_be_added_is_forgotten(method):
    model = get_peft_model(base_model(), method.config(target_modules=["layer"], init_weights=False))
    before, output = snapshot(model), model(X)
    with pytest.raises(TypeError, match="norm: LayerNorm cannot be adapted"):
        model.add_adapter("new", method.config(target_modules=["layer", "norm"]))
    assert_untouched(model, before)
    assert "new" not in model.peft_config
    assert torch.equal(model(X), output)
    model.add_adapter("new", method.config(target_modules=["layer"]))


def test_layer_without_a_weight_yet_is_refused(method):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(4)

    with pytest.raises(ValueError, match=r"layer: LazyLinear has no weight yet; run one batch"):
        get_peft_model(Lazy(), method.config())


@pytest.mark.parametrize("path", ["adaptor", "you/adapter", "/no/such/folder", "runs/checkpoint-5/adapter"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_said_in_one_line(path):
    with pytest.raises(FileNotFoundError, match=rf"^{path} is no folder here, and .*; check the name$"):
        peft_subspace.load(base_model(), path)


def step(model):
    model.train()(X).square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads)


@pytest.mark.filterwarnings("ignore:adapter .* trains in bases taken from the base weight")
@pytest.mark.parametrize("alone", [True, False], ids=["config", "adapter"])
@pytest.mark.parametrize("added", [True, False], ids=["second", "first"])
def test_configs_of_files_never_make_adapters_that_cannot_learn(method, alone, added, tmp_path):
    config = method.config(target_modules=ALL)
    saved = get_peft_model(base_model(), config)
    for parameter in saved.parameters():
        parameter.data += 0.1 * parameter.requires_grad * torch.ones_like(parameter)
    (config if alone else saved).save_pretrained(tmp_path)

    def adapter(**changes):
        read = PeftConfig.from_pretrained(tmp_path)
        for name, value in {"inference_mode": False, **changes}.items():
            setattr(read, name, value)
        if not added:
            return get_peft_model(base_model(), read)
        model = get_peft_model(base_model(), method.config(target_modules=ALL), adapter_name="one")
        model.add_adapter("default", read)
        model.set_adapter("default")
        return model

    model = adapter()
    if str(method) in ("effort", "continual_svd"):  # whose frozen tensors are a part of the update
        with pytest.raises(RuntimeError, match=r"'default' has a config that was read from a file.*load"):
            step(model)
        if not alone:
            set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
            step(model)
            assert torch.allclose(model.eval()(X), saved.eval()(X), atol=1e-5)
    else:
        step(model)
    step(adapter(initialized=False))
