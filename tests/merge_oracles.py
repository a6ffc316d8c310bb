"""Merges of dense updates, entry by entry on Python's own floats, or by the textbook's formulas."""

from __future__ import annotations

import itertools
import math

import torch


def by_entry(function):
    def oracle(taus, weights):
        m, n = taus[0].shape
        result = torch.zeros(m, n, dtype=torch.float64)
        for i, j in itertools.product(range(m), range(n)):
            result[i, j] = function([float(t[i, j]) for t in taus], weights)
        return result

    return oracle


def trimmed(taus, density):
    result = []
    for tau in taus:
        sizes = sorted((abs(float(x)) for x in tau.flatten()), reverse=True)
        limit = sizes[int(density * len(sizes) + 1e-9) - 1]
        result.append(torch.where(tau.abs() >= limit, tau, torch.zeros_like(tau)))
    return result


def elected(entries, weights):
    total = sum(w * x for w, x in zip(weights, entries, strict=True))
    agreeing = [(w, x) for w, x in zip(weights, entries, strict=True) if w * x * total > 0]
    return sum(w * x for w, x in agreeing) / sum(abs(w) for w, _ in agreeing) if agreeing else 0.0


def mattering(entries, weights):
    scaled = [w * x for w, x in zip(weights, entries, strict=True)]
    total = sum(scaled)
    return total if sum(abs(x) > 0.4 * abs(total - x) for x in scaled) >= 2 else 0.0


def largest(entries, weights):
    scaled = [w * x for w, x in zip(weights, entries, strict=True)]
    sign = math.copysign(1, sum(scaled))
    return sign * max([abs(x) for x in scaled if x * sign > 0], default=0.0)


def total(taus, weights):
    return sum(w * t for w, t in zip(weights, taus, strict=True))


def crumbs(taus, weights):
    kept = []
    for tau in taus:
        flat = sorted((abs(float(x)) for x in tau.flatten()), reverse=True)
        high, low = flat[int(0.1 * len(flat)) - 1], flat[int(0.6 * len(flat)) - 1]
        kept.append(torch.where((tau.abs() >= low) & (tau.abs() < high), tau, torch.zeros_like(tau)))
    return total(kept, weights)


def orthogonalized(taus, weights):
    most = min(taus[0].shape) // len(taus)
    lefts, values, rights = [], [], []
    for tau, w in zip(taus, weights, strict=True):
        U, S, Vh = torch.linalg.svd(tau, full_matrices=False)
        count = min(most, int((1e-9 * S[0] < S).sum()))
        lefts.append(U[:, :count])
        values.append(w * S[:count])
        rights.append(Vh[:count])
    polar = [a @ torch.linalg.inv(_root(a.T @ a)) for a in (torch.cat(lefts, 1), torch.cat(rights).T)]
    return polar[0] @ torch.diag(torch.cat(values)) @ polar[1].T


def _root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def isotropic(taus, weights):
    U, S, Vh = torch.linalg.svd(total(taus, weights), full_matrices=False)
    count = int((1e-9 * S[0] < S).sum())
    return S[:count].mean() * U[:, :count] @ Vh[:count]


def arc(taus, weights):
    share = weights[1] / sum(weights)
    cosine = float((taus[0] * taus[1]).sum() / taus[0].norm() / taus[1].norm())
    angle = math.acos(cosine)
    parts = [math.sin((1 - share) * angle), math.sin(share * angle)]
    return sum(p / math.sin(angle) * t for p, t in zip(parts, taus, strict=True))


def truncated(taus, weights):
    U, S, Vh = torch.linalg.svd(total(taus, weights))
    return U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]


ORACLES = {
    "task_arithmetic": ({}, total),
    "average": ({}, lambda taus, w: total(taus, w) / sum(w)),
    "svd": ({"keep": 2}, truncated),
    "tsv_m": ({}, orthogonalized),
    "iso_c": ({}, isotropic),
    "ties": ({"density": 0.3}, lambda taus, w: by_entry(elected)(trimmed(taus, 0.3), w)),
    "magnitude": ({"density": 0.3}, lambda taus, w: total(trimmed(taus, 0.3), w)),
    "breadcrumbs": ({"density": 0.5, "outliers": 0.1}, crumbs),
    "consensus": ({}, by_entry(mattering)),
    "emr": ({}, by_entry(largest)),
}
