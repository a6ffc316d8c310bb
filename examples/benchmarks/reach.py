"""Which kinds of modules each method reaches, beside PEFT's LoRA: adapt, train, save, load, merge, export.

    python examples/benchmarks/reach.py [--results results/reach.json]

Each kind is a small model. A cell is "yes" if every step below is right, else the first step that is not, or
"refused" if the method says before it changes anything that it cannot:

- adapt: the model takes the adapter;
- train: every trained tensor gets a gradient, and the adapter acts in evaluation as it does in training;
- load: saved and loaded onto a new model, it gives the same outputs;
- merge: the merged model gives the same outputs;
- export: so does the LoRA that is made of it, loaded by PEFT ("no LoRA" where the export refuses).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import peft_subspace as ps

RESULTS = Path(__file__).parent / "results" / "reach.json"
SIZE = 16
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Kind:
    """A kind of module: a model that has one, what to adapt in it, and an input."""

    model: Callable[[], nn.Module]
    targets: dict[str, Any]
    x: Tensor


class Alone(nn.Module):
    """A module that is given the input as often as it asks for, and whose first result counts."""

    def __init__(self, module: nn.Module, inputs: int = 1) -> None:
        super().__init__()
        self.module, self.inputs = module, inputs

    def forward(self, x: Tensor) -> Tensor:
        """Run the module."""
        result = self.module(*[x] * self.inputs)
        return result[0] if isinstance(result, tuple) else result


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(SIZE, SIZE)
        self.again = self.module

    def forward(self, x: Tensor) -> Tensor:
        """Run both."""
        return self.again(torch.tanh(self.module(x)))


def alone(build: Callable[[], nn.Module], x: Tensor, inputs: int = 1, **targets: Any) -> Kind:
    """A kind whose model is one module."""
    return Kind(lambda: Alone(build(), inputs), targets or {"target_modules": ["module"]}, x)


def language_model(config: Any, names: list[str]) -> Kind:
    """A kind of a small language model."""
    ids = torch.arange(4, 20).reshape(2, 8)
    return Kind(lambda: hf.AutoModelForCausalLM.from_config(config), {"target_modules": names}, ids)


def kinds() -> dict[str, Kind]:
    """The rows of the table."""
    flat, rows = torch.randn(4, SIZE), torch.randn(2, 5, SIZE)
    signal, image = torch.randn(2, SIZE, 9), torch.randn(2, SIZE, 6, 6)
    words: dict[str, Any] = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    mamba: dict[str, Any] = {
        **words,
        "hidden_size": SIZE,
        "state_size": 4,
        "num_hidden_layers": 1,
        "time_step_rank": 4,
    }
    llama: dict[str, Any] = {
        **words, "hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    experts: dict[str, Any] = {
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    moe = hf.MixtralConfig(**llama, num_local_experts=2, num_experts_per_tok=2)
    return {
        "`nn.Linear`": alone(lambda: nn.Linear(SIZE, SIZE), flat),
        "transformers' `Conv1D`": alone(lambda: hf.pytorch_utils.Conv1D(SIZE, SIZE), flat),
        "`nn.Embedding`": alone(lambda: nn.Embedding(SIZE, SIZE), torch.arange(8).reshape(2, 4)),
        "`nn.Conv1d`": alone(lambda: nn.Conv1d(SIZE, SIZE, 3), signal),
        "`nn.Conv2d`": alone(lambda: nn.Conv2d(SIZE, SIZE, 3, padding=1), image),
        "`nn.Conv3d`": alone(lambda: nn.Conv3d(SIZE, SIZE, 2), torch.randn(1, SIZE, 3, 3, 3)),
        "`nn.Conv2d` with groups": alone(lambda: nn.Conv2d(SIZE, SIZE, 3, groups=4), image),
        "`nn.Conv2d`, depthwise": alone(lambda: nn.Conv2d(SIZE, SIZE, 5, groups=SIZE), image),
        "`nn.ConvTranspose1d`": alone(lambda: nn.ConvTranspose1d(SIZE, SIZE, 3, stride=2), signal),
        "`nn.ConvTranspose2d`": alone(lambda: nn.ConvTranspose2d(SIZE, SIZE, 3, groups=2), image),
        "`nn.MultiheadAttention`": alone(lambda: nn.MultiheadAttention(SIZE, 2, batch_first=True), rows, 3),
        "`nn.TransformerEncoderLayer`": alone(
            lambda: nn.TransformerEncoderLayer(SIZE, 2, SIZE, dropout=0.0, batch_first=True), rows,
            target_modules=["linear1", "linear2"],
        ),
        "`nn.LSTM`": alone(lambda: nn.LSTM(SIZE, SIZE), rows),
        "`nn.GRU`": alone(lambda: nn.GRU(SIZE, SIZE), rows),
        "`nn.Bilinear`": alone(lambda: nn.Bilinear(SIZE, SIZE, SIZE), flat, 2),
        "weight norm": alone(lambda: parametrizations.weight_norm(nn.Linear(SIZE, SIZE)), flat),
        "weight norm, convolution": alone(
            lambda: parametrizations.weight_norm(nn.Conv1d(SIZE, SIZE, 3, groups=2)), signal
        ),
        "one module, two names": Kind(Twice, {"target_modules": ["module", "again"]}, flat),
        "Mamba: `conv1d`, `dt_proj`": language_model(hf.MambaConfig(**mamba), ["conv1d", "dt_proj"]),
        "Falcon-Mamba: `conv1d`": language_model(hf.FalconMambaConfig(**mamba), ["conv1d"]),
        "Falcon: `dense`, with a forward of its own": language_model(
            hf.FalconConfig(**words, hidden_size=SIZE, num_hidden_layers=1, num_attention_heads=2),
            ["dense"],
        ),
        "LFM2: `conv.conv`": language_model(
            hf.Lfm2Config(**{**llama, "num_hidden_layers": 2}, layer_types=["conv", "full_attention"]),
            ["conv.conv"],
        ),
        "Llama 4: `router`, which returns two tensors": language_model(
            hf.Llama4TextConfig(
                **llama, intermediate_size_mlp=SIZE, head_dim=8, num_local_experts=2, attention_chunk_size=8
            ),
            ["router"],
        ),
        "Qwen3-MoE: `gate_proj` of dense layers": language_model(
            hf.Qwen3MoeConfig(**llama, moe_intermediate_size=8, num_experts=2, mlp_only_layers=[0]),
            ["gate_proj"],
        ),
        "fused experts": Kind(lambda: hf.MixtralForCausalLM(moe), experts, torch.arange(4, 20).reshape(2, 8)),
    }  # fmt: skip


METHODS: dict[str, Callable[..., Any]] = {
    "LoRA (PEFT)": lambda **options: LoraConfig(r=2, init_lora_weights=False, **options),
    "FLoRA": lambda **options: ps.FLoRAConfig(r=2, init_weights=False, **options),
    "LoRA-SB": lambda **options: ps.LoRASBConfig(r=2, init_weights=False, **options),
    "Effort": lambda **options: ps.EffortConfig(r=2, init_weights=False, **options),
    "Continual SVD": lambda **options: ps.ContinualSVDConfig(init_weights=False, **options),
    "MoS": lambda **options: ps.MoSConfig(r=2, equivalent_r=2, init_weights=False, **options),
}


def build(kind: Kind) -> nn.Module:
    """The kind's model, always with the same weights."""
    torch.manual_seed(0)
    return kind.model().eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Output of a model."""
    result = model(x)
    return getattr(result, "logits", result)


def same(first: Tensor, second: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two outputs differ by rounding only."""
    return bool((first - second).norm() <= tolerance * second.norm())


