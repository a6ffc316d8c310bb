"""What a pass that gathers statistics costs, in forward passes of the same batches.

    python examples/benchmarks/statistics_pass.py            a minute on one core
    python examples/benchmarks/statistics_pass.py --width 1024 --tokens 4096

A decoder of 4 layers, all linear layers watched. Processor time of one thread, the passes in turn; medians of
ratios taken repeat by repeat. Second moments take `n²` products per row beside the layer's `m n`, so that the
ratio depends on shapes; layers that are called with one tensor share theirs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model

import timing
from peft_subspace import ContinualSVDConfig
from peft_subspace.statistics import collect


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="width of the decoder")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch, in rows of 128")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each pass")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = timing.transformer(4, options.width)
    config = ContinualSVDConfig(r=4, directions="inputs", preserve=0, target_modules="all-linear")
    model = get_peft_model(base, config).eval()
    ids = torch.randint(5, 100, (options.tokens // 128, 128))
    batches = [{"input_ids": ids, "labels": ids}]

    def forward() -> None:
        with torch.no_grad():
            model(**batches[0])

    passes: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "inputs": lambda: collect(model, batches, progress=False),
        "norms": lambda: collect(model, batches, inputs="norms", progress=False),
        "gradients": lambda: collect(model, batches, inputs=False, gradients=True, progress=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(1 + options.repeats):
        for name, run in passes.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own[1:], seconds["forward"][1:], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{name:10} {middle:.2f} forward passes, {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
