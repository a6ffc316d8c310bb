"""Change the package in one place at a time, and see whether the tests notice.

Run it by hand; `mutants.py` is the table of changes:

    python tests/mutation.py [--only ID …] [--results FILE]
    python tests/mutation.py --unmutated

A mutant is killed if a test of its selection fails, and survives if all pass. Results are kept in a file:
a run that was interrupted goes on where it stopped, and only what was killed is not tried again. With
`--unmutated` all selections run on the package as it is, where they have to pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "peft_subspace"
TIMEOUT = 1800  # seconds; generous, for a busy machine is no proof that a test has noticed
OUTCOMES = {0: "survived", 1: "killed"}  # by pytest's exit status; others mean that no test has run


def texts(package: Path) -> dict[Path, str]:
    """Contents of the package's files."""
    return {file: file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py"))}


def mutate(mutant: Mutant, package: Path) -> str | None:
    """Apply a mutant to a copy of the package; say why, if its place is not there, or not the only one."""
    count = sum(text.count(mutant.old) for text in texts(package).values())
    if count != 1:
        return "ambiguous" if count else "not found"
    for file, text in texts(package).items():
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return None


def run_tests(folder: Path, files: str, k: str) -> tuple[str, str]:
    """Run a selection of the tests on the package in a folder; return the outcome, and by what it came."""
    # with the methods, too, that wait for their turn in `make test`
    options = "-x -q -p no:cacheprovider --tb=no --all-layers"
    command = [sys.executable, "-m", "pytest", *options.split()]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-k", k]
    command += [str(ROOT / "tests" / name) for name in files.split()]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(folder)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    try:  # in the folder, for `-m` puts the present one first on the path
        ran = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return "timed out", f"more than {TIMEOUT} seconds"
    lines = ran.stdout.splitlines() or ran.stderr.splitlines() or [""]
    reason = next((line for line in lines if line.startswith(("FAILED ", "ERROR "))), lines[-1])
    return OUTCOMES.get(ran.returncode, "no tests"), reason[:300]


def copied(folder: str) -> Path:
    """Copy the package into a folder."""
    return shutil.copytree(
        ROOT / PACKAGE, Path(folder) / PACKAGE, ignore=shutil.ignore_patterns("__pycache__")
    )


def try_mutant(mutant: Mutant) -> dict[str, str]:
    """Outcome of one mutant, with what it is."""
    with tempfile.TemporaryDirectory() as folder:
        package = copied(folder)
        unfit = mutate(mutant, package)
        outcome, reason = (unfit, mutant.old) if unfit else run_tests(Path(folder), mutant.files, mutant.k)
    return {**asdict(mutant), "outcome": outcome, "reason": reason}


def try_all(mutants: Sequence[Mutant], path: Path) -> int:
    """Try mutants, but for those that the file of results has as killed, and write it after each one."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    for number, mutant in enumerate(mutants, start=1):
        known = results.get(mutant.id, {})
        if known.get("outcome") != "killed" or not asdict(mutant).items() <= known.items():
            results[mutant.id] = try_mutant(mutant)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        result = results[mutant.id]
        print(f"{number:>3} {mutant.id:<28} {result['outcome']:<10} {result['reason']}", flush=True)
    outcomes = Counter(results[mutant.id]["outcome"] for mutant in mutants)
    print(dict(outcomes))
    return 0 if set(outcomes) <= {"killed"} else 1


def try_unmutated(mutants: Sequence[Mutant]) -> int:
    """Run the selections of all mutants on the package as it is, file by file."""
    selections = defaultdict(list)
    for mutant in mutants:
        selections[mutant.files].append(f"({mutant.k})")
    failed = 0
    for files, ks in selections.items():
        with tempfile.TemporaryDirectory() as folder:
            copied(folder)
            outcome, reason = run_tests(Path(folder), files, " or ".join(dict.fromkeys(ks)))
        failed += outcome != "survived"
        print(f"{files}: {'pass' if outcome == 'survived' else outcome}: {reason}", flush=True)
    return 1 if failed else 0


def main() -> int:
    """Run what the command line asks for; 1 if a mutant survives, or could not be tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ID", choices=[mutant.id for mutant in MUTANTS])
    parser.add_argument("--results", type=Path, metavar="FILE", default=ROOT / "outputs" / "mutants.json")
    parser.add_argument("--unmutated", action="store_true", help="run the selections on the package as it is")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only is None or mutant.id in options.only]
    return try_unmutated(mutants) if options.unmutated else try_all(mutants, options.results)


if __name__ == "__main__":
    raise SystemExit(main())
