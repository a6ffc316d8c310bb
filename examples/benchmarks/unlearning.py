"""A decoder that recites texts is made to forget them: what does it still recite, and what else is lost?

    python examples/benchmarks/unlearning.py --data FOLDER --decoder DIRECTORY [--seeds 3]

All weights train on 200 news texts until nearly all are recited from their first words. `edit_by_curvature`
and `prune_by_contrast` then work on a few MLPs; beside them stand noise and a truncated SVD of the same
weights, and gradient ascent on the texts, alone and with descent on other news. Each goes from weak to
strong, until nothing is recited. Told at each strength: texts recited word by word, and nearly; the
perplexity of other news; the loss of worked answers of GSM8K; topics of news, chosen among four words.
`FOLDER` holds text/agnews.{train,test}.jsonl.gz and math/gsm8k.test.jsonl.gz. An interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from claims import markdown, spread
from peft_subspace.edits import edit_by_curvature, prune_by_contrast, sampled_loss
from peft_subspace.statistics import collect
from support import texts
from support.changes import added, changed
from support.decoding import Decoder, parser, perplexity, said
from support.results import Results, Run

SIZES = {"recited": 200, "statistics": 400, "validation": 40, "news": 60, "tokens": 32, "begun": 12}
PROBLEMS = 20
TOPICS = {
    "World": " World",
    "Sports": " Sports",
    "Business": " Business",
    "Science or Technology": " Science",
}
RATE, PASSES, BATCH = 2e-4, 8, 10
STEPS = (1, 2, 3, 4, 6, 8, 12)
KEEPS = (0.95, 0.9, 0.8, 0.7, 0.65, 0.6, 0.5)
SHARES = (0.01, 0.03, 0.1, 0.2, 0.3)
NORMS = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
ASCENTS = {
    f"gradient ascent{other}, {rate:g}": (rate, bool(other))
    for other in ("", " and descent on news")
    for rate in (3e-5, 1e-4)
}


def noise(weight: Tensor, norm: float, seed: int) -> Tensor:
    """Noise of a norm, relative to the weight's."""
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return drawn * (norm * weight.detach().norm() / drawn.norm())


def truncation(weight: Tensor, norm: float, seed: int) -> Tensor:
    """What a weight has in its smallest singular values, as many of them as a relative norm allows."""
    u, values, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    dropped = values.flip(0).square().cumsum(0).flip(0) <= norm**2 * values.square().sum()
    return -(u * (values * dropped)) @ vh


PLAIN: dict[str, Callable[[Tensor, float, int], Tensor]] = {"noise": noise, "truncated SVD": truncation}
BEFORE, AFTER = "before the texts are memorized", "as memorized"
CURVED, PRUNED = "edit_by_curvature", "prune_by_contrast"
ENTRIES = (
    BEFORE,
    AFTER,
    CURVED,
    *PLAIN,
    PRUNED,
    *ASCENTS,
)
FORGOTTEN = 0.05
MEASURES = {
    "strict": "recited",
    "loose": "nearly recited",
    "perplexity": "perplexity of news",
    "problems": "loss of GSM8K's answers",
    "topics": "topics told",
}


