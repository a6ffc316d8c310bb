"""Metrics of a sequence of tasks, from the accuracy on each task after each task.

`R[i][j]` is the accuracy on task `j` after training on task `i`, both counted from 0; `T` tasks make it `T ×
T`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_subspace.runtime.files import atomic_write

Matrix = Sequence[Sequence[float]]


def continual_metrics(accuracies: Matrix, baseline: Sequence[float] | None = None) -> dict[str, float]:
    """Summaries of an accuracy matrix.

    - `average_accuracy`: `1/T Σ_j R[T−1][j]`
    - `backward_transfer`: `1/(T−1) Σ_{j<T−1} (R[T−1][j] − R[j][j])`; negative where tasks are forgotten
    - `forgetting`: `1/(T−1) Σ_{j<T−1} (max_{j≤i<T−1} R[i][j] − R[T−1][j])`
    - `forward_transfer`, given a baseline `b`: `1/(T−1) Σ_{j>0} (R[j−1][j] − b[j])`

    Of a single task, what compares tasks is NaN.

    Args:
        accuracies: The matrix. What lies above the diagonal counts for forward transfer only, and may be NaN.
        baseline: Accuracy on each task of the model before any training.

    Raises:
        ValueError: If the matrix is not square, or the baseline has another length.

    Reference:
        Lopez-Paz and Ranzato (arXiv 1706.08840) for the transfers; Chaudhry et al. (arXiv 1801.10112) for
        forgetting.
    """
    count = len(accuracies)
    if not count or any(len(row) != count for row in accuracies):
        lengths = [len(row) for row in accuracies]
        raise ValueError(
            f"accuracies has {count} rows of lengths {lengths}, but must be square: a row per task "
            "trained on, a column per task tested"
        )
    if baseline is not None and len(baseline) != count:
        raise ValueError(f"baseline has {len(baseline)} entries for {count} tasks; give one for each")
    last = accuracies[-1]
    results = {
        "average_accuracy": _mean(last),
        "backward_transfer": _mean([last[j] - accuracies[j][j] for j in range(count - 1)]),
        "forgetting": _mean(
            [max(accuracies[i][j] for i in range(j, count - 1)) - last[j] for j in range(count - 1)]
        ),
    }
    if baseline is not None:
        results["forward_transfer"] = _mean([accuracies[j - 1][j] - baseline[j] for j in range(1, count)])
    return results


def save_heatmap(accuracies: Matrix, tasks: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draw an accuracy matrix, as a picture in the format that the path's ending names.

    Args:
        accuracies: The matrix; entries that are NaN stay empty.
        tasks: Names of the tasks, in order.
        path: File to write, such as `"accuracies.png"`.
        title: Line above the picture.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there are not as many names as tasks.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "save_heatmap draws with matplotlib, which is not installed; pip install matplotlib"
        ) from error
    if len(tasks) != len(accuracies):
        raise ValueError(f"tasks has {len(tasks)} names for {len(accuracies)} rows; give one for each")
    size = 1.6 + 0.8 * len(tasks)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="accuracy on", ylabel="after training on", title=title)
    figure.colorbar(draw_heatmap(axes, accuracies, tasks), ax=axes)
    with atomic_write(Path(path)) as partial:
        figure.savefig(partial, bbox_inches="tight")  # a title may be wider than the chart


def draw_heatmap(axes: Any, accuracies: Matrix, tasks: Sequence[str], digits: int = 3) -> Any:
    """Draw an accuracy matrix into a chart of matplotlib, and return the image that a color bar is for."""
    image = axes.imshow(accuracies, vmin=0.0, vmax=1.0, cmap="viridis")
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    for i, row in enumerate(accuracies):
        for j, value in enumerate(row):
            if not math.isnan(value):
                color = "white" if value < 0.6 else "black"
                axes.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color=color)
    return image


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
