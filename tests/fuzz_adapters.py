"""Look for adapters that are neither loaded nor refused, guided by coverage.

Run it by hand (`pip install peft-subspace[fuzz]`), for as long as you like:

    python tests/fuzz_adapters.py -runs=20000

It stops at the first input that raises anything else than a clear error, changes the base model or loads
values that are not finite. Every thousandth adapter it says how many it has tried.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["peft_subspace"]):
    import peft_subspace  # noqa: F401

from hypothesis import HealthCheck, given, settings

from fuzzing import Adapter, adapters, attempt

LENGTH = 4096
SEEDS = 200

tried: Counter[str] = Counter()


@settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(adapters())
def run(adapter: Adapter) -> None:
    """Try one adapter."""
    tried["loaded" if attempt(adapter) else "refused"] += 1
    if tried.total() % 1000 == 0:
        print(f"{tried.total()} adapters tried: {dict(tried)}", flush=True)


def one_input(data: bytes) -> None:
    """Make an adapter of some bytes, if they suffice for one, and try it."""
    run.hypothesis.fuzz_one_input(data)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as seeds:  # inputs as short as the search's own are no adapters
        generator = random.Random(0)
        for i in range(SEEDS):
            (Path(seeds) / str(i)).write_bytes(generator.randbytes(LENGTH))
        options = ["-len_control=0", f"-max_len={LENGTH}", "-timeout=30"]
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], seeds], one_input)
        atheris.Fuzz()
