"""A diffusion model that is pruned of images: what is pruned, what is told, and the table."""

from __future__ import annotations

import torch

import memorized_images


def test_images_are_told_apart():
    images = memorized_images.Images(seed=0)
    parts = [images.known, images.train, images.unseen]
    assert [len(part) for part in parts] == [10, 1487, 300]
    assert all(part.min() >= -1 and part.max() <= 1 for part in parts)
    seen = torch.cat(parts[:2]).flatten(1)
    assert torch.cdist(images.unseen.flatten(1), seen).min() > 0


def test_likeness_is_that_of_pixels_up_to_brightness_and_contrast():
    one = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(memorized_images.correlation(one, 3 * one + 2), torch.ones(3))
    assert memorized_images.correlation(one, torch.randn(3, 1, 8, 8)).abs().max() < 0.6


def test_entries_are_pruned_and_given_back(tmp_path, monkeypatch):
    for name, value in {"STEPS": 2, "BATCH": 8, "BATCHES": 1, "DRAWS": 1, "DRAWING": 2}.items():
        monkeypatch.setattr(memorized_images, name, value)
    monkeypatch.setattr(memorized_images, "SHARES", (0.02, 0.1))
    given = memorized_images.parse_arguments(["--seeds", "1", "--results", str(tmp_path / "results.json")])
    work = memorized_images.Forgetting(given)
    work.results.complete(work, 1)
    found = {run["entry"]: run["points"] for run in work.results.content["runs"].values()}
    assert set(found) == set(memorized_images.ENTRIES)
    assert [point["entries"] for point in found[memorized_images.TRAINED]] == [0]
    counts = {tuple(point["entries"] for point in found[entry]) for entry in memorized_images.ENTRIES[1:]}
    assert len(counts) == 1  # each prunes as many
    few, many = counts.pop()
    assert 0 < few < many <= 0.1
    assert memorized_images.zeros(work.trained[0]) == 0
    table = memorized_images.table(work.results.content).splitlines()
    assert len(table) == 2 + 1 + 3 * 2