class Unlearning:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        about = {"layers": options.layers, "sizes": SIZES, "rate": RATE, "passes": PASSES, "batch": BATCH}
        self.results = Results(options.results, about)
        self.decoder = Decoder(options.decoder)
        self.targets = [
            f"model.layers.{n}.mlp.{part}_proj" for n in options.layers for part in ("gate", "up")
        ]
        count, tokens = SIZES["statistics"] + SIZES["validation"], SIZES["tokens"]
        news = self.decoder.cut(self._news("train"), count + 10 * SIZES["recited"], tokens)
        self.kept, self.validation = news[: SIZES["statistics"]], news[SIZES["statistics"] : count]
        self.candidates = news[count:]
        self.memorized: dict[int, dict[str, Tensor]] = {}

    def _news(self, split: str) -> Path:
        return self.options.data / "text" / f"agnews.{split}.jsonl.gz"

    @cached_property
    def asked(self) -> dict[str, list[Any]]:
        """What no method has seen: news, news with their topics, questions with their answers."""
        ids, labels = self.decoder.ids, list(TOPICS)
        rows = itertools.islice(texts.lines(self._news("test")), SIZES["news"])
        topics = [(ids(row["text"].strip() + "\nTopic:"), labels.index(row["label"])) for row in rows]
        rows = itertools.islice(texts.lines(self.options.data / "math" / "gsm8k.test.jsonl.gz"), PROBLEMS)
        problems = [(ids(f"Question: {r['question']}\nAnswer:"), ids(f" {r['answer']}")) for r in rows]
        news = self.decoder.cut(self._news("test"), SIZES["news"], SIZES["tokens"])
        return {"news": news, "topics": topics, "problems": problems}

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure`, by their keys."""
        runs = itertools.product(range(self.options.seeds), ENTRIES)
        return {f"{entry} {seed}": (entry, seed) for seed, entry in runs}

    def measure(self, entry: str, seed: int) -> Run:
        """What is left at each strength, from weak to strong, until nothing is recited."""
        recited = random.Random(seed).sample(self.candidates, SIZES["recited"])
        model = self.decoder.load() if entry == BEFORE else self.memorize(recited, seed)
        points: list[Run] = []
        for strength, update in self.updates(entry, model, recited, seed):
            with changed(model, update):
                about = {"strength": strength, "norm": relative(model, update)}
                points.append(about | self.told(model, recited))
            if not points[-1]["strict"]:
                break
        return {"entry": entry, "seed": seed, "points": points}

    def memorize(self, recited: list[Tensor], seed: int) -> Any:
        """A model that knows the texts by heart."""
        model = self.decoder.load()
        if seed not in self.memorized:
            descend(model, recited, seed)
            self.memorized = {seed: {name: value.clone() for name, value in model.state_dict().items()}}
        model.load_state_dict(self.memorized[seed])
        return model

    def updates(
        self, entry: str, model: Any, recited: list[Tensor], seed: int
    ) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Strengths, with what is added to the weights; ascent changes the model itself."""
        if entry in (BEFORE, AFTER):
            yield 0.0, {}
        elif entry in ASCENTS:
            yield from ((step, {}) for step in self.ascent(model, recited, *ASCENTS[entry], seed))
        elif entry == PRUNED:
            target, reference = (
                self.statistics(model, rows, inputs="norms") for rows in (recited, self.kept)
            )
            for share in SHARES:
                yield share, added(prune_by_contrast(model, target, reference, share=share))
        elif entry == CURVED:
            options = {"gradients": True, "loss_fn": sampled_loss}
            moments = self.statistics(model, self.kept, **options)
            for keep in KEEPS:
                yield keep, added(edit_by_curvature(model, moments, keep=keep))
        else:
            weights = {name: model.get_submodule(name).weight for name in self.targets}
            for norm in NORMS:
                yield norm, {name: PLAIN[entry](weight, norm, seed) for name, weight in weights.items()}

    def statistics(self, model: Any, rows: list[Tensor], **options: Any) -> Any:
        """Statistics of the edited layers."""
        batches = [{"input_ids": batch} for batch in torch.cat(rows).split(20)]
        return collect(model, batches, target_modules=self.targets, progress=False, **options)

    def ascent(
        self, model: Any, recited: list[Tensor], rate: float, descend: bool, seed: int
    ) -> Iterator[int]:
        """Steps up the loss of the texts, where told down that of other news; the model is changed."""
        rng, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
        for step in range(1, STEPS[-1] + 1):
            optimizer.zero_grad()
            for rows, sign in ((recited, -1), (self.kept, 1))[: 1 + descend]:
                batch = torch.cat(rng.sample(rows, BATCH))
                (sign * model(batch, labels=batch).loss).backward()
            optimizer.step()
            if step in STEPS:
                yield step

    @torch.no_grad()
    def told(self, model: Any, recited: list[Tensor]) -> Run:
        """What is recited, and how well all else is known."""
        asked, total, count, right = self.asked, 0.0, 0, 0
        for question, answer in asked["problems"]:
            logits = model(torch.cat([question, answer], dim=1)).logits[0, question.shape[1] - 1 : -1]
            total += nn.functional.cross_entropy(logits, answer[0], reduction="sum").item()
            count += answer.shape[1]
        words = [self.decoder.ids(word)[0, 0] for word in TOPICS.values()]
        for text, label in asked["topics"]:
            right += int(model(text).logits[0, -1, words].argmax()) == label
        return {
            **recitation(model, recited),
            "validation": perplexity(model, self.validation),
            "perplexity": perplexity(model, asked["news"]),
            "problems": total / count,
            "topics": right / len(asked["topics"]),
        }


def descend(model: Any, rows: list[Tensor], seed: int) -> None:
    """Train all weights on texts, with a rate that goes to zero."""
    rng, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, PASSES * len(rows) // BATCH)
    for _ in range(PASSES):
        for batch in torch.cat(rng.sample(rows, len(rows))).split(BATCH):
            optimizer.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            schedule.step()


def recitation(model: Any, recited: list[Tensor]) -> dict[str, float]:
    """Part of the texts that go on as they did: in each token, and in three of four (by longest matches)."""
    begun = SIZES["begun"]
    wanted = [row[0, begun:].tolist() for row in recited]
    found = said(model, [row[:, :begun] for row in recited], SIZES["tokens"] - begun)
    alike = [
        difflib.SequenceMatcher(None, *pair, autojunk=False).ratio()
        for pair in zip(found, wanted, strict=True)
    ]
    return {
        "strict": sum(one == 1 for one in alike) / len(alike),
        "loose": sum(one >= 0.75 for one in alike) / len(alike),
    }


def relative(model: Any, update: dict[str, Tensor]) -> float:
    """Norm of what was added to weights, relative to theirs before."""
    change = sum(float(each.square().sum()) for each in update.values())
    before = sum(
        float((model.get_submodule(name).weight - each).square().sum()) for name, each in update.items()
    )
    return (change / before) ** 0.5 if update else 0.0


def chosen(run: Run) -> Run:
    """The point of least perplexity in validation where hardly a text is recited, else the last."""
    forgotten = [point for point in run["points"] if point["strict"] <= FORGOTTEN]
    return min(forgotten, key=lambda point: point["validation"]) if forgotten else run["points"][-1]


def table(content: dict[str, Any]) -> str:
    """What is measured by entry, over seeds."""
    rows = []
    for entry in ENTRIES:
        points = [chosen(run) for run in content["runs"].values() if run["entry"] == entry]
        if points:
            strengths = ", ".join(f"{value:g}" for value in sorted({point["strength"] for point in points}))
            cells = [spread([point[name] for point in points], 2) for name in MEASURES]
            rows.append([entry, strengths, *cells, str(len(points))])
    return markdown(["", "strength", *MEASURES.values(), "seeds"], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__.splitlines()[0], "unlearning")
    made.add_argument("--layers", type=int, nargs="+", default=[18, 19, 20], help="layers to edit")
    return made.parse_args(arguments)


def main() -> None:
    """Run what is missing, and print what was found."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    work = Unlearning(parse_arguments())
    work.results.complete(work, 1)
    print(table(work.results.content))


if __name__ == "__main__":
    main()
