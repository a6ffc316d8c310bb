"""The comparison of `effort_detector.py`: every method on every training family, resumable, and its table."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from support import detector, generators, photos, vision
from support.detector import METHODS, Examples, Training
from support.generators import SPLITS
from support.results import Results
from support.task import DATA_SEED

PACKAGES = ("torch", "transformers", "peft", "peft-subspace")
NOT_SETTINGS = ("output", "results", "train_on", "methods", "seeds")
"""Options that may change between two calls that share one results file."""

IMAGE_SETTINGS = (
    "images",
    "pixels",
    "generator_steps",
    *(f"{name}_images" for name in (*SPLITS, "generator")),
)


class Comparison:
    """Images, network and results that all runs share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = Results(options.results, _settings(options))
        self.real, self.generated = self._images()
        self.outside = _outside(options.outside, options.pixels) if options.outside else None
        self.detector = vision.Detector(vision.load(options.model), options.image_size).eval()
        self.training = Training(
            options.steps, options.batch_size, options.bf16, str(options.output / "trainer")
        )
        self.results.content |= {
            "versions": {package: version(package) for package in PACKAGES},
            "threads": torch.get_num_threads(),
            "images": {name: len(images) for name, images in vars(self.real).items()},
            "psnr": {family: _psnr(made["test"], self.real.test) for family, made in self.generated.items()},
        }

    def _images(self) -> tuple[photos.Photos, dict[str, dict[str, torch.Tensor]]]:
        """Real photos and what every family makes of them, all encoded alike."""
        options = self.options
        wanted = {name: getattr(options, f"{name}_images") for name in (*SPLITS, "generator")}
        real = photos.load(options.images, options.pixels, wanted, DATA_SEED)
        options.output.mkdir(parents=True, exist_ok=True)
        made = {}
        for family in generators.FAMILIES:
            cache = options.output / f"{family}-{_digest(options)}.npz"
            made[family] = generators.generated(family, real, options.generator_steps, DATA_SEED, cache)
        encoded = {split: photos.encoded(getattr(real, split)) for split in SPLITS}
        return dataclasses.replace(real, **encoded), made

    def examples(self, family: str, split: str) -> Examples:
        """Real photos of a split and what a family made of them."""
        return Examples.of(getattr(self.real, split), self.generated[family][split])

    def rate(self, name: str, family: str) -> float:
        """The learning rate with the least validation loss on the training family, seed 0."""
        rates = METHODS[name].rates
        return min(rates, key=lambda rate: self.run(name, family, rate, 0)["validation_loss"])

    def run(self, name: str, family: str, rate: float, seed: int) -> dict[str, Any]:
        """Trains and measures one detector, unless the results file has it."""
        runs, key = self.results.content["runs"], f"{name} {family} {rate:g} {seed}"
        if key not in runs:
            started = time.perf_counter()
            examples = self.examples(family, "train")
            trained = detector.train(METHODS[name], self.detector, examples, rate, seed, self.training)
            tests = {other: made["test"] for other, made in self.generated.items()}
            runs[key] = {
                "method": name,
                "family": family,
                "rate": rate,
                "seed": seed,
                "trainable": trained.trainable,
                "validation_loss": detector.loss_of(trained, self.examples(family, "validation")),
                **detector.measures(trained, self.real.test, tests),
            }
            if self.outside is not None:
                runs[key]["outside_auc"] = detector.measures(trained, *self.outside)["auc"]["outside"]
            runs[key]["seconds"] = time.perf_counter() - started
            self.results.save()
        return runs[key]

    def predicted_hours(self) -> float:
        """Hours that the runs still to come take, from short runs of each method."""
        runs, seconds = self.results.content["runs"].values(), 0.0
        for name in self.options.methods:
            wanted = len(self.options.train_on) * (len(METHODS[name].rates) + self.options.seeds - 1)
            missing = wanted - sum(run["method"] == name for run in runs)
            if missing > 0:
                seconds += missing * self._seconds(name)
        return seconds / 3600

    def _seconds(self, name: str) -> float:
        """Predicted seconds of one run: its initialization, its steps and the images it is tested on."""
        method, times = METHODS[name], []
        examples = self.examples(self.options.train_on[0], "train")
        for steps in (1, 4):
            started = time.perf_counter()
            short = dataclasses.replace(self.training, steps=steps)
            trained = detector.train(method, self.detector, examples, method.rates[0], 0, short)
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        trained.features(self.real.test[:64])
        per_image = (time.perf_counter() - started) / len(self.real.test[:64])
        images = (1 + len(self.generated)) * len(self.real.test) + 2 * len(self.real.validation)
        if self.outside is not None:
            images += len(self.outside[0]) + len(self.outside[1]["outside"])
        return times[0] + (self.training.steps - 1) * (times[1] - times[0]) / 3 + images * per_image


