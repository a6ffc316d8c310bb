"""Pictures of the spectra of an adapter's updates, and maps of what each layer has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_subspace.tools.inspection import LayerUpdate, Overlap

_PARTS = 0.0, 1.0, "viridis"

_SMALLEST = 1e-8
"""Part of the largest singular value below which a value is a rounding error and is left out."""


def draw_plot(updates: Mapping[str, LayerUpdate], overlaps: Mapping[str, Overlap] | None = None) -> Any:
    """Figure of the singular values of each module's update and, for two adapters, of their overlap.

    Args:
        updates: Updates by module name.
        overlaps: Overlaps by module name; a heat map has a row for each kind of module and a column for each
            block.

    Raises:
        ImportError: If matplotlib is missing.
    """
    maps = ("cosine", "outputs", "inputs") if overlaps else ()
    figure, axes = _figure(1 + len(maps))
    _draw_spectra(axes[0], updates)
    for part, chart in zip(maps, axes[1:], strict=True):
        values = {name: getattr(overlap, part) for name, overlap in (overlaps or {}).items()}
        limits = (-1.0, 1.0, "coolwarm") if part == "cosine" else _PARTS
        _draw_map(figure, chart, f"overlap: {part}", values, limits)
    return figure


def draw_maps(maps: Mapping[str, Mapping[str, float]]) -> Any:
    """Figure of heat maps, each with a row for each kind of module and a column for each block.

    Args:
        maps: Parts of one, by module name, by the title of their map.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure, axes = _figure(len(maps))
    for (title, values), chart in zip(maps.items(), axes, strict=True):
        _draw_map(figure, chart, title, values, _PARTS)
    return figure


def _figure(charts: int) -> tuple[Any, Any]:
    """A figure with two charts in a row, which is as wide as a notebook."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures are drawn with matplotlib, which is not installed; pip install matplotlib"
        ) from error
    columns, rows = min(charts, 2), -(-charts // 2)
    figure = Figure(figsize=(5.5 * columns, 4.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for spare in axes[charts:]:
        spare.remove()
    return figure, axes[:charts]


def save_plot(
    path: str | Path, updates: Mapping[str, LayerUpdate], overlaps: Mapping[str, Overlap] | None = None
) -> None:
    """Write the figure of `draw_plot` into a file, whose suffix names the format, as in `"adapter.png"`."""
    draw_plot(updates, overlaps).savefig(path)


def _draw_spectra(chart: Any, updates: Mapping[str, LayerUpdate]) -> None:
    """Draw a line for each module, in one color for each kind of module."""
    colors = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(map(_kind, updates)))}
    labels = set(colors)
    for name, update in updates.items():
        kind, largest = _kind(name), float(update.singular_values[0])
        values = [value for value in update.singular_values.tolist() if value > _SMALLEST * largest]
        label = kind if kind in labels else None
        labels.discard(kind)
        chart.plot(range(1, len(values) + 1), values, color=colors[kind], label=label, linewidth=0.8)
    chart.set(xlabel="index", ylabel="singular value of the update", title="spectra")
    if any(update.norm > 0 for update in updates.values()):
        chart.set_yscale("log")
    chart.legend(fontsize="small")


def _draw_map(
    figure: Any, chart: Any, title: str, values: Mapping[str, float], limits: tuple[float, float, str]
) -> None:
    """Draw a heat map of one measure."""
    kinds = list(dict.fromkeys(_kind(name) for name in values))
    blocks = list(dict.fromkeys(_block(name) for name in values))
    grid = [[float("nan")] * len(blocks) for _ in kinds]
    for name, value in values.items():
        grid[kinds.index(_kind(name))][blocks.index(_block(name))] = value
    image = chart.imshow(grid, vmin=limits[0], vmax=limits[1], cmap=limits[2], aspect="auto")
    chart.set(xlabel="block", title=title)
    chart.set_xticks(range(len(blocks)), blocks, rotation=90, fontsize="small")
    chart.set_yticks(range(len(kinds)), kinds, fontsize="small")
    figure.colorbar(image, ax=chart)


def _kind(name: str) -> str:
    """Kind of a module: its name without the numbers of blocks."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _block(name: str) -> str:
    """Block of a module: the numbers in its name."""
    return ".".join(re.findall(r"(?<![^.])\d+(?![^.])", name)) or "-"
