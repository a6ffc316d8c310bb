"""Time of merging LoRAs of rank 16 beside PEFT's `add_weighted_adapter`, in one run.

    python examples/benchmarks/merging.py            about 15 minutes on 2 cores
    python examples/benchmarks/merging.py --quick    narrow weights

Two, eight and twenty adapters on one square weight. PEFT's `svd`, `ties_svd` and `dare_ties_svd` give rank
16, and so do ours with `rank=16`; the others give exact factors. Expected at width 4096: coefficients and
subspaces at least 50 times faster than PEFT's `svd`, functions of entries not slower than PEFT's `ties_svd`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import timing
from claims import markdown
from peft_subspace.merging import merge

RANK, DENSITY = 16, 0.2
THEIRS: dict[str, dict[str, Any]] = {
    "cat": {},
    "svd": {"svd_rank": RANK},
    "ties_svd": {"svd_rank": RANK, "density": DENSITY},
    "dare_ties_svd": {"svd_rank": RANK, "density": DENSITY},
}
OURS: dict[str, tuple[dict[str, Any], int | None]] = {  # options, and rank to cut to
    "task_arithmetic": ({}, None),
    "svd": ({"keep": RANK}, None),
    "tsv_m": ({}, None),
    "iso_c": ({}, None),
    "ties": ({"density": DENSITY}, RANK),
    "dare": ({"density": DENSITY}, RANK),
    "ties, aligned": ({"density": DENSITY, "space": "aligned"}, RANK),
}


def adapted(width: int, count: int) -> PeftModel:
    """A square weight with that many adapters."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), config, "a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", config)
    return model


def steps(model: PeftModel, count: int) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    names = [f"a{number}" for number in range(count)]

    def theirs(kind: str) -> None:
        model.add_weighted_adapter(names, [1.0] * count, "merged", combination_type=kind, **THEIRS[kind])
        model.delete_adapter("merged")

    def ours(name: str) -> None:
        options, rank = OURS[name]
        made = merge([(model, adapter) for adapter in names], name.split(",")[0], **options)
        made.factors("0", rank)

    return {
        **{f"PEFT {kind}": partial(theirs, kind) for kind in THEIRS},
        **{name: partial(ours, name) for name in OURS},
    }


def table(content: dict[str, Any]) -> str:
    """Milliseconds of each method, by width and number of adapters, and the ratio of PEFT's `svd` to it."""
    found = {name: entry["seconds"] for name, entry in content.items() if "adapters" in name}
    rows = []
    for method in next(iter(found.values())):
        cells = [f"{1000 * s[method]:,.0f} ({s['PEFT svd'] / s[method]:.1f})" for s in found.values()]
        rows.append([method, *cells])
    return markdown(["milliseconds (PEFT's `svd` / it)", *found], rows)


def main() -> None:
    """Measure, print a table for each width and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="narrow weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widths", nargs="+", type=int, default=[384, 1024, 4096])
    options = parser.parse_args()
    widths, counts = ([64], [2]) if options.quick else (options.widths, [2, 8, 20])
    results: dict[str, Any] = {}
    for width in widths:
        for count in counts if width < 4096 else [8]:
            seconds = timing.interleaved(steps(adapted(width, count), count), options.repeats)
            found = {name: statistics.median(times) for name, times in seconds.items()}
            results[f"{width}, {count} adapters"] = {"seconds": found, "all": seconds}
            rows = [[n, f"{1000 * t:.1f} ms", f"{found['PEFT svd'] / t:.1f}"] for n, t in found.items()]
            timing.table(f"width {width}, {count} adapters", ["", "time", "times PEFT's svd"], rows)
            timing.save("merging-quick" if options.quick else "merging", results)


if __name__ == "__main__":
    main()
