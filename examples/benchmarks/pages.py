"""Write the results in `examples/benchmarks/results` into README.md, docs/benchmarks and the model cards.

python examples/benchmarks/pages.py

Tables stand between `<!-- table: NAME -->` and `<!-- end -->`, figures between `<!-- figure: NAME -->` and
`<!-- end -->`, and the results in a card's header between `# results` and `# end`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import brief
import cards
import claims
import dimension
import directions
import editing
import features
import figures
import file_sizes
import first_step
import heads
import keep_zeros
import learning_rates
import memorized_images
import merging
import merging_backdoor
import merging_quality
import mixed_batch
import pareto
import timing
import unlearning
import verdicts
from claims import kind_of, markdown, spread
from figures import sequences

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "benchmarks").glob("*.md")),
    ROOT / "docs" / "developer" / "coverage.md",
    ROOT / "docs" / "guides" / "choosing_a_method.md",
    ROOT / "docs" / "guides" / "editing.md",
    ROOT / "docs" / "guides" / "heads.md",
    ROOT / "docs" / "guides" / "pruned_models.md",
    *sorted((ROOT / "model_cards").glob("*.md")),
]


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
    """LoRA-SB beside LoRA, and what its initialization costs."""
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
        rows.append([f"trainable parameters, {pair}", f"{one['trainable']:,} / {other['trainable']:,}"])
        rows.append([f"train step, {pair}", between(trained[pair])])
        rows.append([f"peak of two AdamW steps, {pair}", f"{trained[pair]['peak']:.3f}"])
    return markdown(["", "result"], rows)


def continual_tasks(name: str) -> str:
    """Sequences of text tasks: what is left of all of them at the end."""
    run = timing.load(name)
    gaps = {method: verdicts.paired(run, method) for method in run["summary"]}
    rows = [
        [
            method["title"],
            f"{method['trainable']:,}",
            *(spread(method[part], 3) for part in ("average_accuracy", "learned", "forgetting", "shared")),
            spread(gaps[key], 3) if gaps[key] else "",
            f"{method['rate']:g}",
            len(method["average_accuracy"]),
        ]
        for key, method in run["summary"].items()
    ]
    titles = [
        "average accuracy at the end",
        "right after each task",
        "forgetting",
        "one shared head",
        "Continual SVD minus it, at the end",
    ]
    header = ["", "trained parameters", *titles, "learning rate", "runs"]
    parts = (markdown(header, rows), continual_verdict(name), _sequence_settings(run))
    return "\n\n".join(part for part in parts if part)


def continual_verdict(name: str) -> str:
    """Which methods Continual SVD lies above and below at the end of sequences."""
    run = timing.load(name)
    gaps = {method["title"]: verdicts.paired(run, key) for key, method in run["summary"].items()}
    heads = ", with heads at a rate of their own," * run["settings"]["own_head_rate"]
    return verdicts.standing(f"At the end of {', '.join(run['classes'])}{heads} Continual SVD", gaps)


def _sequence_settings(run: dict[str, Any]) -> str:
    """What a table of sequences was measured with."""
    settings = run["settings"]
    runs = [one for method in run["summary"] for one in sequences.tested(run, method)]
    orders = list(dict.fromkeys(", ".join(one["order"]) for one in runs))
    count = f"{len(orders)} order{'s' * (len(orders) > 1)}"
    seeds = len({one["seed"] for one in runs})
    own = "heads train with the one that is best for the head alone"
    heads = own if settings["own_head_rate"] else "head and update share one"
    classes = ", ".join(f"{task} ({number} classes)" for task, number in run["classes"].items())
    return (
        f"{settings['model'] or 'MiniLM'} on {classes}. Mean ± standard deviation over the runs: {count} "
        f"({'; '.join(orders)}), each with up to {seeds} seed{'s' * (seeds > 1)}. "
        f"{settings['train_rows']} rows of each task, of at most {settings['max_length']} tokens, "
        f"{settings['epochs']} passes in batches of {settings['batch_size']}, "
        f"{100 * settings['preserve']:g} % of the directions protected; tested on "
        f"{settings['test_rows']} rows. Learning rates have the best average on "
        f"{settings['validation_rows']} validation rows, in the first order with seed 0; {heads}. "
        f"The task is known when tested, but for the shared head. {measured_with(run)}"
    )


def measured_with(run: dict[str, Any]) -> str:
    """Device, where it was noted, and versions."""
    versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items() if name != "peft-subspace")
    device = f"on {run['device']} " if "device" in run else ""
    threads = f" and {run['threads']} thread{'s' * (run['threads'] > 1)}" if "threads" in run else ""
    return f"Measured {device}with {versions}{threads}."


def spectra() -> str:
    """Effective ranks of what each method trains."""
    run = timing.load("spectra")
    settings, methods = run["settings"], run["methods"]
    rows = [
        [
            method["title"],
            method["size"] or "",
            f"{method['trainable']:,}",
            f"{method['rate']:g}",
            f"{statistics.median(ranks):.1f} ({min(ranks):.1f} to {max(ranks):.1f})",
            f"{method['test_accuracy']:.3f}",
        ]
        for method in methods.values()
        for ranks in [method["effective_ranks"].values()]
    ]
    title = "effective rank of the updates, median (range)"
    header = ["", "rank", "trained parameters, head included", "learning rate", title, "test accuracy"]
    return (
        f"{markdown(header, rows)}\n\n"
        f"{settings['task']}, texts of {settings['tokens']} tokens; {settings['steps']} steps of "
        f"{settings['batch_size']} rows, seed {settings['seed']}, so that accuracies only say that all have "
        f"learned. Effective rank: the exponential of the entropy of the singular values, as parts of their "
        f"sum. The rank of MoS is its budget. {measured_with(run)}"
    )


def effort_claim() -> str:
    """Whether detectors trained with Effort carry over to other generators better than others do."""
    methods = timing.load("effort_detector")["summary"]
    ours = methods["effort"]["auc_unseen"]
    gaps = {
        method["title"]: [one - other for one, other in zip(ours, method["auc_unseen"], strict=False)]
        for name, method in methods.items()
        if name != "effort"
    }
    return (
        "Claim: detectors of generated images that are trained with Effort carry over to unseen generators "
        "better than those of LoRA and full fine-tuning.\n\n"
        f"{verdicts.standing('By the AUC on unseen generators, seed by seed, Effort', gaps)}"
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
    """Effort beside LoRA, its regularizers and its initialization."""
    run = timing.load("effort")
    trained, started = run["training"], run["start"]
    rows = [
        [f"train step, 24 layers, all linears, {title} / LoRA's, r=2", between(trained[name]["to_lora"])]
        for name, title in {"effort": "r=1", "effort, both losses": "r=1, both regularizers"}.items()
    ]
    peak = trained["effort"]["peak_mib"] / trained["lora"]["peak_mib"]
    rows.append(["peak of two AdamW steps / LoRA's", f"{peak:.3f}"])
    for rank, result in run["penalty"].items():
        rows.append(
            [f"regularizers of a 1024 x 1024 weight, {rank} / literal formulas", between(result["ratio"])]
        )
    full = f"{started['full_svd_s']:.1f} s, from {started['full_svd_run']} of them"
    title = f"start of {started['matrices']} matrices of 1024 x 1024 (one full SVD each: {full})"
    rows.append([title, f"{started['effort_s']:.1f} s"])
    for name, row in run["shapes"].items():
        title = f"smallest triple, {name}: error of its value, residual (to the largest value)"
        rows.append([title, f"{row['value_error']:.0e}, {row['residual']:.0e}"])
    return markdown(["", "median (range)"], rows)


def quality(name: str, claim: str) -> str:
    """One claim on real tasks, whether it held, and how it was tested."""
    run, subject = timing.load(name), claims.label(claims.CLAIMS[claim].subject)
    table = claims.table(run, claim)
    if all(one["entry"] != subject for one in run["runs"].values()):
        return table
    return f"{table}\n\n{verdicts.verdict(run, claim)}\n\n{_quality_settings(run, claim)}"


def longer_verdict(claim: str) -> str:
    """Whether a claim held where all trained for longer."""
    return verdicts.verdict(timing.load("quality-x3"), claim)


def _quality_settings(run: dict[str, Any], claim: str) -> str:
    """What a claim was tested with."""
    of_claim = [one for one in run["runs"].values() if kind_of(one["task"]) in claims.CLAIMS[claim].kinds]
    tried: dict[tuple[str, str], set[float]] = {}
    for one in of_claim:
        tried.setdefault((one["task"], one["entry"]), set()).add(one["rate"])
    counts = sorted({len(rates) for rates in tried.values()})
    rates = " to ".join(f"{count}" for count in dict.fromkeys((counts[0], counts[-1])))
    kinds = dict.fromkeys(kind_of(task) for task, _ in tried)
    settings = " ".join(_kind_settings(kind, run["settings"][kind]) for kind in kinds)
    origins = dict.fromkeys(one["origin"] for one in of_claim)
    return (
        f"Mean ± standard deviation over {run['seeds']} seeds. {settings} Stopped early. Learning rate: "
        f"the one of {rates} with the least validation loss with seed 0; new heads have the one that is best "
        f"for them alone. Measured on {'; '.join(origins)}."
    )


def _kind_settings(kind: str, settings: dict[str, Any]) -> str:
    """Rows and steps of one kind of tasks."""
    rows, schedule = settings["rows"], settings["schedule"]
    unit = "pixels" if "pixels" in rows else "tokens"
    return (
        f"{kind.capitalize()}: {rows['train']} rows to train on, {rows['validation']} to validate, "
        f"up to {rows['test']} to test, of at most {rows[unit]} {unit}; at most {schedule['steps']} steps of "
        f"{schedule['batch_size']} rows{', bfloat16' * schedule.get('bf16', False)}."
    )


def speed(name: str) -> str:
    """Time and memory of all methods on one model."""
    run = timing.load(name)
    rows = [
        [
            f"{method}, {run['model']}",
            f"{row['trainable']:,}",
            *(between(row[ratio]) for ratio in ("to_lora", "to_frozen")),
            *(f"{row[key]:.2f}" for key in ("wrap_s", "load_s", "merge_s")),
            f"{row['peak_mib']:.0f}",
        ]
        for method, row in run["methods"].items()
    ]
    seconds = ["wrap and start, s", "load, s", "merge, s", "peak, MiB"]
    table = markdown(["", "trained parameters", "step / LoRA's", "step / frozen model's", *seconds], rows)
    return f"{table}\n\nMedians, with the range of the ratios. {measured_with(run)}"


def growth() -> str:
    """Steps of our methods beside LoRA's as a model, its rank and its batch grow."""
    run = timing.load("speed-growth")
    sizes = ["rank", "layers", "width", "batch"]
    points = [(what, point) for what, points in run["growth"].items() for point in points]
    rows = [
        [what, *(point[size] for size in sizes), *(between(ratio) for ratio in point["to_lora"].values())]
        for what, point in points
    ]
    header = ["what grows", *sizes, *(f"{method} / LoRA's" for method in points[0][1]["to_lora"])]
    return f"{markdown(header, rows)}\n\nMedians, with their range. {measured_with(run)}"


