"""Every method in diffusers: a UNet with its convolutions, and a diffusion transformer."""

import inspect

import pytest
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import peft_subspace
from models import build
from peft_subspace.tuner.layer import SubspaceLayer

WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers names the file of any adapter

pytestmark = [
    pytest.mark.feature("diffusers add_adapter"),
]


def unet():
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4, cross_attention_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
    )  # fmt: skip


def dit():
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=8,
    )  # fmt: skip


TARGETS = {unet: ["to_q", "to_v", "conv1", "conv_in"], dit: ["to_q", "to_v", "ff.net.2", "pos_embed.proj"]}


@pytest.fixture(params=[unet, dit], ids=["unet", "dit"])
def network(request):
    """Function that returns the same network again, and the names of what to adapt in it."""
    return lambda: build(lambda _: request.param(), None), TARGETS[request.param]


def outputs(model):
    generator = torch.Generator().manual_seed(3)
    sizes = ((2, 4, 8, 8), (2, 5, 8), (2, 8))
    samples, texts, pooled = (torch.randn(size, generator=generator) for size in sizes)
    further = {"pooled_projections": pooled} if isinstance(model, SD3Transformer2DModel) else {}
    return model(samples, timestep=torch.tensor([3, 7]), encoder_hidden_states=texts, **further).sample


def steps(model, count=3):
    """Train as diffusers' scripts do: plain AdamW on what has a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(count):
        loss = nn.functional.mse_loss(outputs(model), torch.ones(2, 4, 8, 8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(method, network, name="default", **options):
    build_model, targets = network
    model = build_model()
    model.add_adapter(method.config(target_modules=targets, seed=0, **options), name)
    return model


def test_trains_saves_and_loads(method, network, tmp_path):
    model = adapted(method, network)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = steps(model.train())
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(tensor, now[name]) for name, tensor in base.items())
    model.eval().save_lora_adapter(tmp_path)
    fresh = adapted(method, network, initialized=True)
    result = set_peft_model_state_dict(fresh, load_file(tmp_path / WEIGHTS))
    assert not result.unexpected_keys
    with torch.no_grad():
        assert torch.equal(outputs(fresh.eval()), outputs(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT, at a second adapter
def test_switches_scales_fuses_and_deletes(method, network):
    build_model, targets = network
    base = outputs(build_model())
    model = adapted(method, network, "one", init_weights=False)
    one = outputs(model)
    model.add_adapter(method.config(target_modules=targets, seed=5, init_weights=False), "two")
    two = outputs(model)
    assert not torch.allclose(one, two, atol=1e-3)
    model.set_adapter("one")
    assert torch.equal(outputs(model), one)
    model.disable_adapters()
    assert torch.equal(outputs(model), base)
    model.enable_adapters()
    model.set_adapters(["one", "two"], [0.5, 2.0])
    layers = [module for module in model.modules() if isinstance(module, SubspaceLayer)]
    assert all(
        layer.scaling == {"one": layer.initial_scaling["one"] / 2, "two": layer.initial_scaling["two"] * 2}
        for layer in layers
    )
    both = outputs(model)
    model.fuse_lora()
    torch.testing.assert_close(outputs(model), both, atol=1e-4, rtol=1e-4)
    model.unfuse_lora()
    assert torch.equal(outputs(model), both)
    model.set_adapters("one")
    model.delete_adapters("two")
    torch.testing.assert_close(outputs(model), one, atol=0, rtol=0)
    model.delete_adapters("one")
    assert torch.equal(outputs(model), base)
    model.unload_lora()
    assert model.state_dict().keys() == build_model().state_dict().keys()


@pytest.mark.feature("diffusers load_lora_adapter")
def test_lora_export_loads_as_diffusers_loads_any_lora(method, network, tmp_path):
    """Diffusers reads LoRA and LoKr only: it makes the config out of their keys."""
    model = adapted(method, network, init_weights=False)
    model.save_lora_adapter(tmp_path)
    fresh = network[0]()
    with pytest.raises(TypeError, match=r"`LoraConfig` class could not be instantiated"):
        fresh.load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS)
    peft_subspace.export_lora(model, tmp_path / "lora")
    fresh.load_lora_adapter(
        tmp_path / "lora", prefix="base_model.model", weight_name="adapter_model.safetensors"
    )
    with torch.no_grad():
        torch.testing.assert_close(outputs(fresh), outputs(model), atol=1e-5, rtol=1e-4)


PIPELINES = {"unet": (unet, StableDiffusionPipeline), "transformer": (dit, StableDiffusion3Pipeline)}


@pytest.mark.parametrize("key_prefix", PIPELINES)
@pytest.mark.feature("diffusers `pipe.load_lora_weights`")
def test_pipelines_load_the_lora_export(method, tmp_path, key_prefix):
    build_network, pipeline_cls = PIPELINES[key_prefix]
    network = (lambda: build(lambda _: build_network(), None), TARGETS[build_network])
    model = adapted(method, network, init_weights=False)
    peft_subspace.export_lora(model, tmp_path, key_prefix=key_prefix)
    _, state = peft_subspace.lora_state_dict(model, key_prefix=key_prefix)
    save_file(state, tmp_path / "by_hand.safetensors")
    for weights in ("adapter_model.safetensors", "by_hand.safetensors", None):
        pipe = pipeline(pipeline_cls, key_prefix, network[0]())
        pipe.load_lora_weights(*([state] if weights is None else [tmp_path]), weight_name=weights)
        with torch.no_grad():
            loaded = outputs(getattr(pipe, key_prefix))
            torch.testing.assert_close(loaded, outputs(model), atol=1e-5, rtol=1e-4)


def pipeline(pipeline_cls, name, model):
    """A pipeline with this model alone, which is all that `load_lora_weights` looks at."""
    parts = inspect.signature(pipeline_cls.__init__).parameters
    components = {part: None for part in parts if part != "self" and not part.startswith("requires_")}
    options = {part: False for part in parts if part.startswith("requires_")}
    return pipeline_cls(**{**components, **options, name: model})
