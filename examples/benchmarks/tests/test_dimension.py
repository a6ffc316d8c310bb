"""The smallest subspace: which rate each size gets, what is enough, and a run of each kind."""

from __future__ import annotations

import argparse

import pytest
import torch

import dimension


def run(size, rate, seed, loss, accuracy):
    scores = {"validation": {"loss": loss}, "test": {"accuracy": accuracy}}
    return {"size": size, "rate": rate, "seed": seed, **scores}


@pytest.fixture
def content():
    runs = [
        run(dimension.FULL, 1e-3, 0, 0.1, 1.0),
        run(dimension.FULL, 1e-3, 1, 0.1, 0.8),
        run(100, 1e-1, 0, 0.9, 0.95),  # better tested, and worse validated
        run(100, 1e-2, 0, 0.8, 0.89),
        run(100, 1e-2, 1, 0.8, 0.73),
        run(200, 1e-1, 0, 0.2, 0.92),
        run(200, 1e-1, 1, 0.2, 0.71),
    ]
    return {"runs": {str(number): each for number, each in enumerate(runs)}}


def test_each_size_has_the_rate_that_validates_best(content):
    found = dimension.accuracies(content)
    assert found == {dimension.FULL: {0: 1.0, 1: 0.8}, 100: {0: 0.89, 1: 0.73}, 200: {0: 0.92, 1: 0.71}}


def test_enough_is_the_smallest_size_with_the_share_of_the_same_seed(content):
    assert dimension.dimensions(dimension.accuracies(content)) == [200, 100]
    assert "by seed: 200, 100." in dimension.table(content)
    content["runs"]["4"]["test"]["accuracy"] = 0.7
    assert "by seed: 200, none." in dimension.table(content)


def test_the_network_has_as_many_parameters_as_the_published_one():
    assert sum(p.numel() for p in dimension.network().parameters()) == 199_210


def test_sizes_and_the_whole_network_train(tmp_path, monkeypatch):
    monkeypatch.setattr(dimension, "PASSES", 2)
    monkeypatch.setattr(dimension, "SIZES", (50,))
    work = dimension.Dimension(argparse.Namespace(seeds=2, results=tmp_path / "results.json"))
    state = torch.get_rng_state()
    work.results.complete(work, 1)
    torch.set_rng_state(state)
    found = dimension.accuracies(work.results.content)
    assert {size: sorted(seeds) for size, seeds in found.items()} == {dimension.FULL: [0, 1], 50: [0, 1]}
    assert found[dimension.FULL][0] > found[50][0] > 0.15
