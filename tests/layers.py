"""Small layers of every kind that can be adapted, and what a test needs to run them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from peft_subspace.tuner.layer import SubspaceLayer


class Net(nn.Module):
    """A model whose only layer is the one to adapt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class HalvedLinear(nn.Linear):
    """A linear layer that does more than multiply."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class ShiftedEmbedding(nn.Embedding):
    """Looks up other rows than its input names, as embeddings of positions do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 2)


class StandardizedConv2d(nn.Conv2d):
    """Weight standardization, as in BiT: the output is no longer linear in the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.std(dim=(1, 2, 3), keepdim=True) + 1e-3)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PaddingConv2d(nn.Conv2d):
    """Pads by the size of its input, as TensorFlow's convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        missing = [(-(size - 3) % 2) for size in x.shape[:-3:-1]]
        return super().forward(F.pad(x, (0, missing[0], 0, missing[1])))


class OwnInitConv2d(nn.Conv2d):
    """A subclass that changes nothing about the forward."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@dataclass(frozen=True)
class LayerCase:
    name: str
    kind: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    channels_last: bool = False
    tokens: int = 11

    def __str__(self) -> str:
        return self.name

    @property
    def is_typical(self) -> bool:
        return self.name in TYPICAL

    @cached_property
    def has_plain_forward(self) -> bool:
        return type(self.build()) in _PLAIN

    @property
    def passes_means(self) -> bool:
        """Whether the mean of outputs is the output of the mean of inputs."""
        return self.kind != "embedding" and self.has_plain_forward

    @cached_property
    def has_lora_form(self) -> bool:
        """Whether a LoRA of PEFT can stand for the update."""
        layer = self.build()
        plain = getattr(layer, "groups", 1) == 1 and getattr(layer, "padding_mode", "zeros") == "zeros"
        return plain and set(getattr(layer, "dilation", ())) <= {1} and self.has_plain_forward

    @property
    def has_no_lora_form(self) -> bool:
        return not self.has_lora_form

    def layer(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.build()

    def inputs(self, dtype: torch.dtype = torch.float32, batch: int = 4, seed: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "embedding":
            return torch.randint(0, self.tokens, (batch, *self.size), generator=generator)
        x = torch.randn(batch, *self.size, generator=generator).to(dtype)
        return x.to(memory_format=torch.channels_last) if self.channels_last else x


_PLAIN = (
    nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, OwnInitConv2d,
    nn.modules.linear.NonDynamicallyQuantizableLinear, Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding,
)  # fmt: skip


def _linear(name: str, build: Callable[[], nn.Module], size: tuple[int, ...] = (7,)) -> LayerCase:
    return LayerCase(name, "linear", build, size)


def _embedding(name: str, build: Callable[[], nn.Module]) -> LayerCase:
    return LayerCase(name, "embedding", build, (5,))


def _conv(name: str, build: Callable[[], nn.Module], *size: int, **options: bool) -> LayerCase:
    return LayerCase(name, "conv", build, size, **options)


CASES = [
    _linear("linear", lambda: nn.Linear(7, 5)),
    _linear("linear-without-bias-on-tokens", lambda: nn.Linear(7, 9, bias=False), (3, 7)),
    _linear("linear-few-inputs", lambda: nn.Linear(2, 12), (40, 2)),
    _linear("linear-wide", lambda: nn.Linear(32, 48), (6, 32)),
    _linear("linear-subclass", lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(7, 5)),
    _linear("linear-own-forward", lambda: HalvedLinear(7, 5)),
    LayerCase("Conv1D", "transposed", lambda: Conv1D(9, 7), (3, 7)),
    _embedding("embedding", lambda: nn.Embedding(11, 6)),
    _embedding("embedding-padding", lambda: nn.Embedding(11, 6, padding_idx=3)),
    _embedding("embedding-gemma-scale", lambda: Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5)),
    _embedding("embedding-bart-scale", lambda: BartScaledWordEmbedding(11, 6, 1, embed_scale=2.0)),
    _embedding("embedding-own-forward", lambda: ShiftedEmbedding(13, 6)),
    _conv("conv1d", lambda: nn.Conv1d(4, 6, 3), 4, 9),
    _conv("conv1d-same-even-kernel", lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), 4, 9),
    _conv("conv1d-depthwise", lambda: nn.Conv1d(6, 6, 3, padding=1, groups=6), 6, 9),
    _conv("conv2d", lambda: nn.Conv2d(4, 6, 3, bias=False), 4, 6, 6),
    _conv("conv2d-wide", lambda: nn.Conv2d(24, 32, 3, padding=1), 24, 6, 6),
    _conv("conv2d-wide-strided", lambda: nn.Conv2d(24, 32, 3, stride=2, padding=1), 24, 7, 7),
    _conv("conv2d-stride-dilation", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), 4, 8, 7),
    _conv("conv2d-same", lambda: nn.Conv2d(4, 6, (3, 2), padding="same"), 4, 6, 5),
    _conv("conv2d-1x1", lambda: nn.Conv2d(24, 32, 1), 24, 4, 4),
    _conv("conv2d-patches", lambda: nn.Conv2d(3, 32, 4, stride=4), 3, 8, 8),
    _conv("conv2d-oblong", lambda: nn.Conv2d(4, 6, (1, 3), stride=(1, 2)), 4, 5, 7),
    _conv("conv2d-grouped", lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), 6, 5, 5),
    _conv("conv2d-depthwise", lambda: nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6), 6, 7, 7),
    _conv("conv2d-depthwise-large", lambda: nn.Conv2d(6, 6, 7, padding=3, groups=6), 6, 9, 8),
    _conv("conv2d-depthwise-large-strided",
          lambda: nn.Conv2d(6, 6, 5, stride=2, padding=(2, 1), groups=6, bias=False), 6, 9, 8),
    _conv("conv2d-depthwise-multiplier", lambda: nn.Conv2d(4, 8, 3, groups=4), 4, 5, 5),
    _conv("conv2d-circular", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), 4, 5, 5),
    _conv("conv2d-reflect", lambda: nn.Conv2d(24, 32, 3, padding=(1, 2), padding_mode="reflect"), 24, 6, 6),
    _conv("conv2d-replicate-same",
          lambda: nn.Conv2d(24, 32, 2, padding="same", padding_mode="replicate"), 24, 6, 6),
    _conv("conv2d-channels-last",
          lambda: nn.Conv2d(24, 32, 3, padding=1).to(memory_format=torch.channels_last), 24, 5, 5,
          channels_last=True),
    _conv("conv2d-subclass", lambda: OwnInitConv2d(4, 6, 3), 4, 5, 5),
    _conv("conv2d-standardized", lambda: StandardizedConv2d(4, 6, 3, padding=1), 4, 5, 5),
    _conv("conv2d-own-padding", lambda: PaddingConv2d(4, 6, 3, stride=2), 4, 6, 5),
    _conv("conv3d", lambda: nn.Conv3d(3, 4, 2), 3, 4, 4, 3),
    _conv("conv3d-wide", lambda: nn.Conv3d(16, 16, 3, padding=1), 16, 3, 4, 4),
    _conv("conv3d-grouped", lambda: nn.Conv3d(4, 6, (1, 2, 2), stride=(1, 2, 1), groups=2), 4, 2, 4, 4),
]  # fmt: skip

TYPICAL = {"linear", "Conv1D", "embedding", "conv2d-wide-strided", "conv2d-standardized"}


@dataclass(frozen=True)
class Setting:
    """Dtype of the base model, and whether PEFT keeps the adapter in fp32."""

    dtype: torch.dtype
    autocast: bool

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{'autocast' if self.autocast else 'as-base'}"

    @property
    def is_typical(self) -> bool:
        return self in TYPICAL_SETTINGS

    @property
    def needs_cast(self) -> bool:
        """Whether PEFT casts the adapter, unless it is fp32 anyway."""
        return self.autocast and self.dtype != torch.float32

    @property
    def tolerance(self) -> float:
        """Relative error, in the norm, that rounding explains."""
        return 1e-5 if self.dtype == torch.float32 else 1.5e-2


FP32 = Setting(torch.float32, autocast=True)
BF16 = Setting(torch.bfloat16, autocast=False)
SETTINGS = [FP32, Setting(torch.bfloat16, autocast=True), BF16]
TYPICAL_SETTINGS = [FP32, BF16]


def adapt(method, case: LayerCase, setting: Setting = FP32, adapter: str = "default", **options) -> PeftModel:
    """Wrap one layer; without further options with an adapter that changes the output."""
    config = method.config(**{"init_weights": False, "seed": 3, **options})
    net = Net(case.layer()).to(setting.dtype)
    return get_peft_model(net, config, adapter, autocast_adapter_dtype=setting.autocast)


def add(model: PeftModel, method, adapter: str, setting: Setting = FP32, **options) -> None:
    config = method.config(**{"init_weights": False, "seed": 4, **options})
    model.add_adapter(adapter, config, autocast_adapter_dtype=setting.autocast)


def tuner_layer(model: nn.Module) -> SubspaceLayer:
    return next(module for module in model.modules() if isinstance(module, SubspaceLayer))


def delta_weight(model: PeftModel, method, adapter: str = "default") -> Tensor:
    """The oracle's update of one adapter, as the layer stores its weight."""
    delta = method.delta_weight(tuner_layer(model).deltas[adapter], model.peft_config[adapter])
    return delta.T if isinstance(tuner_layer(model).base_layer, Conv1D | nn.Embedding) else delta


