"""Tiny models of well-known architectures, with random weights and nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn

TEXT = {"vocab_size": 37, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def llama(**options) -> nn.Module:
    return build(hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT, **{**LLAMA, **options}))


def gemma(**options) -> nn.Module:
    """Scales its embedding, which is tied to the head."""
    return build(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**TEXT, **LLAMA, **options))


def gpt2() -> nn.Module:
    """Made of `Conv1D` layers."""
    config = hf.GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return build(hf.GPT2LMHeadModel, config)


def bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return build(hf.BertForSequenceClassification, config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=37, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return build(hf.T5ForConditionalGeneration, config)


def vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16,
        patch_size=8, num_labels=3,
    )  # fmt: skip
    return build(hf.ViTForImageClassification, config)


def clip() -> nn.Module:
    """A text and a vision model side by side."""
    sides = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = hf.CLIPTextConfig(**TEXT, **sides, max_position_embeddings=16)
    vision = hf.CLIPVisionConfig(**sides, image_size=16, patch_size=8)
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return build(hf.CLIPModel, config)


def resnet() -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck", num_labels=3
    )
    return build(hf.ResNetForImageClassification, config)


def mobilenet() -> nn.Module:
    """Depthwise convolutions."""
    config = hf.MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=3)
    return build(hf.MobileNetV2ForImageClassification, config)


def convnext() -> nn.Module:
    """Depthwise convolutions with a large kernel, and linear layers."""
    config = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
    return build(hf.ConvNextForImageClassification, config)


def build(model_cls: type, config) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return model_cls(config).eval()


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Words `w3`, `w4`, … are the tokens 3, 4, … of the text models."""
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 37)}
    plain = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def words(*numbers: int) -> str:
    """Text of these tokens."""
    return " ".join(f"w{number}" for number in numbers)


@dataclass(frozen=True)
class Architecture:
    """A model, its inputs, and the modules that are adapted if nobody names any."""

    name: str
    build: Callable[[], nn.Module]
    kind: str
    defaults: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    def inputs(self, batch: int = 3) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(12)
        size = 32 if self.kind == "image" and self.name != "vit" else 16
        images = {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}
        if self.kind == "image":
            return images
        ids = torch.randint(3, 37, (batch, 6), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.name == "clip":
            return {**inputs, **images}
        return {**inputs, "decoder_input_ids": ids[:, :4]} if self.name == "t5" else inputs


ARCHITECTURES = [
    Architecture("llama", llama, "text", ("q_proj", "v_proj")),
    Architecture("gemma", gemma, "text", ("q_proj", "v_proj")),
    Architecture("gpt2", gpt2, "text", ("c_attn",)),
    Architecture("bert", bert, "text", ("query", "value")),
    Architecture("t5", t5, "text", ("q", "v")),
    Architecture("vit", vit, "image", ()),
    Architecture("resnet", resnet, "image", ("convolution",)),
    Architecture("mobilenet", mobilenet, "image", ("convolution",)),
    Architecture("convnext", convnext, "image", ()),
]