def verdict(kind: Kind, method: str) -> str:
    """The cell of a kind and a method."""
    base = build(kind)
    before = {name: type(module) for name, module in base.named_modules()}
    try:
        model = get_peft_model(base, METHODS[method](**kind.targets))
    except (TypeError, ValueError, NotImplementedError):
        untouched = {name: type(module) for name, module in base.named_modules()} == before
        return "refused" if untouched else "adapt"
    try:
        run(model.train(), kind.x).square().sum().backward()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return "train"
    with torch.no_grad():
        trained = run(model, kind.x)
        live = run(model.eval(), kind.x)
        acts = same(live, trained) and not same(live, run(build(kind), kind.x), 1e-6)
    if not acts or any(p.grad is None for p in model.parameters() if p.requires_grad):
        return "train"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(f"{folder}/adapter")
        if not same(run(PeftModel.from_pretrained(build(kind), f"{folder}/adapter").eval(), kind.x), live):
            return "load"
        exported = ""
        if method != "LoRA (PEFT)":
            try:
                ps.export_lora(model, f"{folder}/lora")
            except ValueError:
                exported = ", no LoRA"
            else:
                served = PeftModel.from_pretrained(build(kind), f"{folder}/lora").eval()
                if not same(run(served, kind.x), live):
                    return "export"
        try:
            merged = run(model.merge_and_unload(), kind.x)
        except (TypeError, ValueError, NotImplementedError):
            return "yes, but for merging"
        return f"yes{exported}" if same(merged, live) else "merge"


def table(cells: dict[str, dict[str, str]]) -> str:
    """Markdown."""
    lines = ["| | " + " | ".join(METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    lines += [f"| {kind} | " + " | ".join(row[m] for m in METHODS) + " |" for kind, row in cells.items()]
    return "\n".join(lines)


def main() -> None:
    """Fill the table, print it and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = parser.parse_args().results
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    torch.manual_seed(1)
    cells: dict[str, dict[str, str]] = {}
    for name, kind in kinds().items():
        cells[name] = {}
        for method in METHODS:
            cells[name][method] = verdict(kind, method)
    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": hf.__version__}
    results.write_text(json.dumps({"versions": versions, "cells": cells}, indent=1) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
