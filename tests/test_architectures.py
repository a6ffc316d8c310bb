"""Every method on whole models of well-known architectures, and on models whose weights lie elsewhere."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import peft_subspace
from layers import CASES, adapt, distance
from layers import dense as layer_output
from methods import METHODS
from models import ARCHITECTURES, Architecture, build, clip, gemma, llama
from peft_subspace.tuner.layer import SubspaceLayer

pytestmark = [
    # PEFT's words of caution about adapters on tied embeddings, which the tests are about.
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
    # PEFT saves adapted embeddings in full.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

IDS = torch.arange(3, 18).reshape(3, 5)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def clear_convnext():
    """Without the factor of 1e-6 that its blocks begin with."""
    config = hf.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3, layer_scale_init_value=1.0
    )
    return build(hf.ConvNextForImageClassification, config)


FAMILIES = {
    "llama": ("Llama", [*TARGETS, "embed_tokens", "lm_head"]),
    "gemma": ("Gemma (scaled, tied embeddings)", [*TARGETS, "embed_tokens"]),
    "gpt2": ("GPT-2 (Conv1D)", ["c_attn", "c_proj", "c_fc", "wte"]),
    "bert": ("BERT", ["query", "value", "dense", "word_embeddings"]),
    "t5": ("T5 (its code reads .weight)", ["q", "v", "wi", "wo", "embed_tokens"]),
    "vit": ("ViT", ["q_proj", "v_proj", "fc1", "projection"]),
    "clip": ("CLIP", ["q_proj", "v_proj", "fc1", "patch_embedding", "token_embedding"]),
    "resnet": ("ResNet", ["convolution"]),
    "convnext": ("ConvNeXt (depthwise convolutions)", ["dwconv", "pwconv1", "pwconv2"]),
}
MORE = [Architecture("clip", clip, "text", ()), Architecture("convnext", clear_convnext, "image", ())]
KNOWN = {a.name: a for a in [*ARCHITECTURES, *MORE]}


@pytest.fixture(
    params=[
        pytest.param(name, id=name, marks=pytest.mark.feature(row)) for name, (row, _) in FAMILIES.items()
    ]
)
def architecture(request):
    return KNOWN[request.param]


def run(model, inputs):
    return first_output(model(**inputs))


def first_output(result):
    return result["logits"] if "logits" in result else result["logits_per_image"]


def output(model, inputs):
    with torch.no_grad():
        return run(model, inputs)


def wrap(method, architecture, base=None, **options):
    """Wrap a model; the updates are no larger than the weights, which would make chaos of depth."""
    targets = FAMILIES[architecture.name][1]
    options = {"target_modules": targets, "init_weights": False, "seed": 1, **options}
    return calm(get_peft_model(base or architecture.build(), method.config(**options)).eval())


def calm(model):
    for module in model.modules():
        if isinstance(module, SubspaceLayer):
            module.set_scale("default", 0.1)
    return model


def layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, SubspaceLayer)
    }


def dense(method, model, base, inputs):
    """Output, in double precision, of the plain model with the oracles' updates added to its weights."""
    for module in base.modules():  # an adapter belongs to one module, so none may share its weight
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
    weights = {name: p.detach() for name, p in base.double().named_parameters()}
    for name, layer in layers(model).items():
        update = 0.1 * method.delta_weight(layer.deltas["default"], model.peft_config["default"])
        transposed = isinstance(layer.get_base_layer(), Conv1D | torch.nn.Embedding)
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + (update.T if transposed else update)
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    return first_output(functional_call(base, weights, (), inputs))


# ------------------------------------------------------------------------------------------------ layers

KINDS = {
    "linear": "`nn.Linear`",
    "Conv1D": "`Conv1D` of transformers",
    "embedding": "`nn.Embedding`",
    "conv1d": "`nn.Conv1d`, `Conv2d`, `Conv3d`",
    "conv2d": "`nn.Conv1d`, `Conv2d`, `Conv3d`",
    "conv3d": "`nn.Conv1d`, `Conv2d`, `Conv3d`",
    "conv2d-grouped": "grouped and depthwise convolutions",
    "conv2d-depthwise": "grouped and depthwise convolutions",
    "linear-own-forward": "layers with a forward of their own",
    "conv2d-standardized": "layers with a forward of their own",
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.feature(row)) for kind, row in KINDS.items()]
)
def test_layer_equals_the_dense_oracle_and_trains(method, kind):
    case = next(case for case in CASES if case.name == kind)
    model, x = adapt(method, case), case.inputs()
    found = model(x)
    assert distance(found, layer_output(model, method, x)) < 1e-5
    found.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert distance(model(x), found) < 1e-5


# ---------------------------------------------------------------------------------------- architectures


