"""What every source of a merge offers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Source:
    """One thing to merge.

    Attributes:
        name: What reports and errors call it.
        modules: Names of the modules that it changes.
        base: Base model that it names, or None.
        others: What it has besides: heads, biases, token rows.
        embeddings: Those of the modules that are embeddings.
    """

    name: str
    modules: list[str]
    base: str | None = None
    others: dict[str, Tensor] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Factors `(m, r)` and `(r, n, *kernel)` of the update of one module, in fp32."""
        raise NotImplementedError
