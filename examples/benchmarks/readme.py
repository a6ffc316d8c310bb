"""Write the measured tables into README.md and the model cards from `examples/benchmarks/results`.

python examples/benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import claims
import features
import timing
from claims import markdown, spread

ROOT = Path(__file__).resolve().parents[2]


def between(ratio: dict[str, float]) -> str:
    """Median and range of a ratio."""
    return f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"


def demos(method: str = "*") -> str:
    """Accuracy of the demos, over seeds; what does not depend on the method is shown once."""
    rows: dict[tuple[str, str], list[Any]] = {}
    for file in sorted(timing.RESULTS.glob(f"demo_*_{method}.json")):
        runs = json.loads(file.read_text())["runs"]
        for lines in zip(*(run["results"] for run in runs), strict=True):
            scores, seconds = [line["score"] for line in lines], [line["seconds"] for line in lines]
            task, name = runs[0]["task"], lines[0]["name"]
            trained, time = f"{lines[0]['trained']:,}", f"{statistics.median(seconds):.0f}"
            rows.setdefault((task, name), [task, name, spread(scores), trained, time, len(runs)])
    header = ["task", "", "accuracy", "trained parameters", "seconds", "seeds"]
    return markdown(header, [rows[key] for key in sorted(rows, key=lambda key: key[0])])


def flora() -> str:
    """FLoRA beside LoRA and beside its authors' form."""
    run, conv = timing.load("flora"), timing.load("convolution")
    means, shapes = conv["geometric_means"], conv["shapes"].values()
    peaks = {name: statistics.median(values) for name, values in run["peak_mib"].items()}
    rank = conv["options"]["rank"]
    kept = run["merging"]["kept_mib"] / run["merging"]["adapted_mib"]
    rows = [
        ["train step, 24 layers, all linears, r=16 / LoRA's", between(run["train_step"]["flora"]["to_lora"])],
        ["the frozen base alone / LoRA's", between(run["train_step"]["base"]["to_lora"])],
        ["peak memory / LoRA's", f"{peaks['flora'] / peaks['lora']:.3f}"],
        ["wrapping Llama-3.2-1B on the meta device / LoRA's", between(run["wrapping"]["wrap"]["to_lora"])],
        ["loading an adapter onto it / LoRA's", between(run["wrapping"]["load"]["to_lora"])],
        [
            f"{len(shapes)} convolutions, r={rank}: train step / authors' form, geometric mean (worst)",
            f"{means['flora/authors']:.2f} ({max(shape['flora/authors'] for shape in shapes):.2f})",
        ],
        ["the same / frozen layer, geometric mean", f"{means['flora/base']:.2f}"],
        ["the authors' form / frozen layer, geometric mean", f"{means['authors/base']:.2f}"],
        ["merged model keeps / adapted weights", f"{kept:.2f}"],
        *[[f"trained parameters, {name}", f"{count:,}"] for name, count in run["counts"].items()],
    ]
    return markdown(["", "median (range)"], rows)


def inits() -> str:
    """Validation loss of each start."""
    run = timing.load("flora_inits")
    rows = [
        [
            row["task"],
            f"`{row['init']}`",
            f"{row['loss']:.3f} ± {row['loss_spread']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['learning_rate']:g}",
        ]
        for row in run["rows"]
    ]
    title = f"validation loss after {run['steps']} steps, {len(run['seeds'])} seeds"
    return markdown(["task", "start", title, "accuracy", "best learning rate"], rows)


def mos() -> str:
    """MoS beside LoRA: many adapters, and training."""
    run = timing.load("mos")
    served, trained = run["serving"], run["training"]
    rows = [
        [title, f"{served['mos'][key]:.2f}", f"{served['lora'][key]:.2f}", f"{served['mos/lora'][key]:.3f}"]
        for key, title in {
            "adapter_mib": "tensors of 100 adapters, MiB",
            "process_growth_mib": "growth of the process, MiB",
            "file_mib": "file of one adapter, MiB",
            "mixed_batch_s": "batch of 32 requests for 32 adapters, s",
        }.items()
    ]
    a, b = trained["mos"], trained["lora"]
    counts = f"{a['trainable']:,}", f"{b['trainable']:,}", f"{a['trainable'] / b['trainable']:.3f}"
    rows.append(["trained parameters, 24 layers, both r=16 (MoS: e=4)", *counts])
    rows.append(["train step, s", f"{a['step_s']:.2f}", f"{b['step_s']:.2f}", between(trained["mos/lora"])])
    peaks = a["peak_mib"], b["peak_mib"]
    rows.append(["peak of two AdamW steps, MiB", *(f"{p:.0f}" for p in peaks), f"{peaks[0] / peaks[1]:.3f}"])
    return markdown(["", "MoS", "LoRA", "MoS / LoRA"], rows)


