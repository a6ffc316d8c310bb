"""Batches in which every request has its own adapter, `adapter_names`, against PEFT's LoRA.

    python examples/benchmarks/mixed_batch.py            about 30 minutes on 2 cores
    python examples/benchmarks/mixed_batch.py --quick    about a minute, width 256

Decoders of 4 layers, width 512 and 2048, with 1, 8, 32 and 100 adapters of rank 16 on all linear layers; 32
requests of 1, 16 and 64 tokens, the adapters in turn. Continual SVD protects 16 directions, for bases of half
of them would need 20 GiB for 32 adapters. Times are medians of interleaved repeats; ratios are taken repeat
by repeat, with the smallest and the largest. The peak is that of a process which holds the model with its
adapters and runs such batches, above its imports. Expected: half of LoRA's time where the base model alone
takes less, and at most 1.2 of its memory, but for Continual SVD, whose adapters hold bases.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

import timing
from peft_subspace import ContinualSVDConfig, FLoRAConfig, LoRASBConfig, MoSConfig

RANK, LAYERS, REQUESTS = 16, 4, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON: dict[str, Any] = {"r": RANK, "target_modules": LINEARS, "init_weights": False, "inference_mode": True}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=RANK, target_modules=LINEARS, init_lora_weights=False, inference_mode=True),
    "flora": lambda: FLoRAConfig(**COMMON),
    "mos": lambda: MoSConfig(**COMMON, equivalent_r=4),
    "lora_sb": lambda: LoRASBConfig(**COMMON),
    "continual_svd": lambda: ContinualSVDConfig(**COMMON, preserve=16),
}


def with_adapters(method: str, count: int, width: int) -> PeftModel:
    """Decoder with `count` adapters named `a0`, `a1` and so on; with `"base"` the model alone."""
    torch.manual_seed(0)
    base = timing.transformer(LAYERS, width)
    if method == "base":
        return base.eval()
    config = CONFIGS[method]()  # one for all, so that Continual SVD takes one SVD of each weight
    model = get_peft_model(base, config, "a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    return model.eval()


def batch(model: PeftModel, count: int, tokens: int) -> Callable[[], None]:
    """A forward pass of 32 requests, the adapters in turn."""
    ids = timing.tokens_on_device(REQUESTS, tokens)
    names = {"adapter_names": [f"a{i % count}" for i in range(REQUESTS)]} if count else {}

    @torch.no_grad()
    def step() -> None:
        model(input_ids=ids, **names)

    return step


def measure(methods: list[str], count: int, width: int, repeats: int) -> dict[str, Any]:
    """Times of all methods and of the base model, by tokens of a request."""
    models = {name: with_adapters(name, count, width) for name in ["base", *methods]}
    results: dict[str, Any] = {}
    for tokens in (1, 16, 64):
        steps = {n: batch(model, count if n != "base" else 0, tokens) for n, model in models.items()}
        seconds = timing.interleaved(steps, repeats, warmup=2)
        results[str(tokens)] = {
            name: {"seconds": statistics.median(times), "of_lora": timing.ratio(seconds, name, "lora")}
            for name, times in seconds.items()
        }
    return results


def peak(method: str, count: int, width: int) -> None:
    """What a peak is taken of."""
    model = with_adapters(method, count, width)
    for tokens in (1, 16, 64):
        for _ in range(2):
            batch(model, count, tokens)()


def main() -> None:
    """Measure times and peaks, print tables and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, and fewer adapters and repeats")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8, 32, 100])
    parser.add_argument("--name", help="of the file of results")
    parser.add_argument("--peak", nargs=3, metavar=("METHOD", "COUNT", "WIDTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        method, count, width = options.peak
        timing.print_peak(lambda: peak(method, int(count), int(width)))
        return
    widths, counts, repeats = options.widths, options.counts, options.repeats
    if options.quick:
        widths, counts, repeats = [256], [1, 8], 3
    methods = ["lora", *(name for name in options.methods if name != "lora")]
    results: dict[str, Any] = {}
    for width in widths:
        for count in counts:
            found = measure(methods, count, width, repeats)
            arguments = str(count), str(width)
            peaks = {name: timing.peak_mib(__file__, name, *arguments) for name in methods}
            results.setdefault(str(width), {})[str(count)] = {"times": found, "peak_mib": peaks}
            print_results(f"width {width}, {count} adapters", found, peaks)
            timing.save(options.name or ("mixed_batch-quick" if options.quick else "mixed_batch"), results)


def print_results(title: str, times: dict[str, Any], peaks: dict[str, float]) -> None:
    """Print one row per method: times in ms and their ratios to LoRA's, and peaks."""
    rows = []
    for method in times["1"]:
        row: list[Any] = [method]
        for found in times.values():
            ratio = found[method]["of_lora"]
            row.append(f"{1000 * found[method]['seconds']:.0f} ms")
            row.append("{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio))
        if method in peaks:
            row += [f"{peaks[method]:.0f} MiB", f"{peaks[method] / peaks['lora']:.2f}"]
        rows.append([*row, *[""] * (9 - len(row))])
    header = [text for tokens in times for text in (f"{tokens} tokens", "of LoRA")]
    timing.table(title, ["", *header, "peak", "of LoRA"], rows)


if __name__ == "__main__":
    main()
