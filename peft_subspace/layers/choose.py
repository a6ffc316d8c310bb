"""Which kind of layer a module is: the only place that asks for types of layers."""

from __future__ import annotations

from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_subspace.core.shapes import WeightShape
from peft_subspace.layers.base import LayerKind
from peft_subspace.layers.convolution import ConvOps
from peft_subspace.layers.embedding import EmbeddingOps
from peft_subspace.layers.linear import Conv1DOps, LinearOps

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kind_of(base: nn.Module, *, sizes=None) -> LayerKind:
    """Choose the operations for a base layer.

    Raises:
        TypeError: If no method can adapt layers of this type.
        ValueError: If the layer has no weight yet, or groups that do not divide its channels.
    """
    if getattr(base, "has_uninitialized_params", lambda: False)():
        raise ValueError(f"{type(base).__name__} has no weight yet; run one batch through the model first")
    if isinstance(base, nn.Embedding):
        shape = WeightShape(base.embedding_dim, base.num_embeddings, lookup_axis=1)
        has_custom_forward = _has_own_forward(base) and not hasattr(base, "embed_scale")
        return EmbeddingOps(shape, has_custom_forward=has_custom_forward)
    if isinstance(base, _CONVOLUTIONS):
        channels = (base.in_channels, base.out_channels)
        if any(count % base.groups for count in channels):
            raise ValueError(
                f"groups={base.groups} must divide in_channels={channels[0]} and out_channels={channels[1]}; "
                "correct the layer, or exclude it"
            )
        per_group = base.in_channels // base.groups
        shape = WeightShape(base.out_channels, per_group, tuple(base.kernel_size), base.groups)
        return ConvOps(shape, has_custom_forward=_has_own_forward(base))
    if isinstance(base, nn.Linear | Conv1D) or sizes:
        quantized = sizes is not None
        in_features, out_features = (int(size or 0) for size in sizes or _get_in_out_features(base))
        ops = Conv1DOps if isinstance(base, Conv1D) else LinearOps
        has_custom_forward = not quantized and base.weight.dtype.itemsize > 1 and _has_own_forward(base)
        return ops(WeightShape(out_features, in_features), has_custom_forward=has_custom_forward)
    raise TypeError(
        f"{type(base).__name__} cannot be adapted; supported are Linear, Conv1D (transformers), Embedding, "
        "Conv1d, Conv2d, Conv3d, their subclasses, and quantised linear layers"
    )


def _has_own_forward(base: nn.Module) -> bool:
    """Whether a subclass has changed the forward of its kind of layer."""
    kind = next(kind for kind in (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS) if isinstance(base, kind))
    methods = ("forward", "_conv_forward")
    return any(getattr(type(base), name, None) is not getattr(kind, name, None) for name in methods)