def lora_sb() -> str:
    """LoRA-SB beside LoRA, and what its start costs."""
    run = timing.load("lora_sb")
    rows = [
        [f"train step, 24 layers, {rank}, to LoRA's", between(result["ratio"]), ""]
        for rank, result in run["train_step"].items()
    ]
    for name, result in run["start"].items():
        if isinstance(result, dict) and "ratio" in result and name != "plain passes":
            extra = result["extra_mib"]
            beyond = "" if extra is None else f"{extra:.0f} MiB"
            rows.append([f"{name}, time to plain passes over the data", between(result["ratio"]), beyond])
    limit = f"start with `max_memory` of {run['start']['max_memory_mib']:.0f} MiB"
    title = f"peak beyond a train step ({limit})"
    return markdown(["", "median (range)", title], rows)


def continual_svd() -> str:
    """Continual SVD beside OSF and LoRA: leaks and training."""
    run = timing.load("continual_svd")
    trained = run["training"]
    rows = []
    for method in dict.fromkeys(row["method"] for row in run["leak"]):
        for base in ("float32", "bfloat16"):
            found = [row for row in run["leak"] if (row["method"], row["base"]) == (method, base)]
            leak = " / ".join(f"{row['leak']:.1e}" for row in found)
            rows.append(
                [f"leak, {method}, {base}, lr " + " / ".join(f"{row['rate']:g}" for row in found), leak]
            )
            if all("rounding" in row for row in found):
                added = " / ".join(f"{row['rounding']:.1e}" for row in found)
                rows.append([f"rounding of the merged {base} weight / update, {method}", added])
    for pair in ("continual_svd/osf", "continual_svd r=16/lora r=16"):
        one, other = (trained[name] for name in pair.split("/"))
        rows.append([f"trained numbers, {pair}", f"{one['trainable']:,} / {other['trainable']:,}"])
        rows.append([f"train step, {pair}", between(trained[pair])])
        rows.append([f"peak of two AdamW steps, {pair}", f"{trained[pair]['peak']:.3f}"])
    return markdown(["", "result"], rows)


def continual_tasks() -> str:
    """Sequences of text tasks: what is left of all of them at the end."""
    run = timing.load("continual_tasks")
    rows = [
        [
            method["title"],
            f"{method['trainable']:,}",
            *(spread(method[name], 3) for name in ("average_accuracy", "learned", "forgetting", "shared")),
            f"{method['rate']:g}",
            len(method["average_accuracy"]),
        ]
        for method in run["summary"].values()
    ]
    titles = [
        "average accuracy at the end",
        "right after each task",
        "forgetting",
        "one shared head",
    ]
    settings, first = run["settings"], next(iter(run["summary"].values()))
    return (
        f"{markdown(['', 'trained parameters', *titles, 'learning rate', 'runs'], rows)}\n\n"
        f"Mean ± standard deviation over the runs, {first['orders']} orders with {first['seeds']} seeds, of "
        f"{', '.join(run['classes'])}; {settings['train_rows']} rows of each, {settings['epochs']} passes, "
        f"tested on {settings['test_rows']}. The task is known when tested, but for the shared head."
    )


def effort_detector() -> str:
    """Detectors of generated images on generators seen and not seen in training."""
    run = timing.load("effort_detector")
    rows = []
    for method in run["summary"].values():
        unseen = [
            auc
            for family, aucs in method["auc_pairs"].items()
            for other, auc in aucs.items()
            if other != family
        ]
        rows.append(
            [
                method["title"],
                f"{method['trainable']:,}",
                f"{spread(method['auc_unseen'], 3)} ({min(unseen):.2f} to {max(unseen):.2f})",
                *(spread(method[name], 3) for name in ("accuracy_unseen", "auc_seen", "accuracy_seen")),
                spread(method["effective_rank"], 0),
                spread(method["outside_auc"], 3) if "outside_auc" in method else "not run",
            ]
        )
    titles = ["AUC, unseen generators (range of pairs)", "accuracy, unseen", "AUC, seen", "accuracy, seen"]
    header = ["", "trained parameters", *titles, "effective rank of the features", "AUC, outside images"]
    return f"{markdown(header, rows)}\n\n{_detector_settings(run)}"


