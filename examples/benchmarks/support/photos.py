"""Real photographs, split for generators and detectors, and the encoding that every image passes."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
JPEG_QUALITY = 95
KEPT = 7 / 8
"""Part of a photo's shorter side that is cut out and resampled: the grid of its own JPEG blocks is lost."""
SHARES = {"test": 0.2, "validation": 0.1, "train": 0.3}
"""Largest part of the photos that a split may take; generators learn from the rest."""


@dataclass
class Photos:
    """Disjoint photos, each `(N, 3, pixels, pixels)` in 8 bits."""

    generator: torch.Tensor
    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def load(folder: Path | None, pixels: int, wanted: dict[str, int], seed: int) -> Photos:
    """Photos below a folder, or tiles of the three photographs that installed packages carry.

    Args:
        folder: Searched for image files at any depth; None takes the packaged photographs.
        pixels: Width and height that they are resampled to.
        wanted: Number of photos of each split; where photos are few, a split gets its share of them.
        seed: Seed of the split and of the cut.
    """
    rng = np.random.default_rng(seed)
    sources: list = found(folder) if folder else list(_packaged_tiles(pixels))
    order = rng.permutation(len(sources))
    splits, start = {}, 0
    for name in ("test", "validation", "train", "generator"):
        count = min(wanted[name], int(SHARES.get(name, 1) * len(sources)))
        chosen = [sources[index] for index in order[start : start + count]]
        splits[name] = stacked(_resampled(opened(source), pixels, rng) for source in chosen)
        start += count
    return Photos(**splits)


def found(folder: Path) -> list[Path]:
    """Image files below a folder, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def centres(files: Iterable[Path], pixels: int) -> torch.Tensor:
    """Middle `pixels` × `pixels` of each image at its own resolution, which leaves a generator's traces."""
    images = []
    for file in files:
        image = opened(file)
        left, top = (image.width - pixels) // 2, (image.height - pixels) // 2
        images.append(image.crop((left, top, left + pixels, top + pixels)))
    return encoded(stacked(images))


def encoded(images: torch.Tensor) -> torch.Tensor:
    """Images as they come back from a JPEG file; real and generated ones pass the same encoder."""
    decoded = []
    for image in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=JPEG_QUALITY)
        decoded.append(Image.open(file))
    return stacked(decoded)


def stacked(images: Iterable[Image.Image]) -> torch.Tensor:
    """RGB images of one size as `(N, 3, height, width)` in 8 bits."""
    arrays = [np.asarray(image) for image in images]
    if not arrays:
        raise SystemExit("too few photos for all splits; give a folder with more")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def opened(source: Any) -> Image.Image:
    """An RGB image, given as an image, as a path or as an open file."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    return image.convert("RGB")


def _packaged_tiles(pixels: int) -> Iterator[Image.Image]:
    """Cuts two photos of scikit-learn and one of matplotlib into tiles that share no pixel."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    photos.append(opened(Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")))
    for photo in photos:
        for top in range(0, photo.height - pixels + 1, pixels):
            for left in range(0, photo.width - pixels + 1, pixels):
                yield photo.crop((left, top, left + pixels, top + pixels))


def _resampled(image: Image.Image, pixels: int, rng: np.random.Generator) -> Image.Image:
    side = int(KEPT * min(image.size))
    left, top = (int(rng.integers(length - side + 1)) for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    return square.resize((pixels, pixels), Image.Resampling.BICUBIC)
