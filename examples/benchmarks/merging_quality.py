"""Accuracy of merged adapters on eight text tasks, beside PEFT's merges and beside the adapters themselves.

    python examples/benchmarks/merging_quality.py --data FOLDER            about two hours on a core
    python examples/benchmarks/merging_quality.py --data FOLDER --adapters lora flora lora-sb full --seeds 3
    python examples/benchmarks/merging_quality.py --data FOLDER --counts 2 4     also of fewer tasks

A head for each task is fitted on the frozen MiniLM, and then frozen. An adapter for each task trains until
validation stops improving. Merges are measured without cutting, as dense updates of the encoder: what a
result cut to a rank loses is what its report says. Scale and density are those of the best normalized
accuracy on validation rows: the mean over tasks of accuracy by that of the task's own adapter. Learned merges
and RegMean read training rows, AdaMerging and RegMean without their labels. An interrupted run goes on where
it stopped, and adapters are kept in `--work`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from torch import Tensor, nn

import peft_subspace as ps
from claims import markdown, spread
from peft_subspace.merging import merge
from support import shared_encoder
from support.results import Results
from support.shared_encoder import TARGETS, HeadedTask, encoder
from support.task import Sizes
from verdicts import RULE, WORDS, side

TASKS = ["agnews", "sst2", "trec6", "dbpedia", "subj", "imdb", "yelp", "clinc150"]
SCALES = [0.15, 0.3, 0.6, 1.2]
DENSITIES = [0.2, 0.5]
ROWS = {"train": 1000, "validation": 60, "test": 250, "tokens": 24}
SCHEDULE = {"steps": 150, "batch_size": 16, "look": 30, "patience": 2, "learned_steps": 60, "learned_rows": 8}
RATES = {"lora": 1e-3, "flora": 1e-3, "lora-sb": 1e-3, "full": 1e-4}
KINDS = {"lora": "LoRA", "flora": "FLoRA", "lora-sb": "LoRA-SB", "full": "all weights"}

Updates = dict[str, Tensor]
"""Updates of the encoder's linear weights by module."""

MERGES: dict[str, tuple[str, dict[str, Any]]] = {  # method and options; those with a density try all
    "task arithmetic": ("task_arithmetic", {}),
    "TSV-M": ("tsv_m", {}),
    "Iso-C": ("iso_c", {}),
    "TIES": ("ties", {"density": None}),
    "TIES, aligned (KnOTS)": ("ties", {"density": None, "space": "aligned"}),
    "DARE": ("dare", {"density": None}),
    "Consensus": ("consensus", {}),
    "EMR, unmasked": ("emr", {}),
}
PEFT = ("ties", "ties_svd")
LEARNED: dict[str, tuple[str, float, bool, str | None]] = {  # granularity, start, labeled, mask
    "AdaMerging, task": ("task", 0.3, False, None),
    "AdaMerging, module": ("module", 0.3, False, None),
    "aTLAS, module": ("module", 0.0, True, None),
    "Concrete, structured": ("module", 0.3, False, "structured"),
    "Concrete, by entry": ("module", 0.3, False, "entries"),
}


def _config(kind: str) -> Any:
    if kind == "lora":
        return peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
    if kind == "flora":
        return ps.FLoRAConfig(r=16, target_modules=TARGETS)
    return ps.LoRASBConfig(r=16, target_modules=TARGETS)


