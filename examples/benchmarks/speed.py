"""Time and memory of all methods beside PEFT's own, on decoders from 20 million to a billion weights.

    python examples/benchmarks/speed.py            hours on 2 cores; `--parts 20M` for one model
    python examples/benchmarks/speed.py --quick    about 5 minutes

For each method, at rank 16 or with as many trained parameters as MoS at an eighth of LoRA's: their number,
seconds to wrap (with the initialization from weights or gradients that some methods need), to load a saved
adapter and to merge it, the train step (4×256 tokens, forward and backward), and the peak of a process that
takes two steps of AdamW. Steps are interleaved; ratios to LoRA's and to the frozen model's are medians with
their range. The part `growth` has the step's ratio to LoRA's as rank, width, depth and batch grow. Each part
has a file of its own. On a GPU, peaks are those of its memory. OSF, Effort and Continual SVD start from
decompositions, which take long for the largest model: `--methods` leaves them out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

import timing
from support import device
from support.contestants import CONTESTANTS
from support.language import DECODER

SHAPES = {"20M": (6, 512), "300M": (24, 1024), "1B": (20, 2048)}  # layers, width
SIZES = {  # rank, or what stands for it
    "flora": 16,
    "lora-sb": 16,
    "mos": 2,
    "effort": 16,
    "continual-svd": 16,
    "lora": 16,
    "lora-ga": 16,
    "loha": 16,
    "osf": 16,
    "vb-lora": 64,
}
OURS = ("flora", "lora-sb", "mos", "effort", "continual-svd")
GROWTH = {  # what grows: (rank, layers, width, batch); MoS assembles its rank from four layers or more
    "rank": [(rank, 4, 512, 4) for rank in (8, 16, 64)],
    "width": [(16, 4, width, 4) for width in (256, 512, 1024)],
    "depth": [(16, layers, 512, 4) for layers in (4, 8, 16)],
    "batch": [(16, 4, 512, batch) for batch in (1, 4, 16)],
}


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Random tokens, for starts from gradients."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 1000, (4, 256), generator=generator) for _ in range(count)]
    return [device.moved({"input_ids": rows, "labels": rows}, device.best()) for rows in ids]


def wrapped(method: str, size: int, base: nn.Module) -> PeftModel:
    """The model with its adapter, started from data where the method is."""
    contestant = CONTESTANTS[method]
    config = contestant.config_for(base, DECODER, size)
    if config is None:
        raise ValueError(f"{method!r} has no adapter to measure; choose one of {', '.join(SIZES)}")
    contestant.before(base, config, batches())
    model = get_peft_model(base, config)
    contestant.after(model, batches())
    return model


def measured(shape: str, methods: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """All figures of methods on one model."""
    layers, width = SHAPES[shape]
    # first, while this process is small; on a GPU, whose memory each process counts for itself, all at once
    with ThreadPoolExecutor(1 if device.best().type == "cpu" else len(methods)) as pool:
        found_peaks = pool.map(lambda m: timing.peak_mib(__file__, m, str(layers), str(width)), methods)
        peaks = dict(zip(methods, found_peaks, strict=True))
    found: dict[str, dict[str, Any]] = {}
    base = frozen(layers, width)
    steps: dict[str, Callable[[], None]] = {"frozen": timing.train_step(twin(base))}
    for method in methods:
        started = time.perf_counter()
        model = wrapped(method, SIZES[method], twin(base))
        found[method] = {
            "wrap_s": time.perf_counter() - started,
            "trainable": model.get_nb_trainable_parameters()[0],
            "peak_mib": peaks[method],
            **reloaded(model, copy.deepcopy(base)),
        }
        steps[method] = timing.train_step(model)
    seconds = timing.interleaved(steps, repeats)
    for method, row in found.items():
        row["step_s"] = statistics.median(seconds[method])
        row["to_lora"] = timing.ratio(seconds, method, "lora")
        row["to_frozen"] = timing.ratio(seconds, method, "frozen")
    return found


def frozen(layers: int, width: int) -> nn.Module:
    """A model with the same random weights at each call."""
    torch.manual_seed(0)
    return timing.transformer(layers, width).requires_grad_(False)


def twin(base: nn.Module) -> nn.Module:
    """The model anew, over the same memory: one for each method would not fit otherwise."""
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.parameters()}
    return copy.deepcopy(base, shared)


def reloaded(model: PeftModel, base: nn.Module) -> dict[str, float]:
    """Seconds to load the adapter onto a base model, whose weights change, and to merge it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        started = time.perf_counter()
        loaded = PeftModel.from_pretrained(base, folder)
        seconds = {"load_s": time.perf_counter() - started}
    started = time.perf_counter()
    loaded.merge_adapter()
    return {**seconds, "merge_s": time.perf_counter() - started}


def growth(repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Ratio of train steps to LoRA's as one of four sizes grows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for what, points in GROWTH.items():
        found[what] = []
        for rank, layers, width, batch in points:
            base, steps = frozen(layers, width), {}
            for method in ("lora", *OURS):
                size = max(1, rank // 8) if method == "mos" else rank
                model = wrapped(method, size, twin(base))
                steps[method] = timing.train_step(model, batch=batch)
            seconds = timing.interleaved(steps, repeats)
            ratios = {method: timing.ratio(seconds, method, "lora") for method in OURS}
            point = {"rank": rank, "layers": layers, "width": width, "batch": batch}
            found[what].append({**point, "to_lora": ratios})
    return found


def peak(method: str, layers: int, width: int) -> None:
    """What a peak is taken of: model, adapter, start, and two steps with their optimizer state."""
    timing.take_two_adamw_steps(wrapped(method, SIZES[method], frozen(layers, width)))


def of_model(shape: str, methods: Sequence[str], repeats: int) -> dict[str, Any]:
    """What the file of one model has, printed as well."""
    rows = measured(shape, methods, repeats)
    columns = ["trainable", "wrap_s", "load_s", "merge_s", "step_s", "peak_mib"]
    table = [
        [name, *(row[c] for c in columns), row["to_lora"]["median"], row["to_frozen"]["median"]]
        for name, row in rows.items()
    ]
    timing.table(shape, ["", *columns, "step/LoRA's", "step/frozen"], table)
    return {"model": shape, "methods": rows}


def main() -> None:
    """Measure, print a table for each model and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only the smallest model, and fewer repeats")
    parts = (*SHAPES, "growth")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=SIZES,
        default=list(SIZES),
        help="on models; LoRA is among them always",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", nargs=3, metavar=("METHOD", "LAYERS", "WIDTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of PEFT's own methods
    if options.peak:
        method, layers, width = options.peak
        timing.print_peak(lambda: peak(method, int(layers), int(width)))
        return
    methods = list(dict.fromkeys([*options.methods, "lora"]))
    if options.quick:
        timing.save(f"speed-quick{where()}", of_model("20M", methods, repeats=3))
        return
    for part in options.parts:
        if part == "growth":
            found: dict[str, Any] = {"growth": growth(options.repeats)}
        else:
            found = of_model(part, methods, options.repeats)
        timing.save(f"speed-{part}{where()}", found)


def where() -> str:
    """What files of results on a GPU end in."""
    return "" if device.best().type == "cpu" else "-gpu"


if __name__ == "__main__":
    main()
