"""Statistics of a model's layers: added up, written to a file and read from one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_subspace.core.errors import error_context
from peft_subspace.core.state import check_values_of
from peft_subspace.runtime.files import atomic_write
from peft_subspace.statistics.moment import SecondMoment
from peft_subspace.tuner.source import opened

INPUTS, OUTPUT_GRADIENTS, GRADIENTS = KINDS = ("inputs", "output_gradients", "gradients")
"""Rows of inputs; rows of gradients of outputs; columns of gradients of the weight, one for each batch."""

_FORMAT = "peft_subspace.statistics/1"
_SYMMETRIC = 1e-3


@dataclass
class Statistics:
    """Second moments of the layers of a model, by module name.

    `a + b` are those of both data sets together; of moments that are no sketches the sum is exact, whether
    it is over batches, tasks or clients, and that is all that clients have to send.

    Attributes:
        inputs: Moments `XᵀX (n, n)` of the inputs `X (N, n)`.
        output_gradients: Moments `gᵀg (m, m)` of the gradients `g (N, m)` of outputs.
        gradients: Moments `Σ_b G_b G_bᵀ (m, m)` of the weight's mean gradient `G_b (m, n)` in each batch.
    """

    inputs: dict[str, SecondMoment] = field(default_factory=dict)
    output_gradients: dict[str, SecondMoment] = field(default_factory=dict)
    gradients: dict[str, SecondMoment] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """Names of the layers."""
        return list(dict.fromkeys(name for kind in KINDS for name in getattr(self, kind)))

    def moment(self, kind: str, name: str, size: int) -> SecondMoment:
        """Return the moment of one layer, whose size is known.

        Raises:
            ValueError: If there is none, or it is of another size.
        """
        found, rows = getattr(self, kind), kind.replace("_", " ")
        if name not in found:
            flag = INPUTS if kind == INPUTS else GRADIENTS
            raise ValueError(
                f"the statistics have no {rows} of {name}, but of {len(found)} other layers; gather them on "
                f"this model, with {flag}=True, or leave the layer out"
            )
        if found[name].size != size:
            raise ValueError(
                f"the statistics of {name} are of {found[name].size} {rows}, and the layer has {size}; "
                "gather them on this model"
            )
        return found[name]

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both data sets together.

        Raises:
            ValueError: If they are of other layers, or one has sketches and the other has not.
        """
        result = Statistics()
        for kind in KINDS:
            mine, theirs = getattr(self, kind), getattr(other, kind)
            if mine.keys() != theirs.keys():
                raise ValueError(
                    f"{kind} of {min(mine.keys() ^ theirs.keys())!r} are in one of the statistics only; add "
                    "statistics of one model, gathered with the same arguments"
                )
            for name, moment in mine.items():
                with error_context(name):
                    getattr(result, kind)[name] = moment + theirs[name]
        return result

    def save(self, path: str | Path) -> None:
        """Write all to a safetensors file, which appears when it is complete."""
        tensors, about = {}, {}
        for kind in KINDS:
            for name, moment in getattr(self, kind).items():
                key = f"{kind}/{name}"
                about[key] = [moment.rows, moment.width]
                tensors[f"{key}/squares"] = moment.squares.cpu().contiguous()
                tensors[f"{key}/matrix"] = moment.matrix.cpu().contiguous()
        with atomic_write(Path(path)) as partial:
            save_file(tensors, partial, {"format": "pt", "kind": _FORMAT, "moments": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` has written; the file may come from a stranger.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no file of statistics, is cut off, or has values that no data could give.
        """
        result = cls()
        with opened(Path(path)) as file:
            about = _about(path, file.metadata() or {})
            found = set(file.keys())
            for key, (rows, width) in about.items():
                kind, _, name = key.partition("/")
                missing = {f"{key}/squares", f"{key}/matrix"} - found
                if missing:
                    raise ValueError(f"{path} lacks {min(missing)}; save the statistics again")
                squares, matrix = (file.get_tensor(f"{key}/{part}") for part in ("squares", "matrix"))
                with error_context(f"{path}: {key}"):
                    getattr(result, kind)[name] = _checked(SecondMoment(squares, rows, width, matrix))
        return result


def grams(statistics: Sequence[Statistics]) -> dict[str, list[Tensor]]:
    """Matrices `XᵀX` of each layer's inputs, one for each of some tasks: `grams` of the merge `"regmean"`.

    Raises:
        ValueError: If the statistics are of other layers.
    """
    first = statistics[0].inputs
    for other in statistics[1:]:
        if other.inputs.keys() != first.keys():
            raise ValueError("the statistics are of different layers; gather them from models of one kind")
    return {name: [one.inputs[name].dense() for one in statistics] for name in first}


def _about(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Rows and width of each moment, as the header of a file has them."""
    if metadata.get("kind") != _FORMAT:
        raise ValueError(f"{path} is no file of statistics; give one that Statistics.save has written")
    try:
        about = json.loads(metadata["moments"])
        good = all(
            key.partition("/")[0] in KINDS
            and type(rows) is int
            and rows > 0
            and (width is None or (type(width) is int and width >= 0))
            for key, (rows, width) in about.items()
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({error}); save the statistics again") from error
    if not good:
        raise ValueError(f"{path} has a header with impossible numbers; save the statistics again")
    return about


def _checked(moment: SecondMoment) -> SecondMoment:
    """The moment, if some data could have it."""
    squares, matrix, width = moment.squares, moment.matrix, moment.width
    if squares.ndim != 1 or matrix.ndim != 2 or matrix.shape[1] != len(squares):
        raise ValueError(f"shapes {tuple(squares.shape)} and {tuple(matrix.shape)} do not fit each other")
    if len(matrix) != len(squares) if width is None else len(matrix) > 2 * width:
        raise ValueError(f"{len(matrix)} rows are no moment of width {width}")
    check_values_of("squares", squares, torch.float64)
    check_values_of("matrix", matrix, matrix.dtype if matrix.dtype.is_floating_point else torch.float32)
    diagonal = (matrix.diagonal() if width is None else matrix.square().sum(0)).double()
    limit = _SYMMETRIC * squares.sum().clamp(min=0)
    wrong = (squares < 0).any() or (diagonal > squares + limit).any()
    if width is None:
        wrong = wrong or (diagonal - squares).abs().max() > limit or (matrix - matrix.T).abs().max() > limit
    if wrong:
        raise ValueError("no data have this second moment; the file is damaged, save the statistics again")
    return moment
