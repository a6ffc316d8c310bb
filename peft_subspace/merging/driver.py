"""Merging module by module: read, merge, report, write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_subspace.core.errors import error_context
from peft_subspace.core.linalg import local_generator
from peft_subspace.core.names import in_base
from peft_subspace.core.validation import invalid
from peft_subspace.merging.checkpoints import write_merged
from peft_subspace.merging.computing import TILE_BYTES, check, compute
from peft_subspace.merging.cutting import ModuleReport, check_cut, cut
from peft_subspace.merging.output import add_lora, save_lora
from peft_subspace.merging.source import Source
from peft_subspace.merging.sources import check_finite
from peft_subspace.merging.stack import Stack
from peft_subspace.runtime.progress import bar
from peft_subspace.runtime.progress import progress as shown


@dataclass
class Merge:
    """A merge that is computed module by module when it is written.

    Attributes:
        sources: What is merged.
        method: Name of the method.
        weights: Weights of the sources.
        scale: Factor of the merged update.
        space: `"weight"`, or `"aligned"` for functions of entries in the common singular basis.
        seed: Seed of what is drawn.
        options: Options of the method.
        report: What became of each module, filled by the last output.
        kept: Source of which the result keeps what is no update; None for no source.
        rows: `"error"`, or `"common"` where updates of different rows are cut to the rows that all have.
    """

    sources: list[Source]
    method: str
    weights: list[float]
    scale: float = 1.0
    space: Literal["weight", "aligned"] = "weight"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    tile_bytes: int = TILE_BYTES
    base: str | Path | nn.Module | None = None
    kept: Source | None = None
    rows: Literal["error", "common"] = "error"
    report: dict[str, ModuleReport] = field(default_factory=dict)

    @property
    def others(self) -> dict[str, Tensor]:
        """Tensors besides the updates that the result keeps: heads, biases, token rows."""
        return {} if self.kept is None else self.kept.others

    def transposed(self, module: str) -> bool:
        """Whether files have the weight with its outputs in columns, as the adapters on it say."""
        known = (source for source in self.sources if source.fan_in_fan_out)
        return any(module in source.modules and module not in source.embeddings for source in known)

    @property
    def modules(self) -> list[str]:
        """Modules that any of the sources changes."""
        return list(dict.fromkeys(module for source in self.sources for module in source.modules))

    def stacks(self) -> Iterator[tuple[str, Stack]]:
        """Updates of all sources, module by module."""
        for module in self.modules:
            yield module, self.stack(module)

    def stack(self, module: str) -> Stack:
        """Updates of all sources on one module."""
        with error_context(module):
            return self._stack(module)[0]

    def check(self) -> None:
        """Raise if an option does not fit the first module."""
        for module in self.modules[:1]:
            stack, (generators, options) = self.stack(module), self._given(module)
            with error_context(module):
                check(stack, self.method, self.weights, generators, options)

    def update(self, module: str) -> Tensor:
        """The merged update of one module, `(m, n)` without cutting."""
        with error_context(module):
            merged = self._merged(self._stack(module)[0], module)
        return merged if isinstance(merged, Tensor) else merged[0] @ merged[1]

    def factors(
        self, module: str, rank: int | None = None, energy: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Factors `(m, k)` and `(k, n, *kernel)` of one module, cut to a rank or to a part of the energy.

        Raises:
            ValueError: If the merged update has no exact factors and neither is given.
        """
        with error_context(module):
            stack, kernel = self._stack(module)
            merged = self._merged(stack, module)
        left, right, error, norm = cut(merged, rank, energy, self.method)
        gram = stack.gram().double()
        lengths = gram.diagonal().clamp(min=0).sqrt()
        self.report[module] = ModuleReport(left.shape[1], norm, error, gram / lengths[:, None] / lengths)
        return left, right.reshape(-1, *kernel)

    def pairs(
        self, rank: int | None = None, energy: float | None = None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Factors of all modules, one after the other."""
        self.report.clear()
        for module in shown(self.modules, len(self.modules), "merging"):
            yield (module, *self.factors(module, rank, energy))

    def to_lora(self, directory: str | Path, rank: int | None = None, energy: float | None = None) -> None:
        """Write the merge as a LoRA of PEFT, with a card that names sources, weights, method and seed.

        Args:
            directory: Folder to write.
            rank: Rank to cut to; None keeps the exact sum where there is one.
            energy: Part of the squared norm to keep in each module, in place of a rank.
        """
        check_cut(rank, energy)
        save_lora(self, Path(directory), list(self.pairs(rank, energy)))

    def add_to(
        self, model: nn.Module, adapter_name: str, rank: int | None = None, energy: float | None = None
    ) -> nn.Module:
        """Add the merge to a model as a LoRA; returns the `PeftModel`."""
        check_cut(rank, energy)
        return add_lora(self, model, adapter_name, list(self.pairs(rank, energy)))

    def to_model(self, directory: str | Path) -> None:
        """Write the base model plus the merged update, nothing cut; after a kill, go on where it stopped.

        Raises:
            ValueError: If no base was given, or the disk has no room.
        """
        if self.base is None or isinstance(self.base, nn.Module):
            raise invalid("base", self.base, "must be the folder of the base model; give it to merge()")
        modules = set(self.modules)
        with bar(len(modules), "merging") as counted:

            def update(name: str) -> Tensor | None:
                counted.update(name in modules)
                if name not in modules:
                    return None
                return self.update(name).T if self.transposed(name) else self.update(name)

            others = {in_base(name): tensor for name, tensor in self.others.items()}
            write_merged(Path(self.base), Path(directory), update, others, self.recipe)

    @property
    def recipe(self) -> str:
        """What is merged and how, in words."""
        names = [source.name for source in self.sources]
        how = (self.method, self.weights, self.scale, self.space, self.seed, sorted(self.options.items()))
        return f"{names} on {self.base}: {how}"

    def _stack(self, module: str) -> tuple[Stack, tuple[int, ...]]:
        """Updates of all sources, zero where one has none, and the axes of the right factors."""
        pairs: list[tuple[Tensor, Tensor] | None] = []
        for source in self.sources:
            pair = source.pair(module) if module in source.modules else None
            if pair is not None:
                check_finite(source, pair)
                if source.stored and self.transposed(module):
                    pair = pair[1].T, pair[0].T
            pairs.append(pair)
        left, right = next(pair for pair in pairs if pair is not None)
        if self.rows == "common":
            rows = min(len(pair[0]) for pair in pairs if pair is not None)
            left, pairs = left[:rows], [pair and (pair[0][:rows], pair[1]) for pair in pairs]
        for source, pair in zip(self.sources, pairs, strict=True):
            if pair is not None and (len(pair[0]), pair[1].shape[1:]) != (len(left), right.shape[1:]):
                shapes = (len(pair[0]), *pair[1].shape[1:]), (len(left), *right.shape[1:])
                raise ValueError(
                    f"{source.name} is for a weight of shape {shapes[0]}, and another source for one of "
                    f"{shapes[1]}; of different base models (rows='common' if tokens were added)"
                )
        zero = (left.new_zeros(len(left), 1), right.new_zeros(1, *right.shape[1:]))
        known = [zero if pair is None else pair for pair in pairs]
        return Stack([p[0] for p in known], [p[1].flatten(1) for p in known]), tuple(right.shape[1:])

    def _merged(self, stack: Stack, module: str) -> tuple[Tensor, Tensor] | Tensor:
        generators, options = self._given(module)
        return compute(
            stack, self.method, self.weights, generators, self.scale, self.space, self.tile_bytes, options
        )

    def _given(self, module: str) -> tuple[list[torch.Generator], dict[str, Any]]:
        """Generators and options of one module."""
        generators = [local_generator(self.seed, module, source.name) for source in self.sources]
        options = {
            key: value[module] if isinstance(value, dict) else value for key, value in self.options.items()
        }
        return generators, options
