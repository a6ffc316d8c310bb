"""What there is to see in an adapter's file, as text, in a notebook, and as a picture."""

from __future__ import annotations

import html
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from peft_subspace.tools.inspection import LayerUpdate, Overlap, layer_overlaps, layer_updates
from peft_subspace.tools.plots import draw_plot, save_plot
from peft_subspace.tools.read_adapter import read_adapter
from peft_subspace.tools.tables import aligned


@dataclass
class Inspection:
    """An adapter, and its overlap with another one; `print` shows tables, and a notebook a picture, too.

    Attributes:
        title: What the adapter is, and how large.
        updates: Update of each module.
        other: What the other adapter is; None without one.
        overlaps: Overlap of the updates of each module; None without another adapter.
    """

    title: str
    updates: dict[str, LayerUpdate]
    other: str | None = None
    overlaps: dict[str, Overlap] | None = None

    def __str__(self) -> str:
        text = f"{self.title}\n\n{aligned(self._update_rows())}"
        return text + f"\n\noverlap with {self.other}\n\n{aligned(self._overlap_rows())}" * bool(self.other)

    def _repr_html_(self) -> str:
        parts = [_html_lines(self.title), _html_table(self._update_rows())]
        if self.other:
            parts += [_html_lines(f"overlap with {self.other}"), _html_table(self._overlap_rows())]
        picture = io.StringIO()
        try:
            draw_plot(self.updates, self.overlaps).savefig(picture, format="svg")
        except ImportError:
            return "".join(parts)  # matplotlib is optional
        return "".join([*parts, picture.getvalue()[picture.getvalue().index("<svg") :]])

    def save_plot(self, path: str | Path) -> None:
        """Draw spectra and overlaps into a file, whose suffix names the format.

        Raises:
            ImportError: If matplotlib is missing.
        """
        save_plot(path, self.updates, self.overlaps)

    def _update_rows(self) -> list[list[str]]:
        rows = [["module", "rank", "trainable", "norm of update", "effective rank", "largest singular value"]]
        for name, update in self.updates.items():
            trained = f"{update.trained:,}" if update.trained else "shared"
            sizes = (f"{update.norm:.4g}", f"{update.effective_rank:.2f}", f"{update.singular_values[0]:.4g}")
            rows.append([name, str(update.rank), trained, *sizes])
        return rows

    def _overlap_rows(self) -> list[list[str]]:
        rows = [["module", "cosine", "outputs", "inputs"]]
        for name, overlap in (self.overlaps or {}).items():
            values = (overlap.cosine, overlap.outputs, overlap.inputs)
            rows.append([name, *("-" if math.isnan(value) else f"{value:.4f}" for value in values)])
        return rows


def inspect(
    adapter: str | Path,
    other: str | Path | None = None,
    *,
    base: str | Path | nn.Module | None = None,
    **kwargs: Any,
) -> Inspection:
    """Look into a saved adapter: ranks, norms and spectra of its updates, and its overlap with another one.

    No weight of the base model is loaded, only its config.

    Args:
        adapter: Folder of the adapter, or its id on the Hub.
        other: Adapter of the same base model to compare it with.
        base: Folder or id of the base model, or the model; by default the one that the adapter names.
        kwargs: Where the Hub has `adapter`: `revision`, `subfolder`, `token`, `cache_dir`.

    Returns:
        What was found; `print` shows it as tables.

    Raises:
        FileNotFoundError: If a folder has no adapter.
        ValueError: If an adapter is broken or does not fit the base model, or the base model's config cannot
            be read.
    """
    model = read_adapter(adapter, base, **kwargs)
    found = Inspection(_title(adapter, model), layer_updates(model))
    if other is not None:
        second = read_adapter(other, base)
        found.other, found.overlaps = _title(other, second), layer_overlaps(model, second)
    return found


def _title(path: str | Path, model: PeftModel) -> str:
    config: Any = model.peft_config["default"]
    trained = sum(p.numel() for name, p in model.named_parameters() if ".default." in f"{name}.")
    saved = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    ranks = f"r={config.r}" + (f", rank_pattern={config.rank_pattern}" if config.rank_pattern else "")
    return (
        f"{path}: {config.peft_type.value}, {ranks}, on {config.base_model_name_or_path}\n"
        f"{trained:,} trainable parameters, {sum(tensor.numel() for tensor in saved):,} numbers in the file; "
        f"written by peft_subspace {config.peft_subspace_version}, format {config.format_version}"
    )


def _html_lines(text: str) -> str:
    return f"<p>{html.escape(text)}</p>".replace("\n", "<br>")


def _html_table(rows: list[list[str]]) -> str:
    cells = [[html.escape(cell) for cell in row] for row in rows]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[1:])
    return f"<table><tr>{head}</tr>{body}</table>"
