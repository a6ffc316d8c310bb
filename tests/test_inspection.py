"""Inspecting and exporting adapters from their files, against dense updates; the command line."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import peft_subspace
from layers import distance
from methods import METHODS
from models import bert, gpt2, llama, resnet
from peft_subspace.__main__ import main
from peft_subspace.tools.inspection import layer_overlaps, layer_updates
from peft_subspace.tools.plots import save_plot
from peft_subspace.tools.read_adapter import read_adapter
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer
from test_contract_models import logits

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")

MODELS = {
    "llama": (llama, ["q_proj", "down_proj", "embed_tokens"], {"rank_pattern": {"q_proj": 3}}),
    "gpt2": (gpt2, ["c_attn"], {"task_type": "CAUSAL_LM"}),
    "bert": (bert, ["query"], {"task_type": "SEQ_CLS", "bias": "all"}),
    "resnet": (resnet, ["convolution"], {}),
}
TOKENS = {"input_ids": torch.arange(3, 18).reshape(3, 5)}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
FLORA = next(method for method in METHODS if method.name == "flora")
LORA_SB = next(method for method in METHODS if method.name == "lora_sb")


def saved(method, name, folder, seed=1, **options):
    """An adapter that changes the output, saved in `folder`, beside it the config of its base model only."""
    build, targets, more = MODELS[name]
    options = {"target_modules": targets, "init_weights": False, **more, **options}
    model = get_peft_model(build(), method.config(seed=seed, **options)).eval()
    config = model.get_base_model().config
    config.architectures = [type(model.get_base_model()).__name__]
    config.save_pretrained(folder.parent / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder.parent / "base")
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and ("classifier" in key or key.endswith("bias")):
            parameter.data.normal_()
    model.save_pretrained(folder)
    return model


def dense(model):
    return {
        name: layer.kind.to_layout(layer.get_delta_weight("default")).flatten(1).double()
        for name, layer in adapted_layers(model, "default", SubspaceLayer).items()
    }


# ----------------------------------------------------------------------------------------- one adapter


@pytest.mark.feature("inspect: norms, ranks and spectra from the file")
@pytest.mark.parametrize("name", MODELS)
def test_updates_equal_those_of_the_dense_weights(method, name, tmp_path):
    model = saved(method, name, tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    weights = {n: p for n, p in read.named_parameters() if n.endswith("proj.base_layer.weight")}
    assert all(p.is_meta for p in weights.values())
    updates, expected = layer_updates(read), dense(model)
    assert updates.keys() == expected.keys()
    for module, update in updates.items():
        values = torch.linalg.svdvals(expected[module])
        count = len(update.singular_values)
        assert count == min(update.rank, *expected[module].shape)
        assert distance(update.singular_values, values[:count]) < 1e-5
        assert values[count:].sum() < 1e-5 * values[0]
        assert update.norm == pytest.approx(float(expected[module].norm()), rel=1e-5)
        parts = [float(v / values.sum()) for v in values if v > 1e-6 * values[0]]
        entropy = -sum(p * math.log(p) for p in parts)
        assert update.effective_rank == pytest.approx(math.exp(entropy), rel=1e-3)
        layer = adapted_layers(model, "default", SubspaceLayer)[module]
        own = sum(p.numel() for n, p in layer.named_parameters() if ".default." in n)
        assert update.trained == own


def test_update_of_zero_has_no_rank_and_no_overlap(tmp_path):
    saved(FLORA, "llama", tmp_path / "adapter", init_weights=True)
    model = read_adapter(tmp_path / "adapter")
    assert {(u.norm, u.effective_rank) for u in layer_updates(model).values()} == {(0.0, 0.0)}
    assert all(math.isnan(o.cosine) and math.isnan(o.inputs) for o in layer_overlaps(model, model).values())
    save_plot(tmp_path / "zero.svg", layer_updates(model))


def test_adapter_is_inspected_on_any_model_too():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), FLORA.config(target_modules=["0"]))
    assert [*layer_updates(model)] == ["0"]
    with pytest.raises(ValueError, match="adapter_name='absent' is no adapter of peft_subspace"):
        layer_updates(model, "absent")


# ---------------------------------------------------------------------------------------- two adapters


@pytest.mark.feature("inspect: overlap of two adapters")
def test_overlap_equals_that_of_the_dense_weights(method, tmp_path):
    one = saved(method, "llama", tmp_path / "one")
    two = saved(LORA_SB, "llama", tmp_path / "two", seed=7, target_modules=["q_proj", "down_proj", "v_proj"])
    overlaps = layer_overlaps(read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two"))
    first, second = dense(one), dense(two)
    assert overlaps.keys() == first.keys() & second.keys()
    for name, overlap in overlaps.items():
        a, b = first[name], second[name]
        assert overlap.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-5)
        for found, left, right in ((overlap.outputs, a, b), (overlap.inputs, a.T, b.T)):
            projectors = [m @ torch.linalg.pinv(m, rtol=1e-5) for m in (left, right)]
            ranks = [int(torch.linalg.matrix_rank(m, rtol=1e-5)) for m in (left, right)]
            expected = float((projectors[0] * projectors[1]).sum()) / min(ranks)
            assert found == pytest.approx(expected, abs=1e-4)


def test_overlap_of_an_adapter_with_itself_is_one(method, tmp_path):
    saved(method, "llama", tmp_path / "one")
    model = read_adapter(tmp_path / "one")
    for overlap in layer_overlaps(model, model).values():
        assert (overlap.cosine, overlap.outputs, overlap.inputs) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)


def test_overlap_counts_the_rank_of_the_update_and_not_of_the_chain():
    models = []
    for seed in (1, 2):
        config = FLORA.config(target_modules=["0"], init_weights=False, seed=seed)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
        next(p for n, p in model.named_parameters() if n.endswith("core")).data[:, 1] = 0.0
        models.append(model)
    (a,), (b,) = (dense(model).values() for model in models)
    left, right = (torch.linalg.svd(m)[0][:, 0] for m in (a, b))
    assert layer_overlaps(*models)["0"].outputs == pytest.approx(float(left @ right) ** 2, abs=1e-5)


def test_overlap_does_not_count_directions_that_rounding_makes():
    def with_third_column(seed):
        """Rank 1, but for the rounding of a third."""
        config = FLORA.config(target_modules=["0"], r=2, init_weights=False, seed=seed)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
        delta = model.base_model.model[0].deltas["default"]
        delta.mode_factor_1.data[:, 1] = delta.mode_factor_1.data[:, 0] / 3
        return model

    models = [with_third_column(seed) for seed in (1, 2)]
    (a,), (b,) = (dense(model).values() for model in models)
    left, right = (torch.linalg.svd(m)[0][:, 0] for m in (a, b))
    assert layer_overlaps(*models)["0"].outputs == pytest.approx(float(left @ right) ** 2, abs=1e-5)


def test_adapters_without_common_modules_are_refused(tmp_path):
    models = []
    for name in ("q_proj", "v_proj"):
        saved(FLORA, "llama", tmp_path / name, target_modules=[name], rank_pattern={})
        models.append(read_adapter(tmp_path / name))
    with pytest.raises(ValueError, match="no modules in common"):
        layer_overlaps(*models)


def test_adapters_for_other_shapes_are_refused():
    models = [
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(size, 3)), FLORA.config(target_modules=["0"]))
        for size in (4, 5)
    ]
    with pytest.raises(ValueError, match="0: the adapters are for weights of different shapes"):
        layer_overlaps(*models)


# ---------------------------------------------------------------------------------------- command line


@pytest.mark.feature("inspect and LoRA export from the command line")
@pytest.mark.parametrize("name", MODELS)
def test_export_from_the_command_line_serves_the_same_outputs(method, name, tmp_path, capsys):
    model = saved(method, name, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--lora", str(tmp_path / "lora")]) == 0
    assert str(tmp_path / "lora") in capsys.readouterr().out
    served = PeftModel.from_pretrained(MODELS[name][0](), tmp_path / "lora")
    assert isinstance(served.peft_config["default"], LoraConfig)
    inputs = PIXELS if name == "resnet" else TOKENS
    assert distance(logits(served.eval(), inputs), logits(model, inputs)) < 1e-5


@pytest.mark.feature("inspect and LoRA export from the command line")
def test_inspection_from_the_command_line_shows_tables_and_draws(method, tmp_path, capsys):
    model = saved(method, "llama", tmp_path / "one")
    saved(FLORA, "llama", tmp_path / "two", seed=2)
    plot = tmp_path / "plot.png"
    assert main(["inspect", str(tmp_path / "one"), str(tmp_path / "two"), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert text.startswith(f"{tmp_path / 'one'}: {method.config_cls.peft_type_name}, r=")
    assert f"{count:,} trainable parameters" in text
    for name, update in dense(model).items():
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{float(update.norm()):.4g}" in line.split()
    assert f"overlap with {tmp_path / 'two'}: FLORA" in text
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_heads_of_another_size_than_the_base_models_are_read(tmp_path):
    """The config of a pretrained base model says two labels, and names another head."""
    saved(FLORA, "bert", tmp_path / "adapter")
    config = bert().config
    config.num_labels, config.architectures = 2, ["BertForMaskedLM"]
    config.save_pretrained(tmp_path / "base")
    head = read_adapter(tmp_path / "adapter").base_model.model.classifier.modules_to_save["default"]
    assert head.weight.shape[0] == 3
    assert not head.weight.is_meta


def fails(capsys, *arguments):
    assert main([*map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    return error


def test_missing_base_model_is_explained(tmp_path, capsys):
    model = saved(FLORA, "llama", tmp_path / "adapter")
    (tmp_path / "base" / "config.json").rename(tmp_path / "config.json")
    error = fails(capsys, "inspect", tmp_path / "adapter")
    assert f"config of the base model {str(tmp_path / 'base')!r} cannot be read" in error
    assert "--base on the command line" in error
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "elsewhere" / "config.json")
    base = ["--base", str(tmp_path / "elsewhere")]
    assert main(["inspect", str(tmp_path / "adapter"), *base]) == 0
    assert main(["export", str(tmp_path / "adapter"), "--lora", str(tmp_path / "lora"), *base]) == 0
    lora = LoraConfig.from_pretrained(tmp_path / "lora")
    assert lora.base_model_name_or_path == str(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path / "nameless")
    assert "does not name its base model" in fails(capsys, "inspect", tmp_path / "nameless")


def test_folders_without_an_adapter_are_explained(tmp_path, capsys):
    assert "has no adapter_config.json" in fails(capsys, "inspect", tmp_path)
    saved(FLORA, "llama", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    error = fails(capsys, "export", tmp_path / "adapter", "--lora", tmp_path / "lora")
    assert "has no adapter_model.safetensors" in error
    assert not (tmp_path / "lora").exists()


def test_truncated_file_is_explained(tmp_path, capsys):
    saved(FLORA, "bert", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "is not a complete safetensors file" in fails(capsys, "inspect", tmp_path / "adapter")


def test_adapter_of_another_base_model_is_explained(tmp_path, capsys):
    saved(FLORA, "llama", tmp_path / "one")
    wide = llama(hidden_act="relu").config
    wide.hidden_size, wide.architectures = 32, ["LlamaForCausalLM"]
    wide.save_pretrained(tmp_path / "wide")
    assert "has shape" in fails(capsys, "inspect", tmp_path / "one", "--base", tmp_path / "wide")


def test_missing_matplotlib_is_explained(tmp_path, capsys, monkeypatch):
    saved(FLORA, "llama", tmp_path / "one")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = fails(capsys, "inspect", tmp_path / "one", "--plot", tmp_path / "plot.png")
    assert "pip install matplotlib" in error


def test_library_and_command_line_agree_on_the_lora(tmp_path):
    model = saved(FLORA, "llama", tmp_path / "adapter", target_modules=["q_proj"])
    _, state = peft_subspace.lora_state_dict(model)
    _, read = peft_subspace.lora_state_dict(read_adapter(tmp_path / "adapter"))
    assert state.keys() == read.keys()
    assert all(torch.equal(state[key], read[key]) for key in state)


def test_inspection_is_a_table_and_a_picture_in_a_notebook(tmp_path):
    base = tmp_path / "base"
    llama().save_pretrained(base)
    for name, rank in (("first", 2), ("<other>", 3)):
        config = peft_subspace.FLoRAConfig(r=rank, target_modules=["q_proj"], init_weights=False)
        get_peft_model(llama(), config).save_pretrained(tmp_path / name)
    found = peft_subspace.inspect(tmp_path / "first", tmp_path / "<other>", base=base)
    rows = len(found.updates)
    assert rows == 3
    page = found._repr_html_()
    assert page.count("<tr>") == 2 * (rows + 1)
    assert page.count("<svg") == 1
    assert float(re.search(r'width="([\d.]+)pt"', page)[1]) <= 800  # as wide as a notebook
    assert page.count("<br>") == 2
    assert "<other>" not in page
    assert str(found).count("q_proj") == 2 * rows
    assert "overlap" not in str(peft_subspace.inspect(tmp_path / "first", base=base))