class Quality:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sizes, self.schedule = Sizes(**ROWS), dict(SCHEDULE)
        if options.small:
            self.sizes = Sizes(train=60, validation=20, test=20, tokens=12)
            self.schedule |= {"steps": 4, "look": 2, "learned_steps": 2, "learned_rows": 2}
        about = {"tasks": options.tasks, "rows": vars(self.sizes), "schedule": self.schedule, "rates": RATES}
        self.results = Results(options.results, {**about, "scales": SCALES, "densities": DENSITIES})
        self.tasks = shared_encoder.load(options.tasks, options.data, self.sizes)

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure`, by their keys; merges once all adapters are there."""
        jobs: dict[str, tuple] = {}
        runs = self.results.content["runs"]
        for seed, kind in itertools.product(range(self.options.seeds), self.options.adapters):
            own = {f"{kind} {seed} own {t.name}": (kind, seed, "own", t.name) for t in self.tasks}
            jobs |= own
            if all(key in runs for key in own):
                jobs |= {f"{kind} {seed} {entry}": (kind, seed, entry, "") for entry in self.entries(kind)}
                jobs |= {
                    f"{kind} {seed} {entry} of {count}": (kind, seed, entry, "", count)
                    for count, entry in itertools.product(self.options.counts, self.entries(kind))
                }
        return jobs

    def entries(self, kind: str) -> list[str]:
        """Rows of the table besides the adapters themselves."""
        theirs = [f"PEFT's {name}" for name in PEFT] if kind == "lora" else []
        joint = ["trained on all"] if kind in ("lora", "full") else []
        return ["pretrained", "average", *MERGES, "RegMean", *LEARNED, *joint, *theirs]

    def measure(
        self, kind: str, seed: int, entry: str, task: str, count: int | None = None
    ) -> dict[str, Any]:
        """Train an adapter, or make a merge, of all tasks or of the first ones, and test it."""
        started = time.perf_counter()
        about: dict[str, Any] = {"adapters": kind, "seed": seed, "entry": entry, "task": task}
        if entry == "own":
            (one,) = (t for t in self.tasks if t.name == task)
            model, steps = self.trained(kind, seed, [one])
            _save(model, kind, self.folder(kind, seed, task))
            scores = {f"{split}_accuracy": one.accuracy(model, split) for split in ("validation", "test")}
            return {**about, **scores, "steps": steps, "seconds": time.perf_counter() - started}
        part = copy.copy(self)
        if count is not None:
            about["count"], part.tasks = count, self.tasks[:count]
        found = part.chosen(kind, seed, entry)
        return {**about, **found, "seconds": time.perf_counter() - started}

    def folder(self, kind: str, seed: int, task: str) -> Path:
        """Where an adapter is kept."""
        return self.options.work / f"{kind}-{seed}-{task}"

    # ------------------------------------------------------------------------------------- training

    def trained(self, kind: str, seed: int, tasks: list[HeadedTask]) -> tuple[nn.Module, int]:
        """An encoder trained until validation stops improving, and the steps to the best weights."""
        torch.manual_seed(seed)
        model: Any = encoder()
        size = max(1, self.schedule["batch_size"] // len(tasks)) if len(tasks) == 1 else 4
        streams = [task.batches(size, seed) for task in tasks]
        if kind == "full":
            model.requires_grad_(False)
            for name in _targets(model):
                model.get_submodule(name).weight.requires_grad_(True)
        else:
            model = get_peft_model(model, _config(kind))
        if kind == "lora-sb":
            rows = tasks[0].rows["train"]
            few = [{"at": torch.arange(start, start + 16)} for start in range(0, min(64, len(rows) - 15), 16)]
            ps.initialize_from_gradient(
                model, few, loss_fn=lambda m, batch: tasks[0].loss(m, [rows[i] for i in batch["at"]])
            )
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(own, RATES[kind], weight_decay=0.0)
        best, kept, at, waited = math.inf, [p.detach().clone() for p in own], 0, 0
        for step in range(1, self.schedule["steps"] + 1):
            model.train()
            optimizer.zero_grad()
            for task, stream in zip(tasks, streams, strict=True):
                (task.loss(model, next(stream)) / len(tasks)).backward()
            optimizer.step()
            if step % self.schedule["look"] == 0:
                model.eval()
                with torch.no_grad():
                    losses = [float(t.loss(model, t.rows["validation"])) for t in tasks]
                waited += 1
                if statistics.fmean(losses) < best:
                    best, at, waited = statistics.fmean(losses), step, 0
                    kept = [p.detach().clone() for p in own]
                elif waited >= self.schedule["patience"]:
                    break
        with torch.no_grad():
            for parameter, value in zip(own, kept, strict=True):
                parameter.copy_(value)
        return model.eval(), at

    # -------------------------------------------------------------------------------------- merging

    def sources(self, kind: str, seed: int) -> list[Path]:
        """Folders of the adapters."""
        return [self.folder(kind, seed, task.name) for task in self.tasks]

    def base(self, kind: str) -> Any:
        """The base of the adapters: a model, or the folder that checkpoints need."""
        if kind != "full":
            return encoder()
        folder = self.options.work / "base"
        if not folder.is_dir():
            encoder().save_pretrained(folder)
        return folder

    def chosen(self, kind: str, seed: int, entry: str) -> dict[str, Any]:
        """Test accuracies of an entry at the options that are best on validation rows."""
        if entry == "trained on all":
            model, steps = self.trained(kind, seed, self.tasks)
            return {"options": {"steps": steps}, "accuracies": self.accuracies(model, "test")}
        best, chosen, dense = -1.0, dict[str, Any](), dict[str, Tensor]()
        own = self.own(kind, seed, "validation")
        for options, scales, make in self.candidates(kind, seed, entry):
            updates = make()
            for scale in scales:
                if len(scales) > 1 or entry in MERGES:
                    found = self.accuracies(applied(updates, scale), "validation")
                    score = statistics.fmean(found[name] / own[name] for name in found)
                else:
                    score = 0.0
                if score > best:
                    best, chosen, dense = score, {**options, "scale": scale}, updates
        return {"options": chosen, "accuracies": self.accuracies(applied(dense, chosen["scale"]), "test")}

    def candidates(
        self, kind: str, seed: int, entry: str
    ) -> list[tuple[dict[str, Any], list[float], Callable[[], Updates]]]:
        """Options, scales, and what makes the updates."""
        sources = self.sources(kind, seed)
        if entry == "pretrained":
            return [({}, [1.0], dict)]
        if entry in MERGES:
            method, options = MERGES[entry]
            made: list[tuple[dict[str, Any], list[float], Callable[[], Updates]]] = []
            for density in DENSITIES if "density" in options else (None,):
                given = {**options, **({} if density is None else {"density": density})}
                shown = {} if density is None else {"density": density}
                made.append((shown, SCALES, partial(self.merged, kind, sources, method, given)))
            return made
        if entry.startswith("PEFT's "):
            name = entry.removeprefix("PEFT's ")
            return [({"density": d}, SCALES, partial(self.by_peft, sources, name, d)) for d in DENSITIES]
        if entry == "average":
            return [({}, [1.0], partial(self.merged, kind, sources, "average", {}))]
        if entry == "RegMean":
            return [({}, [1.0], partial(self.regmean, kind, seed, sources))]
        return [({}, [1.0], partial(self.learned, kind, seed, *LEARNED[entry]))]

    def merged(self, kind: str, sources: list[Path], method: str, options: dict[str, Any]) -> Updates:
        """Updates of a merge, nothing cut."""
        made = merge(sources, method, base=self.base(kind), others="drop", **options)
        return {module: made.update(module) for module in made.modules}

    def by_peft(self, sources: list[Path], name: str, density: float) -> Updates:
        """What PEFT's `add_weighted_adapter` makes."""
        model: Any = peft.PeftModel.from_pretrained(encoder(), sources[0], "a0")
        names = ["a0"]
        for number, source in enumerate(sources[1:], start=1):
            names.append(f"a{number}")
            model.load_adapter(source, names[-1])
        model.add_weighted_adapter(
            names, [1.0] * len(names), "merged", combination_type=name, density=density
        )
        return _updates(model, "merged")

    def regmean(self, kind: str, seed: int, sources: list[Path]) -> Updates:
        """RegMean with the products of the inputs, of 256 training rows, to each task's own layers."""
        own: list[dict[str, Tensor]] = []
        for task, source in zip(self.tasks, sources, strict=True):
            model = applied(self.merged(kind, [source], "task_arithmetic", {}), 1.0)
            grams: dict[str, Tensor] = {}

            def add(_: Any, inputs: Any, name: str = "", into: dict[str, Tensor] = grams) -> None:
                rows = inputs[0].flatten(0, -2)
                into[name] = into.get(name, 0) + rows.T @ rows

            for name in _targets(model):
                model.get_submodule(name).register_forward_pre_hook(partial(add, name=name))
            rows = sorted(task.rows["train"][:256], key=lambda row: len(row[0]))
            with torch.no_grad():
                for start in range(0, len(rows), 16):
                    shared_encoder.features(model, [ids for ids, _ in rows[start : start + 16]])
            # the part of 0.9 of what is off the diagonal, as the paper advises
            own.append({n: 0.9 * g + 0.1 * torch.diag(g.diagonal()) for n, g in grams.items()})
        by_module = {name: [grams[name] for grams in own] for name in own[0]}
        return self.merged(kind, sources, "regmean", {"grams": by_module})

    def learned(
        self, kind: str, seed: int, per: str, start: float, labeled: bool, mask: str | None
    ) -> Updates:
        """A composition, whose coefficients or masks are trained on rows of all tasks at once."""
        torch.manual_seed(seed)
        base = self.base(kind)
        options: dict[str, Any] = {"per": per, "start": start, "mask": mask}
        model: Any = ps.compose(
            encoder(), self.sources(kind, seed), base=base if kind == "full" else None, **options
        )
        few, steps = self.schedule["learned_rows"], self.schedule["learned_steps"]
        rounds = shared_encoder.rounds(self.tasks, few, seed, steps)
        if mask is not None:
            ps.learn_masks(model, rounds, shared_encoder.predict, learning_rate=1e-1, seed=seed)
            return _updates(model, "default")
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(own, lr=1e-2)
        for batches in rounds:
            optimizer.zero_grad()
            for task, rows in batches.values():
                loss = task.loss(model, rows) if labeled else ps.entropy_loss(task.logits(model, rows))
                (loss / len(self.tasks)).backward()
            optimizer.step()
        return _updates(model, "default")

    # -------------------------------------------------------------------------------------- testing

    def accuracies(self, model: nn.Module, split: str) -> dict[str, float]:
        """Accuracy by task."""
        return {task.name: task.accuracy(model, split) for task in self.tasks}

    def own(self, kind: str, seed: int, split: str) -> dict[str, float]:
        """Accuracy of each adapter on its own task."""
        runs = self.results.content["runs"]
        return {t.name: runs[f"{kind} {seed} own {t.name}"][f"{split}_accuracy"] for t in self.tasks}


_pretrained = functools.cache(encoder)


def _targets(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(TARGETS, name)]


def _save(model: Any, kind: str, folder: Path) -> None:
    if kind == "full":
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, save_embedding_layers=False)


@torch.no_grad()
def applied(updates: Updates, scale: float) -> nn.Module:
    """A fresh encoder with updates added."""
    model = copy.deepcopy(_pretrained())
    for name, update in updates.items():
        model.get_submodule(name).weight += scale * update
    return model


@torch.no_grad()
def _updates(model: nn.Module, adapter: str) -> Updates:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter).clone()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def limits(content: dict[str, Any]) -> str:
    """How much of the data was used, and how long was trained."""
    about = content["settings"]
    rows, steps = about["rows"], about["schedule"]
    return (
        f"{rows['train']} rows of each task to train on, {rows['validation']} to choose by, {rows['test']} "
        f"to test, of {rows['tokens']} tokens; at most {steps['steps']} steps of {steps['batch_size']} rows "
        f"for an adapter, {steps['learned_steps']} of {steps['learned_rows']} rows of each task for a "
        f"learned merge. Scales {about['scales']}, densities {about['densities']}."
    )


def table(content: dict[str, Any], kind: str) -> str:
    """Accuracy by task, normalized accuracy over seeds, and on which side of averaging an entry is."""
    runs = [run for run in content["runs"].values() if run["adapters"] == kind and "count" not in run]
    if not runs:
        return "not measured yet"
    tasks, own = content["settings"]["tasks"], _own(runs)
    seeds = [seed for seed, scores in own.items() if len(scores) == len(tasks)]
    if not seeds:
        done = [[t, f"{score:.3f}"] for scores in own.values() for t, score in scores.items()]
        started = (
            f"{len(done)} of {len(tasks)} adapters of the first seed are trained; nothing is merged yet."
        )
        return f"{markdown([f'{KINDS[kind]}, own adapter', 'test accuracy'], done)}\n\n{started}"
    entries = dict.fromkeys(run["entry"] for run in runs if run["entry"] != "own")
    found: dict[str, dict[int, dict[str, float]]] = {"own adapters": {seed: own[seed] for seed in seeds}}
    for entry in entries:
        found[entry] = {
            r["seed"]: r["accuracies"] for r in runs if r["entry"] == entry and r["seed"] in seeds
        }
    normalized = {
        entry: {s: statistics.fmean(scores[t] / own[s][t] for t in tasks) for s, scores in by_seed.items()}
        for entry, by_seed in found.items()
    }
    rows = []
    for entry, by_seed in found.items():
        cells = [f"{statistics.fmean(scores[task] for scores in by_seed.values()):.3f}" for task in tasks]
        average = normalized.get("average", {})
        paired = [value - average[s] for s, value in normalized[entry].items() if s in average]
        found_side = None if entry == "average" else side(paired)
        where = "" if found_side is None else WORDS[found_side]
        rows.append(
            [entry, *cells, spread(list(normalized[entry].values()), 3), where, _options(runs, entry)]
        )
    header = [KINDS[kind], *tasks, "normalized", "beside average", "chosen, seed 0"]
    seeds_said = f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
    said = RULE if len(seeds) > 1 else "One seed tells no spread, so that nothing is called above or below."
    return f"{markdown(header, rows)}\n\n{seeds_said}. {said}"


def by_count(content: dict[str, Any], kind: str) -> str:
    """Normalized accuracy, over seeds, of merges of the first tasks and of all."""
    runs = [run for run in content["runs"].values() if run["adapters"] == kind]
    own, tasks = _own(runs), content["settings"]["tasks"]
    merges = [run for run in runs if run["entry"] != "own"]
    counts = sorted({run["count"] for run in merges if "count" in run})
    if not counts:
        return "not measured yet"
    found: dict[str, dict[int, list[float]]] = {}
    for run in merges:
        score = statistics.fmean(value / own[run["seed"]][task] for task, value in run["accuracies"].items())
        found.setdefault(run["entry"], {}).setdefault(run.get("count", len(tasks)), []).append(score)
    rows = [
        [entry, *(spread(scores[count], 3) if count in scores else "" for count in (*counts, len(tasks)))]
        for entry, scores in found.items()
    ]
    return markdown([KINDS[kind], *(f"{count} tasks" for count in (*counts, len(tasks)))], rows)


def _own(runs: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    own: dict[int, dict[str, float]] = {}
    for run in runs:
        if run["entry"] == "own":
            own.setdefault(run["seed"], {})[run["task"]] = run["test_accuracy"]
    return own


def _options(runs: list[dict[str, Any]], entry: str) -> str:
    chosen: dict[str, Any] = next((r["options"] for r in runs if r["entry"] == entry and r["seed"] == 0), {})
    fixed = (
        entry in ("pretrained", "average", "RegMean", "own adapters", "trained on all") or entry in LEARNED
    )
    return "" if fixed else ", ".join(f"{key} {value:g}" for key, value in chosen.items())


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = shared_encoder.parser(__doc__, TASKS, "merging_quality")
    parser.add_argument("--adapters", nargs="+", default=["lora"], choices=list(KINDS), help="what is merged")
    parser.add_argument("--counts", nargs="+", type=int, default=[], help="merges of so many first tasks")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is missing, and print what was found."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    quality = Quality(parse_arguments())
    quality.results.complete(quality, 1)
    for kind in quality.options.adapters:
        print(f"\n{table(quality.results.content, kind)}\n\n{by_count(quality.results.content, kind)}")


if __name__ == "__main__":
    main()
