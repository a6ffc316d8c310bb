"""Run the tests of every method's life with the oldest and the newest versions that pyproject.toml accepts.

    python tests/versions.py [KIND-PYTHON ...]

Environments are `oldest-3.10`, the floors in pyproject.toml with the first Python that it accepts, and
`newest-3.10` to `newest-3.13`, what pip takes without constraints; by default all whose Python is there. Each
is a folder, `.venv-oldest-3.10`, which stays.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
MINORS = range(10, 14)
TESTS = ["test_hooks", "test_life_cycle_contract", "test_loading", "test_resume"]
TOOLS = ["hypothesis>=6.100", "pytest>=8.0", "pytest-timeout>=2.3"]
NAMES = "accelerate huggingface_hub peft safetensors torch transformers"
REPORT = f"""
import platform
from importlib.metadata import version
print("Python", platform.python_version(), *(f"{{name}} {{version(name)}}" for name in "{NAMES}".split()))
"""


def interpreter(minor: int) -> Path | None:
    """A Python of that version that starts, on the path or among those of pyenv."""
    name = f"python3.{minor}"
    found = [shutil.which(name), *sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/{name}"))]
    works = (
        path
        for path in found
        if path and not subprocess.run([path, "-c", ""], check=False, stderr=subprocess.DEVNULL).returncode
    )
    return next(map(Path, works), None)


def floors() -> list[str]:
    """The oldest version of each dependency, as constraints."""
    (needed,) = re.findall(r"^dependencies = \[(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    return [f"{name}=={floor}" for name, floor in re.findall(r'"([\w-]+)>=([\d.]+)', needed)]


def prepare(kind: str, python: Path, folder: Path) -> Path:
    """Make the environment, if it is not there, and return its Python."""
    inside = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(floors() if kind == "oldest" else []))
        install = [inside, "-m", "pip", "install", "--quiet", "--constraint", constraints]
        subprocess.run([*install, "--editable", ROOT, *TOOLS], check=True)
        (folder / "installed").touch()
    return inside


def passes(python: Path) -> bool:
    """Whether README's quick start runs, and the tests; other versions may warn of other things."""
    start = [python, ROOT / "tests" / "quick_start.py", ROOT / "README.md"]
    tests = [python, "-m", "pytest", "-q", "-W", "ignore", *(f"tests/{test}.py" for test in TESTS)]
    with TemporaryDirectory() as place:
        runs = [subprocess.run(start, check=False, cwd=place), subprocess.run(tests, check=False, cwd=ROOT)]
    return not any(run.returncode for run in runs)


def main(wanted: list[str]) -> int:
    """Run the tests in each environment; the number of those in which some fail."""
    failed = []
    environments = [("oldest", MINORS[0]), *(("newest", minor) for minor in MINORS)]
    for kind, minor in environments:
        name, python = f"{kind}-3.{minor}", interpreter(minor)
        if wanted and name not in wanted:
            continue
        if python is None:
            print(f"== {name}: there is no python3.{minor}", flush=True)
            continue
        inside = prepare(kind, python, ROOT / f".venv-{name}")
        print(f"== {name}", flush=True)
        subprocess.run([inside, "-c", REPORT], check=True)
        if not passes(inside):
            failed.append(name)
    print(f"== failed: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
