"""Batches in which every request has its own adapter, `adapter_names`, against PEFT's LoRA.

    python examples/benchmarks/mixed_batch.py            about 30 minutes on 2 cores
    python examples/benchmarks/mixed_batch.py --quick    about a minute, width 256

Decoders of 4 layers, width 512 and 2048, with 1, 8, 32 and 100 adapters of rank 16 on all linear layers, each
loaded from a file as for serving; 32 requests of 1, 16 and 64 tokens, the adapters in turn. Times are medians
of interleaved repeats; ratios are taken repeat by repeat, with the smallest and the largest. The peak is that
of a process which holds the model with its adapters and runs such batches, above its imports.

Expected: half of LoRA's time where the base model alone takes less, and at most 1.2 of its memory. `--growth`
moves the bound on memory, up to which adapters are stacked.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

import timing
from claims import markdown
from peft_subspace import ContinualSVDConfig, FLoRAConfig, LoRASBConfig, MoSConfig
from peft_subspace.tuner import kept

RANK, LAYERS, REQUESTS = 16, 4, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON: dict[str, Any] = {"r": RANK, "target_modules": LINEARS, "init_weights": False, "inference_mode": True}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=RANK, target_modules=LINEARS, init_lora_weights=False, inference_mode=True),
    "flora": lambda: FLoRAConfig(**COMMON),
    "mos": lambda: MoSConfig(**COMMON, equivalent_r=4),
    "lora_sb": lambda: LoRASBConfig(**COMMON),
    "continual_svd": lambda: ContinualSVDConfig(**COMMON),
}


def decoder(width: int) -> nn.Module:
    """The base model."""
    torch.manual_seed(0)
    return timing.transformer(LAYERS, width)


def with_adapters(method: str, count: int, width: int, folder: Path) -> nn.Module:
    """Decoder with `count` adapters named `a0`, `a1` and so on; with `"base"` the model alone.

    The file of the adapters is made if there is none.
    """
    if method == "base":
        return decoder(width).eval()
    saved = folder / f"{method}-{width}"
    if not saved.exists():
        get_peft_model(decoder(width), CONFIGS[method]()).save_pretrained(str(saved))
    model = PeftModel.from_pretrained(decoder(width), saved, "a0")
    for i in range(1, count):
        model.load_adapter(saved, f"a{i}")
    return model.eval()


def batch(model: nn.Module, count: int, tokens: int) -> Callable[[], None]:
    """A forward pass of 32 requests, the adapters in turn."""
    ids = timing.tokens_on_device(REQUESTS, tokens)
    names = {"adapter_names": [f"a{i % count}" for i in range(REQUESTS)]} if count else {}

    @torch.no_grad()
    def step() -> None:
        model(input_ids=ids, **names)

    return step


def measure(methods: list[str], count: int, width: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Times of all methods and of the base model, by tokens of a request."""
    models = {name: with_adapters(name, count, width, folder) for name in ["base", *methods]}
    results: dict[str, Any] = {}
    for tokens in (1, 16, 64):
        steps = {n: batch(model, count if n != "base" else 0, tokens) for n, model in models.items()}
        seconds = timing.interleaved(steps, repeats, warmup=2)
        results[str(tokens)] = {
            name: {"seconds": statistics.median(times), "of_lora": timing.ratio(seconds, name, "lora")}
            for name, times in seconds.items()
        }
    return results


def peak(method: str, count: int, width: int, folder: Path) -> None:
    """What a peak is taken of."""
    model = with_adapters(method, count, width, folder)
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
    parser.add_argument("--growth", type=float, default=kept.GROWTH, help="bound on the memory of stacks")
    parser.add_argument("--name", help="of the file of results")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    kept.GROWTH = options.growth
    if options.peak:
        method, count, width, made = options.peak
        timing.print_peak(lambda: peak(method, int(count), int(width), Path(made)))
        return
    widths, counts, repeats = options.widths, options.counts, options.repeats
    if options.quick:
        widths, counts, repeats = [256], [1, 8], 3
    methods = ["lora", *(name for name in options.methods if name != "lora")]
    name = options.name or ("mixed_batch-quick" if options.quick else "mixed_batch")
    measured = (timing.RESULTS / f"{name}.json").exists()
    results: dict[str, Any] = timing.load(name)["widths"] if measured else {}  # of other widths and counts
    with tempfile.TemporaryDirectory() as folder:
        for width, count in itertools.product(widths, counts):
            found = measure(methods, count, width, repeats, Path(folder))
            arguments = str(count), str(width), folder, "--growth", str(options.growth)
            peaks = {name: timing.peak_mib(__file__, name, *arguments) for name in methods}
            results.setdefault(str(width), {})[str(count)] = {"times": found, "peak_mib": peaks}
            print_results(f"width {width}, {count} adapters", found, peaks)
            timing.save(name, {"growth": options.growth, "widths": results})


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


def table(content: dict[str, Any]) -> str:
    """Ratios to LoRA of time, by tokens of a request, and of memory."""
    rows = []
    for width, by_count in content["widths"].items():
        for count, found in by_count.items():
            for method in found["times"]["1"]:
                ratios = [times[method]["of_lora"] for times in found["times"].values()]
                peaks = found["peak_mib"]
                memory = f"{peaks[method] / peaks['lora']:.2f}" if method in peaks else ""
                times = ["{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio) for ratio in ratios]
                if method != "lora":
                    rows.append([width, count, method, *times, memory])
    header = ["width", "adapters", "", "1 token", "16 tokens", "64 tokens", "peak memory"]
    return markdown(header, rows)


if __name__ == "__main__":
    main()
