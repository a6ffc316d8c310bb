"""What the package writes is written whole, or not at all."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import models
import peft_subspace
from peft_subspace.initialization.gradient_cache import write_gradients
from peft_subspace.runtime.files import atomic_write


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_lora(folder, rank):
    config = peft_subspace.FLoRAConfig(r=rank, target_modules=["q_proj"], init_weights=False, seed=0)
    peft_subspace.export_lora(get_peft_model(models.llama(), config), folder)


def write_config(folder, rank):
    """With our part of the model card."""
    peft_subspace.FLoRAConfig(r=rank, base_model_name_or_path=f"base{rank}").save_pretrained(str(folder))


def write_heatmap(folder, rank):
    peft_subspace.continual.save_heatmap([[rank / 9]], ["task"], folder / "matrix.png")


def write_cache(folder, rank):
    gradients = (("module", torch.full((2, 3), float(value))) for value in [rank])
    list(write_gradients(folder / "cache.safetensors", {"module": (2, 3)}, gradients))


@pytest.mark.parametrize("write", [write_lora, write_config, write_heatmap, write_cache])
def test_interrupted_writing_leaves_the_old_files(write, tmp_path, monkeypatch):
    write(tmp_path, 2)
    before = contents(tmp_path)
    assert before
    with monkeypatch.context() as patch:

        def interrupt(path, target):
            assert path.stat().st_size > 0  # all is written when the file takes its place
            raise KeyboardInterrupt

        patch.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 3)
    assert contents(tmp_path) == before
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    write(tmp_path, 3)
    assert contents(tmp_path).keys() == before.keys()
    assert all(contents(tmp_path)[name] != old for name, old in before.items() if name.suffix != ".md")


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first.name == second.name == path.name
        assert not path.exists()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
