"""Each method's ΔW from its definition: loops in double precision, nothing shared with the package.

Gradients flow through the tensor versions, so that they also tell what every parameter's gradient has to be.
"""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from torch import Tensor, nn


def flora(delta: nn.Module, config) -> Tensor:
    """s · Σ_abcd G[a, b, c, d] · A1[:, a] ⊗ A2[:, b] ⊗ A3[:, c] ⊗ A4[:, d], as `(out, in, *kernel)`."""
    tensors = {name: p.double() for name, p in delta.named_parameters()}
    core = tensors.pop("core")
    modes = [tensors.pop(f"mode_factor_{n}") for n in range(core.ndim)]
    assert not tensors, f"tensors that are not in the equation: {sorted(tensors)}"
    total = core.new_zeros([len(mode) for mode in modes])
    for index in product(*(range(size) for size in core.shape)):
        term = core[index]
        for mode, rank in zip(modes, index, strict=True):
            term = term[..., None] * mode[:, rank]
        total = total + term
    return (flora_scale(config) * total).transpose(0, 1)


def flora_entries(core: Tensor, modes: list[Tensor], scale: float) -> Tensor:
    """The same, entry by entry on Python's own floats."""
    values = core.double().tolist()
    columns = [mode.double().tolist() for mode in modes]
    shape = [len(mode) for mode in columns]
    entries = torch.zeros(shape, dtype=torch.float64)
    for entry in product(*(range(size) for size in shape)):
        total = 0.0
        for index in product(*(range(size) for size in core.shape)):
            value = values
            for i in index:
                value = value[i]
            total += value * prod(columns[n][entry[n]][index[n]] for n in range(len(index)))
        entries[entry] = scale * total
    return entries.transpose(0, 1)


def flora_scale(config) -> float:
    if not isinstance(config.scaling, str):
        return config.scaling
    return config.alpha / (config.r if isinstance(config.r, int) else config.r[0])


def mos(delta: nn.Module, config) -> Tensor:
    """(α / r) Σ_j b_j ⊗ a_j, every vector put together shard by shard, as `(out, in, *kernel)`."""
    pool_a, pool_b = (pool.double() for pool in delta.shared_tensors.pair(delta.spec.group))
    rows_a, rows_b = delta.index_A.tolist(), delta.index_B.tolist()
    out, *rest = delta.shape.dims
    shards_a, shards_b = prod(rest) // pool_a.shape[1], out // pool_b.shape[1]
    rank = len(rows_a) // shards_a
    assert len(rows_b) == rank * shards_b
    total = pool_a.new_zeros(out, prod(rest))
    for j in range(rank):
        a = torch.cat([pool_a[row] for row in rows_a[j * shards_a : (j + 1) * shards_a]])
        b = torch.cat([pool_b[row] for row in rows_b[j * shards_b : (j + 1) * shards_b]])
        total = total + torch.outer(b, a)
    return (config.alpha / config.r * total).reshape(out, *rest)


def lora_sb(delta: nn.Module, config) -> Tensor:
    """Σ_ab R[a, b] · B[:, a] ⊗ A[b], as `(out, in, *kernel)`."""
    B, R, A = delta.B.double(), delta.R.double(), delta.A.double()
    assert set(delta.state_dict()) == {"A", "B", "R"}, "tensors that are not in the equation"
    total = B.new_zeros([len(B), *A.shape[1:]])
    for a, b in product(range(len(R)), repeat=2):
        total = total + R[a, b] * torch.tensordot(B[:, a], A[b], dims=0)
    return as_fast_as_lora(config, len(B), R.numel()) * total


def as_fast_as_lora(config, out: int, squared_speed: float) -> float:
    """Number by which an update is scaled to move as LoRA does: `8 · out · in · 1/(3 in)` in its square."""
    return (8 * out / 3 / squared_speed) ** 0.5 if config.scaling == "auto" else config.scaling


def composition(delta: nn.Module, config) -> Tensor:
    """`Σ_t c_t L_t R_t`, component by component, and masks of rows, components and columns, or of entries."""
    total, start = torch.zeros(delta.shape.dims, dtype=torch.float64), 0
    tensors = dict(delta.named_parameters())
    masks = {name: relaxed(x, config.temperature) for name, x in tensors.items() if name != "coefficients"}
    components = masks.pop("mask_rank", torch.ones(delta.spec.rank, dtype=torch.float64))
    for c, rank in zip(delta.coefficients.double(), delta.ranks, strict=True):
        for j in range(start, start + rank):
            outer = torch.outer(delta.left[:, j].double(), delta.right[j].double().flatten())
            total = total + c * components[j] * outer.reshape(delta.shape.dims)
        start += rank
    if "mask_out" in masks:
        rows = [m * row for m, row in zip(masks.pop("mask_out"), total, strict=True)]
        total = torch.stack(rows) * masks.pop("mask_in")
    total = total * masks.pop("mask_entries", 1.0)
    assert not masks, f"tensors that are not in the equation: {sorted(masks)}"
    return total