def dense(model: PeftModel, method, x: Tensor, adapters: tuple[str, ...] = ("default",)) -> Tensor:
    """What the adapted layer must return: its base layer in double precision, with `W + ΔW` as weight."""
    base = copy.deepcopy(tuner_layer(model).base_layer).double()
    weight = base.weight.detach()
    for adapter in adapters:
        weight = weight + delta_weight(model, method, adapter)
    return functional_call(base, {"weight": weight}, (x.double() if x.is_floating_point() else x,))


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative error in the norm."""
    assert value.shape == truth.shape
    truth = truth.detach().double()
    return ((value.detach().double() - truth).norm() / truth.norm().clamp_min(1e-12)).item()


# ----------------------------------------------------------------------------- steps of the contract tests

BOTH = ("default", "other")


def two_adapters(method, case: LayerCase, setting: Setting = FP32, **options) -> PeftModel:
    model = adapt(method, case, setting, **options)
    add(model, method, "other", setting, **options)
    return model


def activate(model: PeftModel, *names: str) -> None:
    model.base_model.set_adapter(list(names))


def outputs(model: nn.Module, x: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model(x, **options)


def base_output(case: LayerCase, setting: Setting, x: Tensor) -> Tensor:
    return outputs(Net(case.layer()).to(setting.dtype), x)


def weight_of(model: nn.Module) -> Tensor:
    return tuner_layer(model).get_base_layer().weight.detach().clone()


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
