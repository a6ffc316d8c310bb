"""How many dimensions training needs: the smallest random subspace that reaches 90 % of the full accuracy.

    python examples/benchmarks/dimension.py [--seeds 3]          about ten minutes on one core

The fully connected network of the paper (1804.08838), 784 to 200 to 200 to 10, trains from its random
initialization, in a subspace of `d` dimensions by `examples/methods/intrinsic_dimension.py`, or whole. Its
images are scikit-learn's digits, enlarged from 8×8 to MNIST's 28×28; for MNIST the paper finds `d = 750`.
Each size has the rate of least validation loss with seed 0, of three or more. An interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import runpy
from collections import OrderedDict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import timing
from claims import markdown, spread
from support.results import Results, tuned

METHOD = Path(__file__).parents[1] / "methods" / "intrinsic_dimension.py"
FULL, SHARE, PUBLISHED = 0, 0.9, 750
SIZES = (30, 100, 200, 300, 500, 750, 1000, 2000, 5000)
RATES = {True: (3e-4, 1e-3, 3e-3), False: (3e-2, 1e-1, 3e-1)}  # of the whole network, of a subspace
PASSES, BATCH, WIDTHS = 60, 64, (784, 200, 200, 10)


def network() -> nn.Module:
    """The paper's, with the default initialization of its layers."""
    sizes = list(pairwise(WIDTHS))
    layers = [(f"fc{n}", nn.Linear(*of)) for n, of in enumerate(sizes)]
    between = [(f"relu{n}", nn.ReLU()) for n in range(len(sizes))]
    pairs = [layer for pair in zip(layers, between, strict=True) for layer in pair]
    return nn.Sequential(OrderedDict(pairs[:-1]))


class Dimension:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = Results(options.results, {"passes": PASSES, "batch": BATCH, "widths": [*WIDTHS]})

    @cached_property
    def config_class(self) -> Any:
        """That of the example."""
        return runpy.run_path(str(METHOD))["IntrinsicConfig"]

    @cached_property
    def splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Pixels `(N, 784)` and digits `(N,)`."""
        grey, digits = load_digits(return_X_y=True)
        small = torch.tensor(grey / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        pixels = interpolate(small, size=(28, 28), mode="bilinear").flatten(1) - 0.3
        rest, test = train_test_split(range(len(digits)), test_size=0.25, random_state=0, stratify=digits)
        train, validation = train_test_split(rest, test_size=0.15, random_state=0, stratify=digits[rest])
        chosen = {"train": train, "validation": validation, "test": test}
        return {name: (pixels[rows], torch.tensor(digits[rows])) for name, rows in chosen.items()}

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure` that can be named by now, by their keys."""
        jobs: list[tuple[int, float, int]] = []
        for size in (FULL, *SIZES):
            missing, best = tuned(rates_tried(self.results.content, size), RATES[size == FULL])
            jobs += [(size, rate, 0) for rate in missing]
            jobs += [(size, best, seed) for seed in range(self.options.seeds) if best is not None]
        return {f"{size} {rate:g} {seed}": (size, rate, seed) for size, rate, seed in jobs}

    def measure(self, size: int, rate: float, seed: int) -> dict[str, Any]:
        """Train once."""
        torch.manual_seed(seed)
        model: Any = network()
        if size != FULL:
            config = self.config_class(r=size, target_modules=r"fc\d", seed=seed)
            model = get_peft_model(model, config)
        self._train(model, rate, seed)
        found = {name: _scores(model, *self.splits[name]) for name in ("validation", "test")}
        return {"size": size, "rate": rate, "seed": seed, **found}

    def _train(self, model: nn.Module, rate: float, seed: int) -> None:
        pixels, digits = self.splits["train"]
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PASSES)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(PASSES):
            for rows in torch.randperm(len(digits), generator=generator).split(BATCH):
                optimizer.zero_grad()
                cross_entropy(model(pixels[rows]), digits[rows]).backward()
                optimizer.step()
            schedule.step()


@torch.no_grad()
def _scores(model: nn.Module, pixels: Tensor, digits: Tensor) -> dict[str, float]:
    logits = model(pixels)
    accuracy = (logits.argmax(1) == digits).float().mean().item()
    return {"loss": cross_entropy(logits, digits).item(), "accuracy": accuracy}


def rates_tried(content: dict[str, Any], size: int) -> dict[float, float]:
    """What rates gave with seed 0, higher is better."""
    of = [run for run in content["runs"].values() if (run["size"], run["seed"]) == (size, 0)]
    return {run["rate"]: -run["validation"]["loss"] for run in of}


def accuracies(content: dict[str, Any]) -> dict[int, dict[int, float]]:
    """Test accuracy by size and seed, each size at its rate."""
    found: dict[int, dict[int, float]] = {}
    for size in dict.fromkeys(run["size"] for run in content["runs"].values()):
        scores = rates_tried(content, size)
        best = max(scores, key=scores.__getitem__)
        of = [run for run in content["runs"].values() if (run["size"], run["rate"]) == (size, best)]
        found[size] = {run["seed"]: run["test"]["accuracy"] for run in of}
    return found


def dimensions(found: dict[int, dict[int, float]]) -> list[int | None]:
    """The smallest size that reaches the share of the full accuracy, for each seed."""
    sizes = sorted(set(found) - {FULL})
    return [
        next((size for size in sizes if found[size].get(seed, 0.0) >= SHARE * full), None)
        for seed, full in sorted(found[FULL].items())
    ]


def table(content: dict[str, Any]) -> str:
    """Accuracy by size, with the share of the full one."""
    found = accuracies(content)
    total = sum(a * b + b for a, b in pairwise(WIDTHS))
    rows = []
    for size, of in sorted(found.items(), key=lambda item: item[0] or total):
        shares = [accuracy / found[FULL][seed] for seed, accuracy in of.items()]
        rows.append([f"{size:,}" if size else f"all {total:,}", spread([*of.values()]), spread(shares)])
    enough = ", ".join(f"{size:,}" if size else "none" for size in dimensions(found))
    words = (
        f"The smallest size that reaches {SHARE:.0%}, by seed: {enough}. Published for MNIST: {PUBLISHED}."
    )
    return f"{markdown(['dimensions', 'test accuracy', 'of the full one'], rows)}\n\n{words}"


def main() -> None:
    """Run what is missing, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs with the chosen rate")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    parser.add_argument("--results", type=Path, default=timing.RESULTS / "dimension.json")
    options = parser.parse_args()
    work = Dimension(options)
    work.results.complete(work, options.workers)
    print(table(work.results.content))


if __name__ == "__main__":
    main()
