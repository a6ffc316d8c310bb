"""CIFAR-10 for several networks, from `images/cifar10_25k.tar` with files `{train,test}/CLASS/*.jpg`."""

from __future__ import annotations

import random
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate
from transformers import default_data_collator

from support import demos, photos, residual, vision
from support.task import DATA_SEED, Sizes, Task

ARCHIVE = "images/cifar10_25k.tar"
SHOTS = 16
"""Images of each class to train on where they are few."""

Pictures = list[tuple[str, int]]
"""Names in the archive, and classes."""


@dataclass(frozen=True)
class Network:
    """A pretrained network: how it is made of pixels and classes, its normalization and what is adapted."""

    make: Callable[[int, int], Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    target_modules: str


MOBILENET = Network(
    lambda pixels, classes: demos.mobilenet_v2(classes, dropout=0.2),
    demos.IMAGENET_MEAN,
    demos.IMAGENET_STD,
    r".*\.(conv_1x1|expand_1x1|reduce_1x1)\.convolution",  # those in groups are beyond most methods
)
RESNET = Network(
    lambda pixels, classes: residual.resnet50_half(classes),
    demos.IMAGENET_MEAN,
    demos.IMAGENET_STD,
    r".*\.encoder\..*\.convolution",
)
CLIP = Network(
    vision.clip_classifier, vision.CLIP_MEAN, vision.CLIP_STD, r".*encoder\..*\.([qkv]_proj|out_proj|fc[12])"
)
NETWORKS = {"cifar10": MOBILENET, "resnet-cifar10": RESNET, "clip-cifar10": CLIP, "clip-fewshot": CLIP}
"""Networks by task."""
DIGITS = {"digits": MOBILENET, "resnet-digits": RESNET}
"""Networks by task, of those with handwritten digits."""


def cifar10(name: str, folder: Path, sizes: Sizes) -> Task:
    """One of `NETWORKS` on CIFAR-10, with all images to train on or with few of each class."""
    network = NETWORKS[name]
    with tarfile.open(folder / ARCHIVE) as archive:
        classes, files = _listed(archive)
        rest = files["train"][sizes.validation :]
        chosen = (
            (_few(rest) if name == "clip-fewshot" else rest)[: sizes.train],
            files["train"][: sizes.validation],
            files["test"][: sizes.test],
        )
        train, validation, test = (
            [_row(archive, *file, network, sizes.pixels) for file in of_split] for of_split in chosen
        )
    return Task(
        name,
        lambda: network.make(sizes.pixels, len(classes)),
        train,
        validation,
        test,
        collate=default_data_collator,
        new_modules=["classifier"],
        target_modules=network.target_modules,
    )


def _listed(archive: tarfile.TarFile) -> tuple[list[str], dict[str, Pictures]]:
    """Classes, and the files of each split in random order."""
    names = sorted(name for name in archive.getnames() if Path(name).suffix in photos.SUFFIXES)
    classes = sorted({Path(name).parent.name for name in names})
    files: dict[str, Pictures] = {"train": [], "test": []}
    for name in names:
        split, label, _ = Path(name).parts
        files[split].append((name, classes.index(label)))
    for of_split in files.values():
        random.Random(DATA_SEED).shuffle(of_split)
    return classes, files


def _few(files: Pictures) -> Pictures:
    """The first of each class."""
    seen: Counter[int] = Counter()
    chosen = []
    for name, label in files:
        seen[label] += 1
        if seen[label] <= SHOTS:
            chosen.append((name, label))
    return chosen


def _row(archive: tarfile.TarFile, name: str, label: int, network: Network, pixels: int) -> dict[str, Any]:
    scaled = photos.stacked([photos.opened(archive.extractfile(name))]).float() / 255
    (image,) = interpolate(scaled, size=(pixels, pixels), mode="bilinear")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    return {"pixel_values": (image - mean) / std, "labels": label}