def test_model_runs_merges_and_survives_saving(method, architecture, tmp_path):
    model, inputs = wrap(method, architecture), architecture.inputs()
    plain = output(architecture.build(), inputs)
    adapted = output(model, inputs)
    assert len(layers(model)) >= 3
    assert distance(adapted, plain) > 1e-3
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    model.merge_adapter()
    assert distance(output(model, inputs), adapted) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), adapted)
    model.save_pretrained(tmp_path)
    again = calm(PeftModel.from_pretrained(architecture.build(), tmp_path).eval())
    assert torch.equal(output(again, inputs), adapted)
    assert distance(output(again.merge_and_unload(), inputs), adapted) < 1e-5


def test_output_and_gradients_equal_the_dense_model(method, architecture):
    model, inputs = wrap(method, architecture), architecture.inputs()
    found = run(model, inputs)
    expected = dense(method, model, architecture.build(), inputs)
    assert distance(found, expected) < 1e-5
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(found.shape)
    gradients = torch.autograd.grad((found * weights).sum(), trained)
    truth = torch.autograd.grad((expected * weights).sum(), trained)
    for gradient, other in zip(gradients, truth, strict=True):
        assert distance(gradient, other) < 1e-3


# --------------------------------------------------------------------------- embeddings: tied and scaled


def on_embedding(method):
    """Adapt a tied, scaled embedding."""
    options = {"target_modules": ["embed_tokens"], "init_weights": False, "seed": 1}
    return get_peft_model(gemma(), method.config(**options)).eval()


@pytest.mark.feature("scaled embeddings (Gemma)")
def test_update_of_a_scaled_embedding_is_scaled_as_in_pefts_lora(method, tmp_path):
    model = on_embedding(method)
    base = gemma().model.embed_tokens.double()
    assert base.embed_scale == pytest.approx(4.0)
    layer = model.base_model.model.model.embed_tokens
    update = method.delta_weight(layer.deltas["default"], model.peft_config["default"]).T
    expected = functional_call(base, {"weight": base.weight + update}, (IDS,))
    assert distance(layer(IDS), expected) < 1e-5
    peft_subspace.export_lora(model, tmp_path)
    served = PeftModel.from_pretrained(gemma(), tmp_path).eval()
    assert distance(served.base_model.model.model.embed_tokens(IDS), expected) < 1e-5


@pytest.mark.feature("tied embeddings")
def test_merging_into_a_tied_embedding_leaves_the_head_alone(method):
    model = on_embedding(method)
    inputs = {"input_ids": IDS}
    before, base = output(model, inputs), model.get_base_model()
    embedding = base.model.embed_tokens.get_base_layer()
    assert embedding.weight is base.lm_head.weight
    model.merge_adapter()
    assert distance(output(model, inputs), before) < 1e-5
    assert torch.equal(base.lm_head.weight, gemma().lm_head.weight)
    model.unmerge_adapter()
    assert embedding.weight is base.lm_head.weight
    assert torch.equal(output(model, inputs), before)
    merged = model.merge_and_unload()
    assert distance(output(merged, inputs), before) < 1e-5
    assert merged.config.tie_word_embeddings is False


@pytest.mark.feature("merge and unmerge, bit for bit")
def test_merging_keeps_the_parameter_of_a_weight_that_is_not_tied(method):
    model = get_peft_model(llama(), method.config(target_modules=TARGETS, init_weights=False))
    before = {name: layer.base_weight.stored for name, layer in layers(model).items()}
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        for name, layer in layers(model).items():
            assert layer.base_weight.stored is before[name]


# ------------------------------------------------------------------------- device_map, offloaded weights

BLOCKS = ["layers.0", "layers.1", "layers.2", "embed_tokens", "norm", "rotary_emb"]
PLACES = {**{f"model.{name}": "cpu" for name in BLOCKS}, "model.layers.1": "disk", "lm_head": "disk"}


def on_disk(folder):
    """A model of which one block and the head lie on the disk."""
    path = folder / "models--tiny" / "snapshot"  # PEFT tells copies from originals by the name of the cache
    if not path.exists():
        llama().save_pretrained(path)
    options = {"device_map": PLACES, "offload_folder": folder / "offload"}
    model = hf.AutoModelForCausalLM.from_pretrained(path, **options)
    assert model.model.layers[1].mlp.down_proj.weight.is_meta
    return model.eval()


def in_memory(folder):
    """A model whose weights accelerate fetches from memory for each call."""
    return accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))


@pytest.fixture(
    params=[
        pytest.param(on_disk, id="disk", marks=pytest.mark.feature("offload to disk (`device_map`)")),
        pytest.param(in_memory, id="cpu", marks=pytest.mark.feature("CPU offload (`cpu_offload`)")),
    ]
)
def offloaded(request, tmp_path):
    return lambda: request.param(tmp_path)


