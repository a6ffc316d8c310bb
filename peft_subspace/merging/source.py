"""What every source of a merge offers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Source:
    """One thing to merge.

    Attributes:
        name: What reports and errors call it.
        modules: Names of the modules that it changes.
        base: Base model that it names, or None.
        revision: Revision of the base model that it names, or None.
        fingerprints: Fingerprints of the base weights that it belongs to, by module.
        others: What it has besides: heads, biases, token rows.
        stored: Whether pairs are of the weight as a file has it, for which Conv1D has its outputs in columns.
        fan_in_fan_out: Whether its modules are such.
        loads: Fields of a LoRA's config under which PEFT loads these; None if no LoRA can hold them.
        embeddings: Those of the modules that are embeddings.
    """

    name: str
    modules: list[str]
    base: str | None = None
    others: dict[str, Tensor] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    loads: dict[str, Any] | None = None
    stored: bool = False
    fan_in_fan_out: bool = False
    revision: str | None = None
    fingerprints: dict[str, Tensor] = field(default_factory=dict)

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Factors `(m, r)` and `(r, n, *kernel)` of the update of one module, in fp32.

        Rows are outputs, and of an embedding the vocabulary.
        """
        raise NotImplementedError
