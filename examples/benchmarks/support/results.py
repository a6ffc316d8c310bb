"""Results that survive an interruption, and the runs that make them, in one process or in several."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Learning rates that a method may be tried with."""

Run = dict[str, Any]


class Comparison(Protocol):
    """What makes runs; any process can make its equal from the same options."""

    options: Any

    def __init__(self, options: Any) -> None: ...

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure` that can be named by now, by their keys."""

    def measure(self, *job: Any) -> Run:
        """One run."""


class Results:
    """A JSON file of runs that is written after each, so that an interrupted comparison goes on."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["settings"] != settings:
                raise SystemExit(f"{path} was measured with other settings; choose another --results")

    def complete(self, comparison: Comparison, workers: int) -> None:
        """Makes runs until none is wanted.

        Args:
            comparison: Makes the runs. It is asked what it wants after each run, because what one run finds
                decides on others.
            workers: Processes that work at the same time; with one, all happens in this process.
        """
        runs = self.content["runs"]
        running: dict[Future[Run], str] = {}
        with _executor(comparison, workers) as executor, tqdm(desc="runs", initial=len(runs)) as bar:
            while True:
                started = {*runs, *running.values()}
                missing = [(key, job) for key, job in comparison.wanted().items() if key not in started]
                bar.total = len(started) + len(missing)
                for key, job in itertools.islice(missing, workers - len(running)):
                    running[executor.submit(_measure, *job)] = key
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    runs[running.pop(future)] = future.result()
                    bar.update()
                self.save()

    def save(self) -> None:
        """Writes the file, never half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)


def tuned(scores: dict[float, float], first: Iterable[float]) -> tuple[list[float], float | None]:
    """Learning rates still to try, and the best once there are none.

    The first ones are tried, and further ones of `RATES` while the best is the smallest or the largest.

    Args:
        scores: What was found by rate, higher is better.
        first: Rates that are tried in any case.
    """
    missing = set(first) - set(scores)
    if missing:
        return sorted(missing), None
    best = max(scores, key=scores.__getitem__)
    place = RATES.index(best)
    missing = set(RATES[max(0, place - 1) : place + 2]) - set(scores)
    return (sorted(missing), None) if missing else ([], best)


class _Inline(Executor):
    """Does at once, in this process, what it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


_here: list[Comparison] = []  # the comparison of this process


def _executor(comparison: Comparison, workers: int) -> Executor:
    if workers == 1:
        _here[:] = [comparison]
        return _Inline()
    # processes that begin with what takes seconds to import
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "peft_subspace"])
    threads = max(1, (os.cpu_count() or 1) // workers)
    return ProcessPoolExecutor(workers, context, _begin, (type(comparison), comparison.options, threads))


def _begin(kind: type[Comparison], options: Any, threads: int) -> None:
    import torch

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    _here[:] = [kind(options)]


def _measure(*job: Any) -> Run:
    return _here[0].measure(*job)