def run(options: argparse.Namespace) -> None:
    """Everything: images, detectors, results, table."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    comparison = Comparison(options)
    content = comparison.results.content
    print("PSNR of the test images:", ", ".join(f"{k} {v:.1f} dB" for k, v in content["psnr"].items()))
    print(f"predicted: {comparison.predicted_hours():.2f} hours of detector training and testing", flush=True)
    pairs = list(itertools.product(options.train_on, options.methods))
    for family, name in tqdm(pairs, desc="families and methods", disable=None):
        rate = comparison.rate(name, family)
        for seed in range(options.seeds):
            comparison.run(name, family, rate, seed)
    content["summary"] = summary(content)
    comparison.results.save()
    print(table(content["summary"], options.methods))
    print(f"all runs: {options.results}")


def chosen(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs with the learning rate that did best in validation with seed 0."""
    runs = list(content["runs"].values())
    best = {}
    for run in sorted(runs, key=lambda run: -run["validation_loss"]):
        if run["seed"] == 0:
            best[run["method"], run["family"]] = run["rate"]  # the least loss comes last, and stays
    return [run for run in runs if run["rate"] == best[run["method"], run["family"]]]


def summary(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the runs come to, by method.

    Returns:
        `title`, `trainable`, the chosen `rates` by training family, `auc_pairs` (mean over seeds, by training
        and test family), and one number per seed of `effective_rank`, `outside_auc` and the means of `auc`
        and `accuracy` on the training families (`…_seen`) and on all others (`…_unseen`).
    """
    figures = {}
    for method in dict.fromkeys(run["method"] for run in content["runs"].values()):
        runs = [run for run in chosen(content) if run["method"] == method]
        seeds = sorted({run["seed"] for run in runs})
        means = [_means([run for run in runs if run["seed"] == seed]) for seed in seeds]
        figures[method] = {
            "title": METHODS[method].title,
            "trainable": runs[0]["trainable"],
            "rates": {run["family"]: run["rate"] for run in runs},
            "auc_pairs": _pairs(runs),
            **{name: [mean[name] for mean in means] for name in means[0]},
        }
    return figures


def _pairs(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    families = dict.fromkeys(run["family"] for run in runs)
    same = {family: [run["auc"] for run in runs if run["family"] == family] for family in families}
    return {
        family: {other: statistics.fmean(auc[other] for auc in aucs) for other in aucs[0]}
        for family, aucs in same.items()
    }


def _means(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the training families of one seed's runs."""
    means = {"effective_rank": statistics.fmean(run["effective_rank"] for run in runs)}
    for name in ("auc", "accuracy"):
        means[f"{name}_seen"] = statistics.fmean(run[name][run["family"]] for run in runs)
        unseen = [run[name][other] for run in runs for other in run[name] if other != run["family"]]
        means[f"{name}_unseen"] = statistics.fmean(unseen)
    if all("outside_auc" in run for run in runs):
        means["outside_auc"] = statistics.fmean(run["outside_auc"] for run in runs)
    return means


def table(figures: dict[str, dict[str, Any]], methods: list[str]) -> str:
    """The comparison as text: means over seeds."""
    titles = ("AUC seen", "unseen", "acc. seen", "unseen", "eff. rank")
    names = ("auc_seen", "auc_unseen", "accuracy_seen", "accuracy_unseen", "effective_rank")
    lines = ["".join([" " * 28, *(f"{title:>10}" for title in titles), f"{'trained':>12}"])]
    for method, row in figures.items():
        if method in methods:
            means = [f"{statistics.fmean(row[name]):10.3f}" for name in names]
            lines.append("".join([f"{METHODS[method].title:28}", *means, f"{row['trainable']:12,}"]))
    return "\n".join(lines)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on; of a folder its name, since its place does not matter."""
    settings = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
    return {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}


def _digest(options: argparse.Namespace) -> str:
    """A short name of the settings that generated images depend on."""
    settings = {key: value for key, value in _settings(options).items() if key in IMAGE_SETTINGS}
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


def _outside(folder: Path, pixels: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    files = photos.found(folder)
    real, fake = ([file for file in files if file.name.startswith(kind)] for kind in ("real", "fake"))
    return photos.centres(real, pixels), {"outside": photos.centres(fake, pixels)}


def _psnr(images: torch.Tensor, originals: torch.Tensor) -> float:
    error = (images.double() - originals.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))