def _detector_settings(run: dict[str, Any]) -> str:
    """What the table of detectors was measured with."""
    settings, methods = run["settings"], run["summary"].values()
    families = list(next(iter(methods))["auc_pairs"])
    rates = [f"{method['title']} {sorted(set(method['rates'].values()))}" for method in methods]
    psnr = ", ".join(f"{family} {decibel:.1f} dB" for family, decibel in run["psnr"].items())
    seeds = min(len(method["auc_unseen"]) for method in methods)
    return (
        f"Means over the pairs of generators and ± standard deviation over {seeds} seeds. Trained on one of "
        f"{', '.join(families)} for {settings['steps']} steps of {settings['batch_size']} images, tested on "
        f"{run['images']['test']} photos and as many images of each generator (PSNR: {psnr}). "
        f"Learning rates chosen in validation, for the probe its penalty: {'; '.join(rates)}."
    )


def effort() -> str:
    """Effort beside LoRA, its regularisers and its start."""
    run = timing.load("effort")
    trained, started = run["training"], run["start"]
    rows = [
        [f"train step, 24 layers, all linears, {title} / LoRA's, r=2", between(trained[name]["to_lora"])]
        for name, title in {"effort": "r=1", "effort, both losses": "r=1, both regularisers"}.items()
    ]
    peak = trained["effort"]["peak_mib"] / trained["lora"]["peak_mib"]
    rows.append(["peak of two AdamW steps / LoRA's", f"{peak:.3f}"])
    for rank, result in run["penalty"].items():
        rows.append(
            [f"regularisers of a 1024 x 1024 weight, {rank} / literal formulas", between(result["ratio"])]
        )
    full = f"{started['full_svd_s']:.1f} s, from {started['full_svd_run']} of them"
    title = f"start of {started['matrices']} matrices of 1024 x 1024 (one full SVD each: {full})"
    rows.append([title, f"{started['effort_s']:.1f} s"])
    for name, row in run["shapes"].items():
        title = f"smallest triple, {name}: error of its value, residual (to the largest value)"
        rows.append([title, f"{row['value_error']:.0e}, {row['residual']:.0e}"])
    return markdown(["", "median (range)"], rows)


def quality(name: str, claim: str) -> str:
    """One claim on real tasks, and how it was tested."""
    run = timing.load(name)
    schedule, rows = run["settings"]["schedule"], run["settings"]["rows"]
    return (
        f"{claims.table(run, claim)}\n\n"
        f"Mean ± standard deviation over {run['seeds']} seeds; {rows['train']} rows to train on, "
        f"{rows['test']} to test, at most {schedule['steps']} steps of 16, early stopping; the "
        f"best of three rates by validation loss (seed 0)."
    )


def speed(name: str) -> str:
    """Time and memory of all methods by model."""
    rows = [
        [
            f"{method}, {shape}",
            f"{row['trainable']:,}",
            *(between(row[ratio]) for ratio in ("to_lora", "to_frozen")),
            *(f"{row[key]:.2f}" for key in ("wrap_s", "load_s", "merge_s")),
            f"{row['peak_mib']:.0f}",
        ]
        for shape, methods in timing.load(name)["shapes"].items()
        for method, row in methods.items()
    ]
    seconds = ["wrap and start, s", "load, s", "merge, s", "peak, MiB"]
    return markdown(["", "trained parameters", "step / LoRA's", "step / frozen model's", *seconds], rows)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {  # where their numbers are, and what makes them
    "continual_svd": ("continual_svd.json", continual_svd),
    "continual_tasks": ("continual_tasks.json", continual_tasks),
    "demos": ("demo_*.json", demos),
    "demo_mos": ("demo_*_mos.json", lambda: demos("mos")),
    "demo_lora_sb": ("demo_*_lora-sb.json", lambda: demos("lora-sb")),
    "effort": ("effort.json", effort),
    "effort_detector": ("effort_detector.json", effort_detector),
    "features": ("features.json", lambda: features.table(timing.load("features"), markdown)),
    "flora": ("flora.json", flora),
    "inits": ("flora_inits.json", inits),
    "lora_sb": ("lora_sb.json", lora_sb),
    "mos": ("mos.json", mos),
    "speed": ("speed.json", lambda: speed("speed")),
    "speed_quick": ("speed-quick.json", lambda: speed("speed-quick")),
    **{
        f"quality_{name}{suffix}": (f"quality{size}.json", partial(quality, f"quality{size}", name))
        for name in claims.CLAIMS
        for suffix, size in (("", ""), ("_small", "-small"))
    },
}


def main() -> None:
    """Replace what stands between the markers."""
    for page in [ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*.md"))]:
        page.write_text(filled(page.read_text()))


def filled(text: str) -> str:
    """A page with its tables."""
    for name, (source, table) in TABLES.items():
        marker = f"<!-- table: {name} -->\n"
        if marker not in text or not list(timing.RESULTS.glob(source)):
            continue
        text = re.sub(
            f"{re.escape(marker)}.*?<!-- end -->", f"{marker}{table()}\n<!-- end -->", text, flags=re.S
        )
    return text


if __name__ == "__main__":
    main()
