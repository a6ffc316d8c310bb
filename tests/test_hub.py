"""Uploads to a stand-in for the Hub and downloads from it, through the real client: see hub_client.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from methods import METHODS

LOADERS = ("peft", "own")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    names = [method.name for method in METHODS]
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, here / "hub_client.py", folder / "results.pt", folder / "home", *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "HF_TOKEN": "", "HF_TOKEN_PATH": str(folder / "no-token")},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return torch.load(folder / "results.pt")


@pytest.fixture
def done(everything, method):
    return everything[method.name]


def same(found, wanted):
    assert isinstance(found, torch.Tensor), found
    return torch.equal(found, wanted)


@pytest.mark.feature("push_to_hub / from_pretrained")
def test_upload_and_download_by_revision(done):
    first, second = done["outputs"]
    assert not torch.equal(first, second)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(done["files"])
    assert not [name for name in done["files"] if name.endswith((".bin", ".pt", ".pkl"))]
    for loader in LOADERS:
        assert same(done["loaded"][f"{loader}-newest"], second)
        assert same(done["loaded"][f"{loader}-second"], second)
        assert same(done["loaded"][f"{loader}-first"], first)
    assert done["unknown revision"]["own"].startswith("RevisionNotFoundError")
    assert "Can't find 'adapter_config.json'" in done["unknown revision"]["peft"]
    old, new = done["cosines"]
    assert abs(old) < 0.99
    assert abs(new - 1) < 1e-5


@pytest.mark.feature("push_to_hub / from_pretrained")
def test_adapters_on_the_hub_are_merged_by_their_names(done):
    assert isinstance(done["merged"], torch.Tensor), done["merged"]
    assert done["merged"] < 1e-6


@pytest.mark.feature("private repositories")
def test_private_repository_needs_the_token(done):
    for loader, error in (("peft", "ValueError: Can't find"), ("own", "RepositoryNotFoundError: 401")):
        assert same(done["private"][f"{loader}-right"], done["outputs"][0])
        assert done["private"][f"{loader}-none"].startswith(error)
        assert done["private"][f"{loader}-wrong"].startswith(error)
    assert "401 Unauthorized" in done["upload without token"]


@pytest.mark.feature("push_to_hub / from_pretrained")
def test_interrupted_upload_leaves_the_old_version_or_none(done, method):
    found = done["interrupted"]
    assert found["old stalled"] is found["new stalled"] is True
    for loader in LOADERS:
        assert same(found[f"old {loader}"], done["outputs"][1])
    assert "Can't find 'adapter_config.json'" in found["new peft"]
    name = f"user/{method.name.replace('_', '-')}-new"
    assert found["new own"].startswith(f"FileNotFoundError: {name} has no adapter_config.json; ")


@pytest.mark.feature("push_to_hub / from_pretrained")
def test_interrupted_download_is_completed(done):
    assert done["cuts left"] == 0
    assert same(done["cut"], done["outputs"][0])


@pytest.mark.feature("model card")
def test_own_upload_completes_the_card_and_keeps_an_edit(done, method):
    first, second = done["cards"]["first"], done["cards"]["second"]
    for card in (first, second, done["cards"]["third"]):
        assert card.count("import peft_subspace ") == 1
        assert f"`{method.config_cls.peft_type_name}`" in card
    assert "OWN WORDS" not in first
    assert second.count("OWN WORDS") == 1
    repository = f'"user/{method.name.replace("_", "-")}-own"'
    assert f"from_pretrained(base_model, {repository})" in first
    assert f'from_pretrained(base_model, {repository}, revision="main")' in second
    assert done["cards"]["third"] == second


@pytest.mark.feature("model card")
def test_own_upload_brings_a_lora_and_takes_an_old_one_away(done):
    assert done["cards"]["lora"] is True
    assert 'subfolder="lora"' in done["cards"]["first"]
    assert 'subfolder="lora"' not in done["cards"]["second"]
    assert not [name for name in done["listed"] if name.startswith("lora/")]


def test_card_of_a_first_upload_by_transformers_is_its_own(done):
    """`PushToHubMixin.push_to_hub` writes a card over that of `save_pretrained`, as our push_to_hub says."""
    assert "import peft_subspace" not in done["cards"]["transformers"]
