"""FLoRA beside PEFT's LoRA at equal rank: counts, train step, memory, wrapping, loading, merging.

    python examples/benchmarks/flora.py            about 15 minutes and 8 GiB on 2 cores
    python examples/benchmarks/flora.py --quick    about 2 minutes: 4 layers instead of 24

Train step: forward and backward of a decoder of 24 layers, width 1024, 4 × 256 tokens, rank 16 on all linear
layers, fp32. Peak memory: growth of the process's resident peak, each variant in a process of its own.
Wrapping and
loading: the shapes of Llama-3.2-1B, all linear layers. Expected: train step at most 1.03, memory 1.02,
    wrapping
and loading 1.2 of LoRA's. Times are medians of interleaved repeats.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import timing
from peft_subspace import FLoRAConfig

RANK = 16
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
    "flora": lambda: FLoRAConfig(r=RANK, alpha=RANK, target_modules="all-linear"),
}


def llama(**sizes: Any) -> nn.Module:
    """Llama on the meta device."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


def llama_1b() -> nn.Module:
    """Shapes of Llama-3.2-1B, on the meta device."""
    return llama(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def trained(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def counts() -> dict[str, int]:
    """Trainable parameters of FLoRA on known shapes."""
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    shapes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    conv = nn.Sequential(nn.Conv2d(64, 128, 3))
    found = {"conv 64->128 3x3, r=[16, 16, 2, 2]": FLoRAConfig(r=[16, 16, 2, 2], target_modules=["0"])}
    result = {name: trained(get_peft_model(conv, config)) for name, config in found.items()}
    for rank in (4, 32):
        model = get_peft_model(llama(**shapes), FLoRAConfig(r=rank, target_modules=targets))
        result[f"LLaMA-7B q, k, v, up, down, r={rank}"] = trained(model)
    return result


def decoder(name: str, layers: int) -> nn.Module:
    """The timed decoder, frozen or with an adapter."""
    base = timing.transformer(layers)
    return base.requires_grad_(False) if name == "base" else get_peft_model(base, CONFIGS[name]())


def train_steps(layers: int, repeats: int) -> dict[str, Any]:
    """Seconds of a train step and their ratios to LoRA's."""
    names = ["base", *CONFIGS]
    seconds = timing.interleaved({n: timing.train_step(decoder(n, layers)) for n in names}, repeats)
    return {
        name: {"seconds": seconds[name], "to_lora": timing.ratio(seconds, name, "lora")} for name in names
    }


def peaks(layers: int, repeats: int) -> dict[str, list[float]]:
    """MiB that building the decoder and two train steps need, each time in a new process."""
    arguments = ("--layers", str(layers), "--variant")
    return {
        name: [timing.peak_mib(__file__, *arguments, name) for _ in range(repeats)]
        for name in ["base", *CONFIGS]
    }


def one_peak(name: str, layers: int) -> None:
    """Do the work whose memory is measured."""

    def work() -> None:
        step = timing.train_step(decoder(name, layers))
        step()
        step()

    timing.print_peak(work)


def wrap_1b(config: Callable[[], Any]) -> None:
    """Add an adapter to a model without weights."""
    get_peft_model(llama_1b(), config())


def wrapping(repeats: int) -> dict[str, Any]:
    """Seconds to wrap a 1B model on the meta device, and to load an adapter onto a real one."""
    wrap = timing.interleaved({name: partial(wrap_1b, config) for name, config in CONFIGS.items()}, repeats)
    build = timing.interleaved({"build": llama_1b}, repeats)["build"]
    wrap = {name: [a - b for a, b in zip(times, build, strict=True)] for name, times in wrap.items()}
    base = llama_1b().to(torch.bfloat16).to_empty(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        for name, config in CONFIGS.items():
            model = get_peft_model(base, config())
            model.save_pretrained(f"{folder}/{name}", save_embedding_layers=False)
            base = model.unload()

        def load_onto(name: str) -> None:
            PeftModel.from_pretrained(base, f"{folder}/{name}").unload()

        steps = {name: partial(load_onto, name) for name in CONFIGS}
        load = timing.interleaved(steps, repeats)
    results = {"wrap": wrap, "load": load}
    return {
        name: {"seconds": seconds, "to_lora": timing.ratio(seconds, "flora", "lora")}
        for name, seconds in results.items()
    }


def merging(layers: int) -> dict[str, float]:
    """MiB that a merged model keeps to unmerge bit for bit, beside those of its adapted weights."""
    model = decoder("flora", layers)
    weights = [m.get_base_layer().weight for m in model.modules() if hasattr(m, "kept_bytes")]
    original = copy.deepcopy([weight.data for weight in weights])
    for _ in range(100):
        model.merge_adapter()
        kept = sum(m.kept_bytes for m in model.modules() if hasattr(m, "kept_bytes"))
        model.unmerge_adapter()
    equal = all(torch.equal(a, b.data) for a, b in zip(original, weights, strict=True))
    total = sum(weight.nbytes for weight in original)
    return {"kept_mib": kept / 2**20, "adapted_mib": total / 2**20, "bit_equal_after_100_cycles": equal}


def main() -> None:
    """Run everything, print it side by side and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="4 layers and fewer repeats")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.peak:
        one_peak(options.variant, options.layers)
        return
    if options.quick:
        options.layers, options.repeats = 4, 3
    results: dict[str, Any] = {"options": vars(options), "counts": counts()}
    timing.table("trainable parameters", ["shapes", "count"], list(results["counts"].items()))
    results["wrapping"] = wrapping(options.repeats)
    rows = [[name, *result["to_lora"].values()] for name, result in results["wrapping"].items()]
    timing.table("FLoRA / LoRA on Llama-3.2-1B's shapes", ["", "median", "min", "max"], rows)
    results["merging"] = merging(4)
    timing.table("100 merge cycles, 4 layers", list(results["merging"]), [list(results["merging"].values())])
    results["peak_mib"] = peaks(options.layers, 3)
    rows = [[name, *map(round, runs)] for name, runs in results["peak_mib"].items()]
    timing.table("peak MiB", ["", "1st", "2nd", "3rd"], rows)
    results["train_step"] = train_steps(options.layers, options.repeats)
    rows = [[name, *result["to_lora"].values()] for name, result in results["train_step"].items()]
    timing.table("train step / LoRA's", ["", "median", "min", "max"], rows)
    timing.save("flora", results)


if __name__ == "__main__":
    main()