def sizes(name: str) -> str:
    """Disk and memory of adapters."""
    return file_sizes.table(timing.load("file_sizes"), name)


def merged(kind: str) -> str:
    """Accuracy of merged adapters of one kind."""
    return merging_quality.table(timing.load("merging_quality"), kind)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {  # where their numbers are, and what makes them
    "continual_svd": ("continual_svd.json", continual_svd),
    **{name: (f"{name}.json", partial(continual_tasks, name)) for name in verdicts.SEQUENCES},
    **{f"{name}_verdict": (f"{name}.json", partial(continual_verdict, name)) for name in verdicts.SEQUENCES},
    "dimension": ("dimension.json", lambda: dimension.table(timing.load("dimension"))),
    "demos": ("demo_*.json", demos),
    "demo_mos": ("demo_*_mos.json", lambda: demos("mos")),
    "demo_lora_sb": ("demo_*_lora-sb.json", lambda: demos("lora-sb")),
    "editing": ("editing.json", lambda: editing.table(timing.load("editing"))),
    "effort": ("effort.json", effort),
    "effort_claim": ("effort_detector.json", effort_claim),
    "effort_detector": ("effort_detector.json", effort_detector),
    "features": ("features.json", lambda: features.table(timing.load("features"), markdown)),
    "reach": ("reach.json", lambda: features.kinds(timing.load("reach"), markdown)),
    "first_step": ("first_step.json", lambda: first_step.table(timing.load("first_step"))),
    "flora": ("flora.json", flora),
    "inits": (
        "flora_inits.json",
        lambda: learning_rates.table(timing.load("flora_inits"), before=False),
    ),
    "heads": ("heads.json", lambda: heads.table(timing.load("heads"))),
    "keep_zeros": ("keep_zeros.json", lambda: keep_zeros.table(timing.load("keep_zeros"))),
    "directions": ("directions.json", lambda: directions.table(timing.load("directions"))),
    "learning_rates": (
        "learning_rates.json",
        lambda: learning_rates.table(timing.load("learning_rates"), before=False),
    ),
    "lora_sb": ("lora_sb.json", lora_sb),
    "memorized_images": (
        "memorized_images.json",
        lambda: memorized_images.table(timing.load("memorized_images")),
    ),
    "merging": ("merging.json", lambda: merging.table(timing.load("merging"))),
    "merging_backdoor": (
        "merging_backdoor.json",
        lambda: merging_backdoor.table(timing.load("merging_backdoor")),
    ),
    **{f"merging_{kind}": ("merging_quality.json", partial(merged, kind)) for kind in merging_quality.KINDS},
    "merging_counts": (
        "merging_quality.json",
        lambda: merging_quality.by_count(timing.load("merging_quality"), "lora"),
    ),
    "merging_rows": ("merging_quality.json", lambda: merging_quality.limits(timing.load("merging_quality"))),
    "mos": ("mos.json", mos),
    "pareto": ("pareto.json", lambda: pareto.table(timing.load("pareto"))),
    "mixed_batch": ("mixed_batch.json", lambda: mixed_batch.table(timing.load("mixed_batch"))),
    **{f"file_sizes_{name}": ("file_sizes.json", partial(sizes, name)) for name in file_sizes.TITLES},
    "methods": ("quality.json", brief.table),
    "spectra": ("spectra.json", spectra),
    "unlearning": ("unlearning.json", lambda: unlearning.table(timing.load("unlearning"))),
    "growth": ("speed-growth.json", growth),
    **{
        f"speed_{of}": (f"speed-{of}.json", partial(speed, f"speed-{of}"))
        for of in ("quick", "quick-gpu", "300M", "1B")
    },
    **{
        f"quality_{name}{suffix}": (f"quality{size}.json", partial(quality, f"quality{size}", name))
        for name in claims.CLAIMS
        for suffix, size in (("", ""), ("_small", "-small"), ("_longer", "-x3"))
    },
    **{
        f"quality_{name}_longer_verdict": ("quality-x3.json", partial(longer_verdict, name))
        for name in claims.CLAIMS
    },
}


