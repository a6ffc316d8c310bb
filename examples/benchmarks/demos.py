"""The two demos over several seeds, for the table in README.

python examples/benchmarks/demos.py            about 12 minutes on 2 cores
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import timing

SCRIPT = Path(__file__).resolve().parents[1] / "finetune.py"
SEEDS = (0, 1)


def main() -> None:
    """Run each demo with each seed and keep what it reports."""
    for demo in ("digits", "bbcnews"):
        runs = []
        for seed in SEEDS:
            folder = Path("outputs") / f"{demo}_{seed}"
            options = ["--seed", str(seed), "--output", str(folder), "--skip-checks"]
            subprocess.run([sys.executable, str(SCRIPT), "--demo", demo, *options], check=True)
            runs.append(json.loads((folder / "results.json").read_text()))
        timing.save(f"demo_{demo}", {"seeds": SEEDS, "runs": runs})


if __name__ == "__main__":
    main()
