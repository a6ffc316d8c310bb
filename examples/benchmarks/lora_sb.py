"""LoRA-SB: its train step against PEFT's LoRA, and what its initialization from gradients costs.

    python examples/benchmarks/lora_sb.py            about 15 minutes on 2 cores
    python examples/benchmarks/lora_sb.py --quick    about 3 minutes, a quarter of the layers

Train step: a decoder of 24 layers of width 1024 in fp32, all linear layers adapted at equal rank.
Initialization: a model of the shapes of SmolLM2-135M with random weights, 64 sequences of 128 tokens in 8
batches. Expected: a train step of at most 0.97 of LoRA's; an initialization in less than 3 plain passes
forward and back over the same data (base weights trained), and under `max_memory` plus 10 % beyond the peak
of a train step. PEFT's gradient estimate for LoRA-GA on the same data stands beside it. Times are medians of
interleaved repeats; peaks are taken in processes of their own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import timing
from peft_subspace import LoRASBConfig, initialize_from_gradient
from peft_subspace.methods.lora_sb import LoRASBDelta

BATCHES, BATCH, TOKENS, VOCABULARY = 8, 8, 128, 49152
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def smol(layers: int = 30) -> nn.Module:
    """Model of the shapes of SmolLM2-135M, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def limit(base: nn.Module) -> int:
    """Memory limit in bytes, about half of what all gradients need together."""
    return int(2 * sum(p.numel() for name, p in base.named_parameters() if "_proj" in name))


def sequences() -> list[dict[str, torch.Tensor]]:
    """64 sequences of random tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (BATCHES, BATCH, TOKENS), generator=generator)
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def adapted(base: nn.Module) -> nn.Module:
    """A base model with LoRA-SB on all linear layers."""
    return get_peft_model(base, LoRASBConfig(target_modules="all-linear", init_weights=False))


def plain_passes(base: nn.Module) -> Callable[[], None]:
    """Forward and backward over the data with all linear layers of the blocks trained."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("_proj" in name)

    def run() -> None:
        for batch in sequences():
            base(**batch).loss.backward()
        base.zero_grad(set_to_none=True)

    return run


def start(base: nn.Module, max_memory: int | None = None) -> Callable[[], None]:
    """Start of LoRA-SB from the gradients of the data."""
    model = adapted(base)

    def run() -> None:
        for module in model.modules():
            if isinstance(module, LoRASBDelta):
                module.initialized = False  # lets the benchmark repeat it
        initialize_from_gradient(
            model, sequences(), learning_rate=1e-4, num_batches=None, max_memory=max_memory, progress=False
        )

    return run


def train_step(base: nn.Module) -> Callable[[], None]:
    """One train step with LoRA-SB on each of the batches."""
    model = adapted(base)

    def run() -> None:
        for batch in sequences():
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)

    return run


def loraga(base: nn.Module, wrap: bool = False) -> Callable[[], None]:
    """PEFT's estimate of the same gradients, and if `wrap` LoRA-GA's initialization from it."""
    options: dict[str, Any] = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    config = LoraConfig(r=32, target_modules=LINEAR, **options)

    def passes() -> None:
        for batch in sequences():
            base(**batch).loss.backward()

    def run() -> None:
        preprocess_loraga(base, config, passes)
        if wrap:
            get_peft_model(base, config)
        for module in base.modules():
            vars(module).pop("_peft_loraga_grad", None)

    return run


PEAKS: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
    "train step": train_step,
    "start": start,
    "start, max_memory": lambda base: start(base, limit(base)),
    "LoRA-GA, gradients": loraga,
    "LoRA-GA, gradients and start": lambda base: loraga(base, wrap=True),
}


def time_train_steps(layers: int, repeats: int) -> dict[str, Any]:
    """Train step of LoRA-SB and of PEFT's LoRA at equal rank."""
    results: dict[str, Any] = {}
    for rank in (32, 96):
        configs = {
            "LoRA": LoraConfig(r=rank, target_modules="all-linear"),
            "LoRA-SB": LoRASBConfig(r=rank, target_modules="all-linear", init_weights=False),
        }
        models = {name: get_peft_model(timing.transformer(layers), c) for name, c in configs.items()}
        seconds = timing.interleaved({n: timing.train_step(m) for n, m in models.items()}, repeats)
        results[f"r={rank}"] = {
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "ratio": timing.ratio(seconds, "LoRA-SB", "LoRA"),
            "trained": {name: model.get_nb_trainable_parameters()[0] for name, model in models.items()},
        }
    rows = [
        [rank, *value["seconds"].values(), value["ratio"]["median"], *value["trained"].values()]
        for rank, value in results.items()
    ]
    header = ["rank", "LoRA s", "LoRA-SB s", "ratio", "LoRA trained", "LoRA-SB trained"]
    timing.table("Train step, all linear layers", header, rows)
    return results


def time_starts(layers: int, repeats: int) -> dict[str, Any]:
    """Time of the initialization against plain passes and PEFT's estimate; peaks of each."""
    steps = {
        "plain passes": plain_passes(smol(layers)),
        "start": start(smol(layers)),
        "start, max_memory": start(smol(layers), limit(smol(layers))),
        "LoRA-GA, gradients": loraga(smol(layers)),
    }
    seconds = timing.interleaved(steps, repeats)
    base = smol(layers)
    begin = time.perf_counter()
    loraga(base, wrap=True)()  # changes the base, so it runs once
    seconds["LoRA-GA, gradients and start"] = [time.perf_counter() - begin] * repeats
    peaks = {name: timing.peak_mib(__file__, name, str(layers)) for name in PEAKS}
    results: dict[str, Any] = {
        name: {
            "seconds": statistics.median(values),
            "ratio": timing.ratio(seconds, name, "plain passes"),
            "peak_mib": peaks.get(name),
            "extra_mib": peaks[name] - peaks["train step"] if name in peaks else None,
        }
        for name, values in seconds.items()
    }
    rows = [
        [n, v["seconds"], v["ratio"]["median"], v["peak_mib"] or "", v["extra_mib"] or ""]
        for n, v in results.items()
    ]
    header = ["", "seconds", "of plain passes", "peak MiB", "beyond a train step"]
    most = limit(smol(layers)) / 2**20
    timing.table(f"Start from gradients, max_memory {most:.0f} MiB", header, rows)
    return {**results, "train step": {"peak_mib": peaks["train step"]}, "max_memory_mib": most}


def main() -> None:
    """Run both parts and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the layers")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of which the median is taken")
    options = parser.parse_args()
    share = 4 if options.quick else 1
    results = {
        "train_step": time_train_steps(24 // share, options.repeats),
        "start": time_starts(30 // share, options.repeats),
    }
    timing.save("lora_sb", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        name, layers = sys.argv[2:]
        timing.print_peak(PEAKS[name](smol(int(layers))))  # the model and the adapter are there already
    else:
        main()
