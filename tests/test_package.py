"""The names of the package, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import peft
import pytest

import mutation
import peft_subspace
from peft_subspace import continual, developer

CONFIGS = [
    "CompositionConfig",
    "ContinualSVDConfig",
    "EffortConfig",
    "FLoRAConfig",
    "LoRASBConfig",
    "MoSConfig",
]
FUNCTIONS = [
    "EquiangularHead",
    "Estimate",
    "GradientInitCallback",
    "GrassmannHead",
    "NextTaskCallback",
    "RegularizationCallback",
    "compose",
    "edits",
    "entropy_loss",
    "estimate",
    "export_lora",
    "frozen_digest",
    "grow_head",
    "initialize_from_gradient",
    "inspect",
    "learn_masks",
    "load",
    "load_trainable_state_dict",
    "lora_state_dict",
    "merging",
    "prepare_for_ddp",
    "push_to_hub",
    "regularization_loss",
    "save_with_shared_bases",
    "statistics",
    "trainable_state_dict",
]


def test_flat_names_are_those_of_every_method():
    models = [name.replace("Config", "Model") for name in CONFIGS]
    assert sorted(peft_subspace.__all__) == sorted([*CONFIGS, *models, *FUNCTIONS, "continual"])
    assert set(peft_subspace.__all__) <= set(dir(peft_subspace))
    for name in peft_subspace.__all__:
        assert getattr(peft_subspace, name) is getattr(peft_subspace, name)


def test_sequences_of_tasks_have_a_package_of_their_own():
    assert peft_subspace.continual is continual
    assert peft_subspace.NextTaskCallback is continual.NextTaskCallback
    for name in {*continual.__all__} - {"NextTaskCallback"}:
        assert name not in {*peft_subspace.__all__, *dir(peft_subspace)}
        assert getattr(continual, name) is not None


FORMER = {
    "list_tasks": ("continual.list_tasks", continual.list_tasks),
    "next_task": ("continual.next_task", continual.next_task),
    "subspace_leak": ("continual.subspace_leak", continual.subspace_leak),
    "to_lora": ("lora_state_dict", peft_subspace.lora_state_dict),
}


@pytest.mark.parametrize("name", FORMER)
def test_scripts_of_version_0_1_find_what_has_moved_and_are_told_where(name):
    place, function = FORMER[name]
    with pytest.warns(DeprecationWarning, match=f"peft_subspace.{name} is peft_subspace.{place} now") as told:
        assert getattr(peft_subspace, name) is function
    assert [Path(warning.filename) for warning in told] == [Path(__file__)]


def test_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="module 'peft_subspace' has no attribute 'absent'"):
        peft_subspace.absent  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'absent'"):
        from peft_subspace import absent  # noqa: F401


def test_no_name_is_that_of_another_function_of_peft():
    assert set(peft_subspace.__all__) & set(peft.__all__) == set()


def test_names_for_authors_of_methods_can_be_imported():
    assert {"Delta", "ModuleSpec", "ScaledConfig", "SubspaceConfig", "SubspaceModel", "Update"} <= set(
        developer.__all__
    )
    assert all(hasattr(developer, name) for name in developer.__all__)


def test_importing_the_package_adds_little_to_the_import_of_peft():
    code = (
        "import sys, peft; old = {*sys.modules}; import peft_subspace; print('added', *{*sys.modules} - old)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = run.stdout.rpartition("added ")[2].split()
    own = {name for name in added if name.partition(".")[0] == "peft_subspace"}
    late = ("continual", "initialization", "tools", "persistence.loading", "persistence.hub")
    assert not [name for name in own if name.startswith(tuple(f"peft_subspace.{part}" for part in late))]
    others = {name.partition(".")[0] for name in added} - sys.stdlib_module_names
    assert others <= {"peft_subspace", "aenum", "transformers"}


def test_what_is_distributed_holds_no_benchmarks_figures_or_results(tmp_path):
    pytest.importorskip("hatchling", reason="`pip install hatchling` builds the distributions")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(build, cwd=Path(__file__).parent.parent, capture_output=True, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        modules = {name for name in wheel.namelist() if ".dist-info/" not in name}
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sources:
        files = {name.partition("/")[2] for name in sources.getnames()}
    assert modules == {name for name in files if name.startswith("peft_subspace/")}
    assert {Path(name).suffix for name in modules} == {".py", ".typed"}
    assert {"README.md", "LICENSE", "examples/first_steps.ipynb", "tests/test_package.py"} <= files
    assert not [name for name in files if "benchmarks" in name or Path(name).suffix in (".png", ".svg")]
    settings = ("tests/data/", "examples/launch/")
    assert not [name for name in files if name.endswith(".json") and not name.startswith(settings)]


def test_every_mutant_changes_one_place_of_the_package():
    sources = mutation.texts(Path(peft_subspace.__file__).parent).values()
    places = {mutant.id: sum(text.count(mutant.old) for text in sources) for mutant in mutation.MUTANTS}
    assert {name: count for name, count in places.items() if count != 1} == {}