def config(method, **options):
    return method.config(**{"target_modules": TARGETS, "init_weights": False, "seed": 1, **options})


def adapter_tensors(model):
    return {
        f"{name}.{key}": tensor
        for name, layer in layers(model).items()
        for key, tensor in layer.deltas["default"].state_dict(keep_vars=True).items()
    }


def test_adapter_on_an_offloaded_model_starts_and_trains_as_on_any(method, offloaded):
    options = {} if method.name == "lora_sb" else {"init_weights": True}
    inputs = {"input_ids": IDS, "labels": IDS}
    plain = get_peft_model(llama(), config(method, **options)).train()
    model = get_peft_model(offloaded(), config(method, **options)).train()
    assert not any(tensor.is_meta for tensor in adapter_tensors(model).values())
    for name, tensor in adapter_tensors(plain).items():
        assert torch.equal(adapter_tensors(model)[name], tensor), name
    plain(**inputs).loss.backward()
    model(**inputs).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert distance(parameter.grad, expected[name]) < 1e-5, name


def test_adapter_on_an_offloaded_model_merges_and_unmerges(method, offloaded):
    inputs = {"input_ids": IDS}
    expected = output(get_peft_model(llama(), config(method)).eval(), inputs)
    model = get_peft_model(offloaded(), config(method)).eval()
    before = output(model, inputs)
    assert distance(before, expected) < 1e-6
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(llama(), inputs))
    model.merge_adapter(safe_merge=True)
    assert distance(output(model, inputs), expected) < 1e-5
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(llama(), inputs))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), before)
    assert distance(output(model.merge_and_unload(), inputs), expected) < 1e-5


def placed(folder):
    """Options by which PEFT lays a loaded model out again."""
    places = {f"base_model.model.{name}": place for name, place in PLACES.items()}
    return {"device_map": places, "offload_folder": folder / "again"}


@pytest.mark.feature("offload to disk (`device_map`)")
def test_adapter_is_loaded_onto_a_model_on_disk(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes its copy of the offloaded weights below the working directory
    inputs = {"input_ids": IDS}
    plain = get_peft_model(llama(), config(method)).eval()
    plain.save_pretrained(tmp_path / "adapter")
    expected = output(plain, inputs)
    options = placed(tmp_path)
    if method.pooled:
        options["device_map"]["base_model.moshards_pools"] = "cpu"
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        model = load(on_disk(tmp_path), tmp_path / "adapter", **options).eval()
        assert model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight.is_meta
        assert distance(output(model, inputs), expected) < 1e-6
        found, wanted = (peft_subspace.lora_state_dict(m)[1] for m in (model, plain))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        for name, layer in layers(model).items():
            assert torch.equal(
                layer.get_delta_weight("default"), layers(plain)[name].get_delta_weight("default")
            )
        model.merge_adapter()
        assert distance(output(model, inputs), expected) < 1e-5


def test_adapter_that_is_offloaded_itself_refuses_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = next(m for m in METHODS if m.name == "flora")
    get_peft_model(llama(), config(method)).save_pretrained(tmp_path / "adapter")
    options = placed(tmp_path)
    model = PeftModel.from_pretrained(on_disk(tmp_path), tmp_path / "adapter", is_trainable=True, **options)
    with pytest.raises(RuntimeError, match="'default' is offloaded with its base layer, so it cannot be tr"):
        model(input_ids=IDS)


# ------------------------------------------------------------------------------- compiled, mixed precision


@pytest.mark.slow
@pytest.mark.feature("torch.compile (inductor)")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_model_in_bf16_trains_as_the_plain_one(method):
    def losses(compiled):
        torch._dynamo.reset()
        model = get_peft_model(
            llama(num_hidden_layers=1).to(torch.bfloat16), config(method, init_weights=True)
        ).train()
        runs = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        found = []
        for _ in range(6):
            loss = runs(input_ids=IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    plain, compiled = losses(False), losses(True)
    assert plain[-1] < plain[0]
    assert distance(compiled, plain) < 1e-2


@pytest.mark.feature("bf16 bases, fp32 or bf16 adapters, autocast")
def test_training_under_autocast_follows_training_without(method):
    def losses(enabled):
        model = get_peft_model(llama(), config(method, init_weights=True)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        found = []
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(input_ids=IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            assert all(
                p.grad.dtype == p.dtype == torch.float32 for p in model.parameters() if p.requires_grad
            )
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    plain, mixed = losses(False), losses(True)
    assert plain[-1] < plain[0]
    assert not torch.equal(mixed, plain)
    assert distance(mixed, plain) < 1e-2
