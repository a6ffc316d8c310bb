"""Heads for classes, which an adapter trains in the place of the model's own linear one.

A config names and sizes them, `heads={"classifier": {"kind": "grassmann", "classes": 100, "r": 8}}`, so that
a saved adapter finds a place for their tensors again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_subspace.core.validation import check_choice, check_count, check_number, invalid

_STEPS = 300
"""Steps by which vectors are pushed apart where there are more than dimensions."""


class GrassmannHead(nn.Module):
    """A subspace per class: `logit_c = γ ‖P_c x‖ / ‖x‖`, where `P_c` projects on the span of `V_c (in, r)`.

    With the Cholesky factor `L` of `V_cᵀ V_c` it is `γ ‖L⁻¹ V_cᵀ x‖ / ‖x‖`, which depends on the subspace
    alone, whatever basis `V_c` is. So any optimizer will do, with weight decay, in several processes, and
    nothing has to be made orthonormal again. `r` times as many parameters train as in a linear head.

    Args:
        in_features: Size of a feature.
        classes: Number of classes.
        r: Dimension of each subspace, at most `in_features`.
        scale: `γ`.

    Raises:
        ValueError: If `r` exceeds `in_features`.

    Reference:
        Wang et al., "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
        Representation" (arXiv 2308.01547).
    """

    def __init__(self, in_features: int, classes: int, r: int = 8, scale: float = 25.0) -> None:
        super().__init__()
        if r > in_features:
            raise invalid("r", r, f"exceeds in_features={in_features}; lower it")
        self.scale = scale
        self.V = nn.Parameter(torch.empty(classes, in_features, r))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw random subspaces."""
        drawn = torch.randn(self.V.shape, generator=generator)
        self.V.data.copy_(torch.linalg.qr(drawn).Q)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(…, classes)` of features `(…, in)`, computed in fp32 at least."""
        dtype = torch.promote_types(self.V.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            bases, unit = self.V.to(dtype), F.normalize(x.to(dtype), dim=-1)
            gram = bases.mT @ bases
            ridge = torch.finfo(dtype).eps * gram.diagonal(dim1=1, dim2=2).sum(1)
            eye = torch.eye(gram.shape[1], dtype=dtype, device=x.device)
            factor = torch.linalg.cholesky(gram + ridge[:, None, None] * eye)
            rows = torch.einsum("cdr,nd->crn", bases, unit.flatten(0, -2))
            squares = torch.linalg.solve_triangular(factor, rows, upper=False).square().sum(1)
            logits = self.scale * (squares + 1e-12).sqrt().T  # the root has no gradient at zero
        return logits.reshape(*x.shape[:-1], -1).to(x.dtype)


class EquiangularHead(nn.Module):
    """A fixed vector per class: `logit_c = γ d_cᵀ u / ‖u‖`, `u (dimension,)` a trained linear map of `x`.

    Up to `dimension` vectors are orthonormal; further ones are pushed apart. What trains does not depend on
    the number of classes, so that `grow` adds some at any time, and leaves the vectors of the others alone.

    Args:
        in_features: Size of a feature.
        classes: Number of classes.
        dimension: Size of the vectors; `in_features` if None.
        scale: `γ`.

    Reference:
        Shen et al., "Equiangular Basis Vectors" (arXiv 2303.11637).
    """

    vectors: Tensor

    def __init__(
        self, in_features: int, classes: int, dimension: int | None = None, scale: float = 1 / 0.07
    ) -> None:
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(in_features, dimension or in_features)
        self.register_buffer("vectors", torch.empty(classes, dimension or in_features))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the map, and make the vectors, which are the same for every seed."""
        bound = self.linear.in_features**-0.5
        for parameter in self.linear.parameters():
            parameter.data.uniform_(-bound, bound, generator=generator)
        self.vectors.copy_(_extended(self.vectors[:0].cpu(), len(self.vectors)))

    def grow(self, classes: int) -> None:
        """Add vectors up to a number of classes.

        Raises:
            ValueError: If there are more already.
        """
        if classes < len(self.vectors):
            raise invalid("classes", classes, f"must be at least {len(self.vectors)}, the number there is")
        self.vectors = _extended(self.vectors.cpu(), classes).to(self.vectors)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(…, classes)` of features `(…, in)`."""
        unit = F.normalize(self.linear(x.to(self.linear.weight.dtype)), dim=-1)
        return (self.scale * F.linear(unit, self.vectors.to(unit.dtype))).to(x.dtype)


def _extended(known: Tensor, count: int) -> Tensor:
    """Unit vectors `(count, d)` of which the first are given: orthonormal, or as far apart as steps get."""
    new = torch.randn(count - len(known), known.shape[1], generator=torch.Generator().manual_seed(count))
    if count <= known.shape[1]:
        return torch.cat([known, torch.linalg.qr(torch.cat([known, new]).T).Q.T[len(known) :]])
    if not len(known):
        known, new = _extended(known, known.shape[1]), new[known.shape[1] :]
    new = F.normalize(new, dim=1)
    for _ in range(_STEPS):
        everything = torch.cat([known, new])
        cosines = new @ everything.T
        cosines[:, len(known) :].fill_diagonal_(0.0)
        largest = cosines.abs().amax(1, keepdim=True).clamp_min(1e-12)
        new = F.normalize(new - 0.05 * (cosines / largest) ** 9 @ everything, dim=1)
    return torch.cat([known, new])


HEADS: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "grassmann": (GrassmannHead, ("r",)),
    "equiangular": (EquiangularHead, ("dimension",)),
}
"""By kind the class, and what may be said of its size beside `classes` and `scale`."""


def check_heads(heads: Any) -> None:
    """Raise unless a config's `heads` name heads and say their sizes.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If it is of no size that a head could have, or of no kind.
    """
    if not isinstance(heads, dict) or not all(isinstance(entry, dict) for entry in heads.values()):
        example = "such as {'classifier': {'kind': 'grassmann', 'classes': 10}}"
        raise invalid("heads", heads, f"must map names of modules to kinds and sizes, {example}", TypeError)
    for name, entry in heads.items():
        kind = entry.get("kind")
        check_choice(f"heads[{name!r}]['kind']", kind, sorted(HEADS))
        sizes = ("classes", *HEADS[kind][1])
        unknown = sorted(map(str, set(entry) - {"kind", "scale", *sizes}))
        if unknown or "classes" not in entry:
            raise invalid(
                f"heads[{name!r}]", entry, f"must have 'classes', and may have 'scale' and {sizes[1:]}"
            )
        for size in sizes:
            if entry.get(size) is not None:
                check_count(f"heads[{name!r}][{size!r}]", entry[size], maximum=2**20)
        if "scale" in entry:
            check_number(f"heads[{name!r}]['scale']", entry["scale"])


def make_head(entry: Mapping[str, Any], in_features: int) -> Any:
    """Head that an entry of `heads` asks for, uninitialized."""
    options = {name: value for name, value in entry.items() if name != "kind"}
    return HEADS[entry["kind"]][0](in_features, **options)
