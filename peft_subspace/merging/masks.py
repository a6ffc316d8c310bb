"""Checkpoints kept as one shared update and a bit per weight and source, from which each is made again.

TALL-masks keep `m_t = [|τ_t| > λ |τ − τ_t|]` beside the sum `τ` of all updates, and give `θ_0 + m_t ⊙ τ`.
EMR keeps `m_t = [τ_t τ > 0]` beside the elected `τ`, and gives `θ_0 + s_t m_t ⊙ τ` with the scale
`s_t = Σ |τ_t| / Σ |m_t ⊙ τ|`, over all weights. A module `(m, n)` takes `4 m n + T m n / 8` bytes in place
of `4 T m n`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_subspace.core.names import in_base
from peft_subspace.core.validation import check_choice, check_number, invalid
from peft_subspace.merging.checkpoints import write_merged
from peft_subspace.merging.driver import Merge
from peft_subspace.merging.prepare import merge
from peft_subspace.runtime.progress import progress

_INDEX = "masks.json"
_SHARED = {"tall": "task_arithmetic", "emr": "emr"}


def compress(
    sources: Sequence[Any],
    directory: str | Path,
    method: Literal["tall", "emr"] = "tall",
    *,
    base: str | Path,
    threshold: float = 0.4,
) -> Compressed:
    """Write several checkpoints as a shared update and masks.

    Args:
        sources: Folders of checkpoints.
        directory: Folder to write, which must not exist.
        method: `"tall"`, or `"emr"`, which needs no threshold.
        base: Folder of the base model.
        threshold: `λ` of TALL-masks, 0.2 to 0.6 in the paper, for the smaller the more weights of a source.

    Raises:
        ValueError: If the folder exists, or adapters take less as they are.

    Reference:
        Wang et al. (arXiv 2405.07813) for TALL-masks; Huang et al. (arXiv 2405.17461) for EMR.
    """
    check_choice("method", method, _SHARED)
    check_number("threshold", threshold, minimum=0.0)
    folder = Path(directory).absolute()
    if folder.exists():
        raise invalid("directory", str(directory), "exists already; choose a new folder")
    made = merge(sources, _SHARED[method], base=base, others="drop")
    _check_worth(made)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        sums = torch.zeros(2, len(made.sources), dtype=torch.float64)
        for number, module in enumerate(progress(made.modules, len(made.modules), "compressing")):
            sums += _write_module(made, module, partial / f"{number:05}.safetensors", method, threshold)
        for number, source in enumerate(made.sources):
            others = {in_base(name): tensor.contiguous() for name, tensor in source.others.items()}
            save_file(others, partial / f"others-{number}.safetensors")
        scales = (
            torch.where(sums[1] > 0, sums[0] / sums[1], 1.0)
            if method == "emr"
            else sums.new_ones(len(sums[0]))
        )
        about = {"method": method, "base": str(base), "modules": made.modules}
        names = {source.name: scale for source, scale in zip(made.sources, scales.tolist(), strict=True)}
        (partial / _INDEX).write_text(json.dumps({**about, "sources": names}, indent=1))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Compressed.open(folder)


@dataclass
class Compressed:
    """Checkpoints that `compress` has written.

    Attributes:
        folder: Where they are.
        method: `"tall"` or `"emr"`.
        base: Folder of the base model.
        sources: Scale of the masked update by the name of the source.
        modules: Modules that any of them changes.
    """

    folder: Path
    method: str
    base: str
    sources: dict[str, float]
    modules: list[str]

    @classmethod
    def open(cls, folder: str | Path) -> Compressed:
        """Open a folder."""
        found = json.loads((Path(folder) / _INDEX).read_text())
        return cls(Path(folder), **found)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def update(self, source: str, module: str) -> Tensor:
        """The update `(m, n)` of one source on one module."""
        tensors = load_file(self.folder / f"{self.modules.index(module):05}.safetensors")
        shared = tensors["shared"]
        mask = unpack(tensors[f"mask-{self._number(source)}"], shared.numel()).view_as(shared)
        return self.sources[source] * shared * mask

    def to_model(self, source: str, directory: str | Path) -> None:
        """Write one source as a checkpoint again.

        Raises:
            ValueError: If there is no source of the name.
        """
        others = load_file(self.folder / f"others-{self._number(source)}.safetensors")
        modules = set(self.modules)

        def update(name: str) -> Tensor | None:
            return self.update(source, name) if name in modules else None

        recipe = f"{source} of {self.folder}"
        write_merged(Path(self.base), Path(directory), update, others, recipe)

    def _number(self, source: str) -> int:
        check_choice("source", source, self.sources)
        return list(self.sources).index(source)


def pack(mask: Tensor) -> Tensor:
    """Booleans as bits, eight to a byte, the first one lowest; the last byte is filled up with zeros."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` booleans of bits."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[:count].bool()


def _write_module(made: Merge, module: str, path: Path, method: str, threshold: float) -> Tensor:
    """Write the shared update and masks of one module; returns `Σ |τ_t|` and `Σ |m_t ⊙ τ|`, `(2, T)`."""
    shared, stack = made.update(module), made.stack(module)
    tensors, sums = {"shared": shared.contiguous()}, []
    for number in range(len(stack)):
        tau = stack.dense(number)
        mask = tau * shared > 0 if method == "emr" else tau.abs() > threshold * (shared - tau).abs()
        tensors[f"mask-{number}"] = pack(mask)
        sums.append([float(tau.double().abs().sum()), float((shared * mask).double().abs().sum())])
    save_file(tensors, path)
    return torch.tensor(sums, dtype=torch.float64).T


def _check_worth(made: Merge) -> None:
    """Raise if the sources are adapters that take less than masks."""
    factors, weights = 0, 0
    for _, stack in made.stacks():
        m, n = stack.shape
        factors += sum(stack.ranks) * (m + n)
        weights += m * n
    bits = weights * len(made.sources)
    if not any(source.stored for source in made.sources) and 16 * factors < bits:
        raise ValueError(
            f"the factors of the adapters take {2 * factors:,} bytes in bf16, and their masks alone "
            f"{bits // 8:,}; keep the adapters: masks pay for checkpoints, or above rank m n / (16 (m + n))"
        )
