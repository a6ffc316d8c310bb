"""Convolutions with an updated weight: outputs and gradients are those of the plain convolution."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

import peft_subspace
from peft_subspace.layers.choose import kind_of
from peft_subspace.layers.kernels.convolution import convolve_depthwise, convolve_pair

PAIRED = {
    "strided": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 8)),
    "reflecting": (nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect", dilation=2), (2, 6, 9, 8)),
    "pointwise": (nn.Conv2d(6, 8, 1, stride=2, bias=False), (2, 6, 9, 8)),
    "sequence": (nn.Conv1d(4, 5, 3, padding="same"), (2, 4, 11)),
    "volume": (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
}
DEPTHWISE = {
    "same size": nn.Conv2d(6, 6, 7, padding=3, groups=6),
    "strided": nn.Conv2d(6, 6, 5, stride=(2, 1), padding=(2, 0), groups=6),
    "oblong": nn.Conv2d(6, 6, (5, 7), stride=3, padding=1, groups=6, bias=False),
    "circular": nn.Conv2d(6, 6, 5, padding=2, padding_mode="circular", groups=6),
}


def slow_gradient(layer, x):
    return kind_of(layer)._has_slow_gradient(layer, x)


def gradients(output, *tensors):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad(output, [t for t in tensors if t is not None], weights)


@pytest.mark.parametrize("case", PAIRED)
def test_pair_of_factors_convolves_and_differentiates_like_the_summed_weight(case):
    layer, size = PAIRED[case]
    layer = layer.double()
    x = torch.randn(size, dtype=torch.double, requires_grad=True)
    left = torch.randn(layer.out_channels, 2, dtype=torch.double, requires_grad=True)
    right = torch.randn(2, layer.in_channels, *layer.kernel_size, dtype=torch.double, requires_grad=True)
    updated = layer.weight + (left @ right.flatten(1)).view_as(layer.weight)

    expected, found = layer._conv_forward(x, updated, layer.bias), convolve_pair(layer, x, left, right)

    torch.testing.assert_close(found, expected)
    tensors = (x, layer.weight, layer.bias, left, right)
    torch.testing.assert_close(gradients(found, *tensors), gradients(expected, *tensors))


@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise_convolution_differentiates_like_the_usual_one(case):
    layer = DEPTHWISE[case].double()
    x = torch.randn(2, 6, 13, 15, dtype=torch.double, requires_grad=True)
    assert slow_gradient(layer, x)

    expected, found = layer(x), convolve_depthwise(layer, x, layer.weight)

    torch.testing.assert_close(found, expected)
    tensors = (x, layer.weight, layer.bias)
    torch.testing.assert_close(gradients(found, *tensors), gradients(expected, *tensors))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 12, 7, groups=6), nn.Conv2d(6, 6, 7, groups=2)]
)
def test_other_grouped_convolutions_take_the_usual_gradient(layer):
    assert not slow_gradient(layer, torch.randn(1, 6, 9, 9))


@pytest.mark.parametrize(("size", "rank"), [(4, 2), (16, 2), (16, 24)])
def test_every_form_of_an_adapted_convolution_agrees_with_its_merged_weight(size, rank):
    # Few positions take the factored branch, many the pair of thin gradients, high ranks the dense gradient.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1))
    config = peft_subspace.FLoRAConfig(r=rank, target_modules=["0"], init_weights=False)
    model = get_peft_model(network, config)
    x = torch.randn(2, 48, size, size)
    adapted = model(x)
    model.merge_adapter()
    torch.testing.assert_close(adapted, model(x), rtol=1e-4, atol=1e-3 * adapted.abs().max().item())
