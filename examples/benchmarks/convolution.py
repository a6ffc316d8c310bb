"""Train step of one adapted convolution: frozen base, FLoRA, and FLoRA as its authors run it.

    python examples/benchmarks/convolution.py            about 10 minutes on 2 cores
    python examples/benchmarks/convolution.py --quick    about 1 minute, every 8th shape

Shapes: every distinct convolution of ResNet-50, ConvNeXt-T and MobileNetV2 at 224 px, batch 8. The authors'
form makes ΔW in each step and convolves with it separately; of grouped layers, where their code fails, the
same form with an input factor of the right size stands in. Expected: geometric means over shapes of at most
0.5 of the authors' form and 1.3 of the frozen layer. Figures are medians of interleaved repeats.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    MobileNetV2Config,
    MobileNetV2Model,
    ResNetConfig,
    ResNetModel,
)

import timing
from peft_subspace import FLoRAConfig

NETWORKS = {
    "resnet50": (ResNetModel, ResNetConfig()),
    "convnext": (ConvNextModel, ConvNextConfig()),
    "mobilenet": (MobileNetV2Model, MobileNetV2Config()),
}


class AuthorsForm(nn.Module):
    """Base convolution plus a separate one with ΔW, made anew from all factors in each step."""

    def __init__(self, base: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base = base
        dims = (base.in_channels // base.groups, base.out_channels, *base.kernel_size)
        ranks = [min(rank, dim) for dim in dims[:2]] + list(dims[2:])
        self.core = nn.Parameter(torch.zeros(ranks))
        pairs = zip(dims, ranks, strict=True)
        self.factors = nn.ParameterList(torch.randn(dim, r) / (2 * r) ** 0.5 for dim, r in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions of full size."""
        delta: Tensor = self.core
        for mode, factor in enumerate(self.factors):
            delta = torch.tensordot(delta, factor, dims=([mode], [1])).movedim(-1, mode)
        delta = delta.transpose(0, 1)
        base = self.base
        branch = nn.functional.conv2d(x, delta, None, base.stride, base.padding, base.dilation, base.groups)
        return base(x) + branch


def shapes() -> dict[tuple, tuple[str, nn.Conv2d, tuple[int, ...]]]:
    """Distinct convolutions of the networks, with the shape of their input at 224 px."""
    found: dict[tuple, tuple[str, nn.Conv2d, tuple[int, ...]]] = {}

    def note(network: str) -> Callable:
        def hook(conv: nn.Conv2d, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            size = tuple(inputs[0].shape[1:])
            key = (conv.out_channels, conv.kernel_size, conv.stride, conv.groups, conv.padding, size)
            found.setdefault(key, (network, conv, size))

        return hook

    for network, (model_cls, config) in NETWORKS.items():
        model = model_cls(config).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note(network))
        with torch.no_grad():
            model(pixel_values=torch.zeros(1, 3, 224, 224))
    return found


def step_of(layer: nn.Module, size: tuple[int, ...], batch: int) -> Callable[[], None]:
    """Forward and backward of one layer, gradient of its input included."""
    x = torch.randn(batch, *size, requires_grad=True)
    gradient = torch.randn_like(layer(x))

    def step() -> None:
        layer(x).backward(gradient)
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def measure(conv: nn.Conv2d, size: tuple[int, ...], rank: int, batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of the frozen layer, and median ratios of the adapted forms to it and to each other."""
    conv = copy.deepcopy(conv).requires_grad_(False)
    conv._forward_hooks.clear()
    config = FLoRAConfig(r=rank, scaling="paper", init_weights="kaiming_uniform", target_modules=["0"])
    layers = {
        "base": conv,
        "authors": AuthorsForm(copy.deepcopy(conv), rank),
        "flora": get_peft_model(nn.Sequential(copy.deepcopy(conv)), config),
    }
    seconds = timing.interleaved({n: step_of(m, size, batch) for n, m in layers.items()}, repeats, warmup=2)
    return {
        "base_ms": 1000 * statistics.median(seconds["base"]),
        "authors/base": timing.ratio(seconds, "authors", "base")["median"],
        "flora/base": timing.ratio(seconds, "flora", "base")["median"],
        "flora/authors": timing.ratio(seconds, "flora", "authors")["median"],
    }


def describe(network: str, conv: nn.Conv2d, size: tuple[int, ...]) -> str:
    """One line for a shape."""
    kind = f"g{conv.groups}" if conv.groups > 1 else "dense"
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    return f"{network} {conv.in_channels}->{conv.out_channels} k{kernel} s{stride} {kind} @{size[-1]}"


def main() -> None:
    """Measure all shapes, print them side by side and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every 8th shape only")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = {}
    for network, conv, size in list(shapes().values())[:: 8 if options.quick else 1]:
        name = describe(network, conv, size)
        rows[name] = measure(conv, size, options.rank, options.batch, options.repeats)
        print(name, {key: round(value, 2) for key, value in rows[name].items()}, flush=True)
    columns = list(next(iter(rows.values())))
    timing.table(f"rank {options.rank}, batch {options.batch}", ["shape", *columns], [
        [name, *row.values()] for name, row in rows.items()
    ])  # fmt: skip
    means = {c: math.exp(statistics.fmean(math.log(row[c]) for row in rows.values())) for c in columns[1:]}
    timing.table("geometric means", list(means), [list(means.values())])
    timing.save("convolution", {"options": vars(options), "shapes": rows, "geometric_means": means})


if __name__ == "__main__":
    main()