def relaxed(logits: Tensor, temperature: float, u: Tensor | None = None) -> Tensor:
    """`1 / (1 + exp(−(x + log(u / (1 − u))) / temperature))`, divided by its mean; `u = 1/2` if not given."""
    x = logits.double()
    u = torch.full_like(x, 0.5) if u is None else u.double()
    values = 1 / (1 + (-(x + (u / (1 - u)).log()) / temperature).exp())
    return values * values.numel() / values.sum()


def continual_svd(delta: nn.Module, config) -> Tensor:
    """Complements written out as matrices and projectors as `H Hᵀ`, from what the delta keeps."""
    out, *rest = delta.shape.dims
    (m, n), k = (out, prod(rest)), delta.directions
    trained = {name: p.double() for name, p in delta.named_parameters()}
    sides = {name: b.double() for name, b in delta.named_buffers() if name != "fingerprint"}
    eye_m, eye_n = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    if config.r is None:
        U, V = (_complement(sides[name], k) if name in sides else None for name in "UV")
        if config.constraint == "core":
            head, tail = _both_bases(sides["U"], k)
            total = tail @ trained.pop("Z1") + head @ trained.pop("Z2") @ V.T
        else:
            left, right = eye_m if U is None else U, eye_n if V is None else V
            total = left @ trained.pop("Z") @ right.T
    else:
        keeps = {
            name: _projector(sides[name], k) if name in sides else eye
            for name, eye in (("U", eye_m), ("V", eye_n))
        }
        if config.constraint == "core":
            total = keeps["U"] @ trained.pop("B1") @ trained.pop("A1")
            total = total + trained.pop("B2") @ trained.pop("A2") @ keeps["V"]
        else:
            total = keeps["U"] @ trained.pop("B") @ trained.pop("A") @ keeps["V"]
    assert not trained, f"tensors that are not in the equation: {sorted(trained)}"
    allowed = m * n - (m * k + n * k - k * k)  # numbers that the constraint leaves free
    allowed += {"both": 0, "input": n * k - k * k, "output": m * k - k * k}.get(
        config.constraint, m * k + n * k - 2 * k * k
    )
    allowed *= 1 if config.r is None else config.r / n
    return as_fast_as_lora(config, m, allowed) * total.reshape(out, *rest)


def _complement(kept: Tensor, k: int) -> Tensor:
    """Basis `(d, d − k)` from itself, or from the reflection that stands for it."""
    if kept.shape[1] == len(kept) - k:
        return kept
    return (torch.eye(len(kept), dtype=kept.dtype) - kept @ kept.T)[:, k:]


def _both_bases(Y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Head and complement out of one reflection, which begins with the narrower of them."""
    Q = torch.eye(len(Y), dtype=Y.dtype) - Y @ Y.T
    return (Q[:, -k:] if k else Q[:, :0], Q[:, : len(Y) - k]) if 2 * k >= len(Y) else (Q[:, :k], Q[:, k:])


def _projector(kept: Tensor, k: int) -> Tensor:
    """`I − P` from a basis of the complement or of the head."""
    eye = torch.eye(len(kept), dtype=kept.dtype)
    return kept @ kept.T if 2 * k >= len(kept) else eye - kept @ kept.T


def effort(delta: nn.Module, config) -> Tensor:
    """Σ_i U[:, i] S[i] ⊗ Vh[i] − U0[:, i] S0[i] ⊗ Vh0[i], as `(out, in, *kernel)`."""
    tensors = {name: tensor.double() for name, tensor in delta.state_dict(keep_vars=True).items()}
    U0, S0, Vh0, _ = (tensors.pop(name) for name in ("U0", "S0", "Vh0", "fingerprint"))
    U, S, Vh = U0 + tensors.pop("U_change"), S0 + tensors.pop("S_change"), Vh0 + tensors.pop("Vh_change")
    assert not tensors, f"tensors that are not in the equation: {sorted(tensors)}"
    total = U.new_zeros([len(U), *Vh.shape[1:]])
    for i in range(len(S)):
        now = torch.tensordot(S[i] * U[:, i], Vh[i], dims=0)
        total = total + now - torch.tensordot(S0[i] * U0[:, i], Vh0[i], dims=0)
    return total


def effort_losses(delta: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both regularizers from their definition, on the full SVD of the base weight `(m, n)`."""
    tensors = {name: tensor.double() for name, tensor in delta.state_dict(keep_vars=True).items()}
    U, S, Vh = (tensors[f"{name}0"] + tensors[f"{name}_change"] for name in ("U", "S", "Vh"))
    U_all, S_all, Vh_all = torch.linalg.svd(weight.double(), full_matrices=False)
    kept, eye = len(S_all) - len(S), torch.eye(len(S_all), dtype=torch.float64)
    U_hat = torch.cat([U_all[:, :kept], U], dim=1)
    Vh_hat = torch.cat([Vh_all[:kept], Vh.flatten(1)])
    orthogonality = (U_hat.T @ U_hat - eye).square().sum() + (Vh_hat @ Vh_hat.T - eye).square().sum()
    W_hat = U_hat @ torch.cat([S_all[:kept], S]).diag() @ Vh_hat
    return orthogonality, (W_hat.square().sum() - weight.double().square().sum()).abs()
