"""Which kind of layer a module is: the only place that asks for types of layers."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_subspace.core.shapes import WeightShape
from peft_subspace.layers.base import LayerKind
from peft_subspace.layers.convolution import ConvKind, TransposedConvKind
from peft_subspace.layers.embedding import EmbeddingKind
from peft_subspace.layers.linear import Conv1DKind, LinearKind

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class UnknownLayerError(TypeError):
    """A module of no kind that can be adapted as a whole."""


def kind_of(base: nn.Module, *, sizes: tuple[int, int] | None = None) -> LayerKind:
    """Choose the kind of a base layer.

    Args:
        base: The layer.
        sizes: `(in, out)` of a layer that stands for a linear one by its quantized weight, else None.

    Raises:
        UnknownLayerError: If no method can adapt layers of this type.
        ValueError: If the layer has no weight yet, or groups that do not divide its channels.
    """
    if getattr(base, "has_uninitialized_params", lambda: False)():
        raise ValueError(f"{type(base).__name__} has no weight yet; run one batch through the model first")
    if isinstance(base, nn.Embedding):
        shape = WeightShape(base.embedding_dim, base.num_embeddings, lookup_axis=1)
        custom = _has_custom_forward(base) and not hasattr(base, "embed_scale")
        return EmbeddingKind(shape, has_custom_forward=custom)
    if isinstance(base, _CONVOLUTIONS):
        return _convolution(base)
    if isinstance(base, _TRANSPOSED):
        outputs = base.out_channels // base.groups
        shape = WeightShape(outputs, base.in_channels, tuple(base.kernel_size))
        return TransposedConvKind(shape, has_custom_forward=_has_custom_forward(base))
    if isinstance(base, Conv1D):
        return Conv1DKind(WeightShape(base.nf, base.nx), has_custom_forward=_custom(base, sizes))
    if isinstance(base, nn.Linear):
        sizes_of_weight = WeightShape(base.out_features, base.in_features)
        return LinearKind(sizes_of_weight, has_custom_forward=_custom(base, sizes))
    if sizes is not None:
        return LinearKind(WeightShape(sizes[1], sizes[0]))
    raise UnknownLayerError(
        f"{type(base).__name__} cannot be adapted; supported are Linear, Conv1D (transformers), Embedding, "
        "Conv1d, Conv2d, Conv3d, their transposes and subclasses, quantized linear layers, and modules with "
        "weights of two axes or more, such as nn.LSTM; other parameters are for target_parameters"
    )


def _convolution(base: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> LayerKind:
    channels = (base.in_channels, base.out_channels)
    if any(count % base.groups for count in channels):
        raise ValueError(
            f"groups={base.groups} must divide in_channels={channels[0]} and out_channels={channels[1]}; "
            "correct the layer, or exclude it"
        )
    per_group = base.in_channels // base.groups
    shape = WeightShape(base.out_channels, per_group, tuple(base.kernel_size), base.groups)
    return ConvKind(shape, has_custom_forward=_has_custom_forward(base))


def _custom(base: nn.Module, sizes: tuple[int, int] | None) -> bool:
    """Whether an unquantized linear layer has a forward of its own."""
    return sizes is None and base.weight.dtype.itemsize > 1 and _has_custom_forward(base)


def _has_custom_forward(base: nn.Module) -> bool:
    """Whether a subclass has changed the forward of its kind of layer."""
    kind = next(
        kind
        for kind in (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS, *_TRANSPOSED)
        if isinstance(base, kind)
    )
    methods = ("forward", "_conv_forward")
    return any(getattr(type(base), name, None) is not getattr(kind, name, None) for name in methods)
