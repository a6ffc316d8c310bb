"""The demos over several seeds, for the tables in README and the model cards.

python examples/benchmarks/demos.py                 about 25 minutes on 2 cores
python examples/benchmarks/demos.py --only mos      one method
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import timing

SCRIPT = Path(__file__).with_name("finetune.py")
SEEDS = (0, 1)
RUNS = (("digits", "flora"), ("bbcnews", "flora"), ("bbcnews", "mos"), ("bbcnews", "lora-sb"))


def main() -> None:
    """Run each demo with each seed and keep what it reports."""
    parser = argparse.ArgumentParser(description="Run the demos over several seeds.")
    parser.add_argument("--only", help="one method instead of all")
    only = parser.parse_args().only
    for demo, method in RUNS:
        if only in (None, method):
            runs = [_run(demo, method, seed) for seed in SEEDS]
            timing.save(f"demo_{demo}_{method}", {"seeds": SEEDS, "runs": runs})


def _run(demo: str, method: str, seed: int) -> dict:
    folder = Path("outputs") / f"{demo}_{method}_{seed}"
    options = ["--method", method, "--seed", str(seed), "--output", str(folder), "--skip-checks"]
    subprocess.run([sys.executable, str(SCRIPT), "--demo", demo, *options], check=True)
    return json.loads((folder / "results.json").read_text())


if __name__ == "__main__":
    main()
