"""Linear layers quantized by real libraries, on a CPU, and what a test needs to know of each kind.

The libraries are imported where they are used: HQQ's takes seconds, and test files that start processes
import this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

# bitsandbytes says that it rounds inputs, and PEFT that a merged weight is rounded.
WARNINGS = pytest.mark.filterwarnings(
    "ignore:Merge lora module to .-bit linear may get different generations:UserWarning",
    "ignore:MatMul8bitLt. inputs will be cast from:UserWarning",
)


@dataclass(frozen=True)
class Kind:
    """One way to quantize a linear layer.

    Attributes:
        quantize: Returns a quantized layer for a plain one.
        feature: Row of the feature table.
        requantized: Relative change of a weight that is quantized once more: about half a step of its block.
        rounds: Relative error of the layer's arithmetic, where it computes in less than fp32.
        settings: What transformers hangs on a model quantized so, and PEFT needs to quantize again.
    """

    name: str
    quantize: Callable[[nn.Linear], nn.Module]
    feature: str
    requantized: float
    rounds: float = 1e-5
    settings: Callable[[], object] | None = None

    def __str__(self) -> str:
        return self.name


def quantized_model(model: nn.Module, kind: Kind, names: tuple[str, ...] | None = None) -> nn.Module:
    """Quantize linear layers in place, all or those with one of the names, as a model loaded so has them."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear) and (names is None or child in names):
            setattr(model.get_submodule(parent), child, kind.quantize(module))
    if kind.settings is not None:
        model.hf_quantizer = kind.settings()
    return model


def parts(base: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that the weight of a quantized layer consists of."""
    weight = getattr(base, "weight", None)
    if weight is None:  # HQQ
        tensors = {"codes": base.W_q.data, "bias": base.bias, **base.meta}
    elif hasattr(weight, "__tensor_flatten__"):  # torchao, quanto
        tensors = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
        tensors["codes"] = next(iter(tensors.values()))
    else:
        quant_state = getattr(weight, "quant_state", None)
        tensors = {"codes": weight.data} | (quant_state.as_dict(packed=True) if quant_state else {})
        for name in ("SCB", "CB"):  # they move from the weight to the layer's state in the first forward
            places = (weight, getattr(base, "state", None))
            values = [getattr(place, name) for place in places if getattr(place, name, None) is not None]
            tensors |= {name: values[0]} if values else {}
    return {name: tensor.clone() for name, tensor in tensors.items() if torch.is_tensor(tensor)}


def assert_same_parts(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def _bnb4(**options) -> Callable[[nn.Linear], nn.Module]:
    options = {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": False, **options}

    def quantize(plain: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, **options)
        layer.load_state_dict(plain.state_dict())
        return layer.to("cpu")

    return quantize


def _bnb8(plain: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        plain.in_features, plain.out_features, plain.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def _torchao8(plain: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(plain)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0]


def _hqq4(plain: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=32)
    return HQQLinear(plain.requires_grad_(False), config, compute_dtype=torch.float32, device="cpu")


def _torchao_settings() -> object:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return SimpleNamespace(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


BNB4, BNB8 = "bitsandbytes 4-bit", "bitsandbytes 8-bit"
TORCHAO, HQQ = "torchao int8 weight-only", "HQQ 4-bit"
KINDS = [
    Kind("bnb-nf4", _bnb4(), BNB4, 0.12),
    Kind("bnb-fp4", _bnb4(quant_type="fp4"), BNB4, 0.16),
    Kind("bnb-nf4-double", _bnb4(compress_statistics=True), BNB4, 0.12),
    Kind("bnb-nf4-bf16", _bnb4(compute_dtype=torch.bfloat16), BNB4, 0.12, rounds=1e-2),
    Kind("bnb-8bit", _bnb8, BNB8, 0.02),
    Kind("torchao-int8", _torchao8, TORCHAO, 0.01, settings=_torchao_settings),
    Kind("hqq-4bit", _hqq4, HQQ, 0.12),
]


def marked(kinds: list[Kind]) -> list:
    """Kinds as parameters of a test or fixture, each with its row of the feature table."""
    return [pytest.param(kind, marks=pytest.mark.feature(kind.feature), id=str(kind)) for kind in kinds]
