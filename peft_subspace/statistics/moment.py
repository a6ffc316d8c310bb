"""The second moment of rows, whole or as a sketch of given width."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from peft_subspace.core.linalg import gram
from peft_subspace.runtime import distributed as processes


class Rows:
    """Rows `(N, d)` in fp32 or better, and their products, of which several moments may make use."""

    def __init__(self, rows: Tensor) -> None:
        self.matrix = rows if rows.dtype == torch.float64 else rows.float()

    @cached_property
    def product(self) -> Tensor:
        """`XᵀX (d, d)`."""
        return gram(self.matrix)

    @cached_property
    def squares(self) -> Tensor:
        """Squared norms of the columns, `(d,)`."""
        return self.matrix.square().sum(0).double()


@dataclass
class SecondMoment:
    """Sum `XᵀX (d, d)` over rows `X (N, d)`; moments of several data sets add up.

    A sketch is `B (≤ 2 w, d)` with `BᵀB ≼ XᵀX` (frequent directions): directions hold no less of the data
    than the sketch says. Squared norms of columns are exact in any case.

    Attributes:
        squares: Squared norms of the columns of `X`, `(d,)` in double precision: the diagonal of the sum.
        rows: Number of rows.
        width: Width `w` of the sketch; None for the whole sum, 0 for norms of columns alone.
        matrix: The sum, or the sketch; empty where there are norms alone.

    Reference:
        Ghashami et al., "Frequent Directions: Simple and Deterministic Matrix Sketching" (arXiv 1501.01711).
    """

    squares: Tensor
    rows: int
    width: int | None
    matrix: Tensor

    @classmethod
    def empty(cls, size: int, width: int | None = None, device: torch.device | str = "cpu") -> SecondMoment:
        """Moment of no rows."""
        double = torch.float32 if torch.device(device).type == "mps" else torch.float64
        matrix = torch.zeros(size if width is None else 0, size, dtype=torch.float32, device=device)
        return cls(torch.zeros(size, dtype=double, device=device), 0, width, matrix)

    @property
    def size(self) -> int:
        """Length `d` of a row."""
        return len(self.squares)

    @property
    def energy(self) -> float:
        """Sum of all squares, exact for sketches too."""
        squares = self.matrix.diagonal() if self.width is None else self.squares
        return float(squares.double().sum())

    def held_by(self, basis: Tensor) -> float:
        """Sum of the squares of `X K`, for orthonormal columns `K (d, k)`."""
        if self.width is None:
            return float(((self.dense().to(basis.device) @ basis) * basis).sum())
        return float((self._kept().to(basis.device).double() @ basis).square().sum())

    @property
    def column_norms(self) -> Tensor:
        """Norms of the columns of `X`, `(d,)`."""
        return self.squares.sqrt()

    def dense(self) -> Tensor:
        """The sum `(d, d)` in double precision; of a sketch `BᵀB`.

        Raises:
            ValueError: If there are norms of columns alone.
        """
        matrix = self._kept().double()
        return (matrix + matrix.T) / 2 if self.width is None else matrix.T @ matrix

    def add(self, rows: Rows) -> None:
        """Add rows, in place."""
        device = self.squares.device
        self.squares += rows.squares.to(device, self.squares.dtype)
        self.rows += len(rows.matrix)
        if self.width is None:
            self.matrix = self.matrix.to(rows.matrix.dtype).add_(rows.product.to(device))
        elif self.width:
            for chunk in rows.matrix.split(self.width):
                self._append(chunk.to(device))

    def __add__(self, other: SecondMoment) -> SecondMoment:
        """Moment of the rows of both.

        Raises:
            ValueError: If rows have other lengths, or one is a sketch and the other is not.
        """
        if (self.size, self.width) != (other.size, other.width):
            raise ValueError(
                f"moments of {self.size} columns (width={self.width}) and of {other.size} columns "
                f"(width={other.width}) have no sum; gather both from one model with one max_memory"
            )
        device = self.squares.device
        squares, matrix = self.squares + other.squares.to(device), self.matrix.clone()
        result = SecondMoment(squares, self.rows + other.rows, self.width, matrix)
        if self.width is None:
            result.matrix = matrix + other.matrix.to(device)
        elif self.width:
            result._append(other.matrix.to(device))
        return result

    def outside(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues, largest first, and eigenvectors `(d, q)` of the moment of `X (I − K Kᵀ)`.

        Args:
            known: Orthonormal columns `K (d, k)` in double precision.
        """
        if self.width is None:
            matrix = self.dense().to(known.device)
            matrix = matrix - known @ (known.T @ matrix)
            matrix = matrix - (matrix @ known) @ known.T
            values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
            return values.flip(0).clamp(min=0), vectors.flip(1)
        rest = self._kept().to(known.device).double()
        _, values, right = torch.linalg.svd(rest - (rest @ known) @ known.T, full_matrices=False)
        return values.square(), right.T

    def total(self) -> None:
        """Add up over all processes, in place."""
        if processes.world_size() == 1:
            return
        counted = torch.tensor([float(self.rows)], dtype=torch.float64, device=self.squares.device)
        self.rows = int(processes.total(counted))
        processes.total(self.squares)
        if self.width is None:
            processes.total(self.matrix)
        elif self.width:
            own = torch.zeros(2 * self.width, self.size, dtype=self.matrix.dtype, device=self.matrix.device)
            own[: len(self.matrix)] = self.matrix
            parts = [torch.empty_like(own) for _ in range(processes.world_size())]
            dist.all_gather(parts, own)
            self.matrix = own[:0]
            for part in parts:
                self._append(part[part.any(1)])

    def to(self, device: torch.device | str) -> SecondMoment:
        """The same on another device."""
        return SecondMoment(self.squares.to(device), self.rows, self.width, self.matrix.to(device))

    def _kept(self) -> Tensor:
        if self.width == 0:
            raise ValueError("there are norms of columns alone; gather with inputs=True")
        return self.matrix

    def _append(self, rows: Tensor) -> None:
        """Add rows to the sketch, which is cut to `w` rows where it would have more than `2 w`."""
        width = self.width or 0
        self.matrix = torch.cat([self.matrix.to(rows.dtype), rows])
        if len(self.matrix) <= 2 * width:
            return
        stack = self.matrix.double()
        values, vectors = torch.linalg.eigh(stack @ stack.T)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :width]
        kept = (values[:width] - values[width]).clamp(min=0)
        factors = (kept / values[:width].clamp(min=torch.finfo(values.dtype).tiny)).sqrt()
        self.matrix = (factors[:, None] * (vectors.T @ stack)).to(rows.dtype)