MARKED = re.compile(r"<!-- (table|figure): ([\w-]+) -->\n.*?<!-- end -->", re.S)


def main() -> None:
    """Replace what stands between the markers, and draw the figures."""
    drawn = {name: figures.draw(name) for name in figures.FIGURES}
    for page in PAGES:
        text = filled(page.read_text(), drawn, page.parent)
        page.write_text(cards.with_results(text, page.stem) if page.stem in cards.NAMES else text)


def filled(text: str, drawn: dict[str, str | None] | None = None, folder: Path = ROOT) -> str:
    """A page with its tables and figures, or with a word instead of what has not been measured.

    Args:
        text: The page.
        drawn: What the figures show, by name; None for those that there are not.
        folder: Where the page lies.
    """

    def part(marked: re.Match[str]) -> str:
        kind, name = marked.groups()
        made = _table(name) if kind == "table" else _figure(name, (drawn or {})[name], folder)
        return f"<!-- {kind}: {name} -->\n{made}<!-- end -->"

    return MARKED.sub(part, text)


def _table(name: str) -> str:
    source, make = TABLES[name]
    return f"{make()}\n" if list(timing.RESULTS.glob(source)) else "Not measured yet.\n"


def _figure(name: str, shows: str | None, folder: Path) -> str:
    path = os.path.relpath(figures.FOLDER / f"{name}.png", folder)
    return f"![{shows}]({path})\n" if shows else ""


if __name__ == "__main__":
    main()
