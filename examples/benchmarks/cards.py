"""The part of a model card's header that holds what was measured, in the format of the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import claims
import timing
from claims import kind_of, spread
from verdicts import SEQUENCES

NAMES = {
    "flora": "FLoRA",
    "mos": "MoS",
    "effort": "Effort",
    "lora-sb": "LoRA-SB",
    "continual-svd": "Continual SVD",
}
"""Methods by the names of their cards."""

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
CLIP = "openai/clip-vit-base-patch16"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASES = {"text": MINILM, "clip": CLIP, "decoder": SMOLLM2}
"""Base models on the Hub, by kind of task; those of MobileNetV2 and of the ResNet come from elsewhere."""

DATASETS = {  # name and, where the Hub has it, id
    "agnews": ("AG News", "fancyzhx/ag_news"),
    "agnews-generation": ("AG News", "fancyzhx/ag_news"),
    "amazon": ("Amazon reviews (five classes)", None),
    "bbcnews": ("BBC News", None),
    "cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "clip-cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "clip-fewshot": ("CIFAR-10, 16 images a class", "uoft-cs/cifar10"),
    "clinc150": ("CLINC150", "clinc/clinc_oos"),
    "dbpedia": ("DBpedia (14 classes)", "fancyzhx/dbpedia_14"),
    "digits": ("handwritten digits of scikit-learn", None),
    "gsm8k-svamp": ("SVAMP after training on GSM8K", "openai/gsm8k"),
    "imdb": ("IMDb", "stanfordnlp/imdb"),
    "resnet-cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "resnet-digits": ("handwritten digits of scikit-learn", None),
    "sst2": ("SST-2", "stanfordnlp/sst2"),
    "subj": ("SUBJ", "SetFit/subj"),
    "trec6": ("TREC (6 classes)", "CogComp/trec"),
    "yelp": ("Yelp reviews (five classes)", "Yelp/yelp_review_full"),
}
KINDS = {
    "text": "text-classification",
    "images": "image-classification",
    "resnet": "image-classification",
    "clip": "image-classification",
    "decoder": "text-generation",
}

Found = tuple[str | None, list[str], EvalResult]
"""Base model, names of the data sets, and what was measured."""


def header(method: str) -> str:
    """Base models, data sets, metrics and `model-index` of a card, as YAML."""
    found = [*_claims(method), *_sequences(method), *_detectors(method), *_demos(method)]
    bases = [base for base, _, _ in found if base is not None]
    datasets = [_dataset(name)[1] for _, names, _ in found for name in names]
    data = ModelCardData(
        base_model=_distinct(bases),
        datasets=_distinct(datasets),
        metrics=_distinct([result.metric_type for _, _, result in found]),
        model_name=NAMES[method] if found else None,
        eval_results=[result for _, _, result in found] or None,
    )
    return data.to_yaml()


def with_results(text: str, method: str) -> str:
    """A card whose header holds the results, between the comments `# results` and `# end`."""
    return re.sub(
        r"# results\n.*?# end\n", lambda _: f"# results\n{header(method)}\n# end\n", text, flags=re.S
    )


def _distinct(values: list[Any]) -> list[Any] | None:
    return [value for value in dict.fromkeys(values) if value is not None] or None


def _claims(method: str) -> Iterator[Found]:
    """Accuracies of the method of a claim on every task, from the large comparison or else the small one."""
    name = next((n for n in ("quality", "quality-small") if (timing.RESULTS / f"{n}.json").exists()), None)
    if name is None or method not in claims.CLAIMS:
        return
    content, subject = timing.load(name), claims.CLAIMS[method].subject
    for task in dict.fromkeys(run["task"] for run in content["runs"].values()):
        runs = claims.chosen(content, task, subject)
        if runs:
            kind = kind_of(task)
            value = spread([run["test_accuracy"] for run in runs], 3)
            measure = "accuracy of the likeliest answer" if kind == "decoder" else "accuracy"
            where = f"{claims.label(subject)} on {claims.NETWORKS[kind]}"
            about = f"{measure}, {where}, {_count(len(runs), 'seed')}"
            yield BASES.get(kind), [task], _result(KINDS[kind], [task], "accuracy", value, about)


def _sequences(method: str) -> Iterator[Found]:
    """Average accuracies at the end of sequences of tasks."""
    for name in SEQUENCES:
        if not (timing.RESULTS / f"{name}.json").exists():
            continue
        content = timing.load(name)
        found = content["summary"].get(method)
        if found:
            base = MINILM if content["settings"]["model"] is None else SMOLLM2
            tasks, values = list(content["classes"]), found["average_accuracy"]
            heads = ", heads at a rate of their own" * content["settings"]["own_head_rate"]
            about = f"average accuracy at the end, task known{heads}, {_count(len(values), 'run')}"
            value = spread(values, 3)
            yield base, tasks, _result("text-classification", tasks, "accuracy", value, about)


def _detectors(method: str) -> Iterator[Found]:
    """Detectors of generated images, on generators not seen in training."""
    if method != "effort" or not (timing.RESULTS / "effort_detector.json").exists():
        return
    content = timing.load("effort_detector")
    found = content["summary"][method]
    photos = content["settings"]["images"] or "cifar10"
    for key, metric, title in (("auc_unseen", "roc_auc", "AUC"), ("accuracy_unseen", "accuracy", "accuracy")):
        about = f"{title} on unseen generators, {_count(len(found[key]), 'seed')}"
        yield (
            CLIP,
            [photos],
            _result(
                "image-classification", [photos], metric, spread(found[key], 3), about, "generated images"
            ),
        )


def _demos(method: str) -> Iterator[Found]:
    """The demos of `make demo` and `make demo-text`."""
    for file in sorted(timing.RESULTS.glob(f"demo_*_{method}.json")):
        task = file.stem.split("_")[1]
        scores = [run["results"][-1]["score"] for run in timing.load(file.stem)["runs"]]
        about = f"accuracy of the demo, {_count(len(scores), 'seed')}"
        kind = kind_of(task)
        yield BASES.get(kind), [task], _result(KINDS[kind], [task], "accuracy", spread(scores, 3), about)


def _result(task: str, names: list[str], metric: str, value: str, about: str, beside: str = "") -> EvalResult:
    titles = [_dataset(name)[0] for name in names] + [beside] * bool(beside)
    return EvalResult(
        task_type=task,
        dataset_type=_dataset(names[0])[1] or names[0] if len(names) == 1 else "sequence",
        dataset_name=", then ".join(titles) if len(names) > 1 else " and ".join(titles),
        dataset_split="test",
        metric_type=metric,
        metric_value=value,
        metric_name=about,
    )


def _dataset(name: str) -> tuple[str, str | None]:
    return DATASETS.get(name, (name, None))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"
