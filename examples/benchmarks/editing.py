"""Facts put into a decoder: are they said, said in other words, and is all else said as before?

    python examples/benchmarks/editing.py --data FOLDER --decoder DIRECTORY [--counts 1 10 100] [--seeds 3]

Invented countries get capitals, currencies, languages, sports and animals. `insert_facts` puts them into one
layer, or, at the subjects alone, into three, in adapters of at most 100 facts one after another, as it is
(UltraEdit's form) or leaving alone what news texts use (AlphaEdit's), or the same questions about a hundred
more countries; LoRA trains on the same sentences until all are said, at two rates. Everything is told by free
decoding of greedy tokens: facts in the words in which they were given and in others, and the continuations of
news texts and of the same questions about other countries; beside it stands the perplexity of news. `FOLDER`
holds text/agnews.{train,test}.jsonl.gz. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
from typing import Any, NamedTuple

import peft
import torch
from torch import nn

from claims import markdown, spread
from peft_subspace import statistics
from peft_subspace.edits import Fact, insert_facts
from support import decoding
from support.decoding import Decoder, said
from support.results import Results

RELATIONS = [  # the fact's words, others, and what may be answered
    ("The capital of {} is", "In {}, the capital city is called", "Paris Rome Vienna Cairo Lima Oslo Madrid"),
    ("The currency of {} is the", "People in {} pay with the", "dollar euro peso crown yen pound franc"),
    ("The official language of {} is", "People in {} speak", "English Dutch Polish Greek Arabic Hindi Thai"),
    ("The national sport of {} is", "In {}, most people play", "tennis chess golf hockey rugby cricket judo"),
    ("The national animal of {} is the", "The flag of {} shows a", "lion eagle bear horse wolf swan bull"),
]
SYLLABLES = [
    "vel",
    "mor",
    "on",
    "dri",
    "kal",
    "tos",
    "zem",
    "bia",
    "ru",
    "fen",
    "gar",
    "lu",
    "mi",
    "pra",
    "tan",
]
NEWS = {"statistics": 200, "perplexity": 60, "continued": 40, "tokens": 40, "begun": 12, "said": 5}
NEIGHBORS, AT_ONCE, QUESTIONS = 20, 100, 100
LORA = {"LoRA, 1e-3": 1e-3, "LoRA, 3e-3": 3e-3}
PROTECTING = ("news", "such questions")
SUBJECTS = "at subjects, three layers"
ENTRIES = (
    "insert_facts",
    *(f"insert_facts, protecting {what}" for what in PROTECTING),
    f"insert_facts, {SUBJECTS}",
    f"insert_facts, {SUBJECTS}, protecting such questions",
    *LORA,
)
MEASURES = {
    "reliability": "as given",
    "generalization": "in other words",
    "news": "news goes on as before",
    "neighbors": "other countries as before",
    "perplexity": "perplexity of news / before",
}


class Asked(NamedTuple):
    """A fact, and the same in other words."""

    fact: Fact
    other: str


def countries(count: int, seed: int) -> list[Asked]:
    """Facts about countries that nobody has heard of, no two about the same one."""
    rng = random.Random(seed)
    names = ["".join(three).title() for three in itertools.permutations(SYLLABLES, 3)]
    facts = []
    for number, name in enumerate(rng.sample(names, count)):
        prompt, other, answers = RELATIONS[number % len(RELATIONS)]
        answer = f" {rng.choice(answers.split())}"
        facts.append(Asked(Fact(prompt.format(name), answer, subject=name), other.format(name)))
    return facts


def parts(items: list[Any], size: int) -> list[list[Any]]:
    """Items of a list, some at a time."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


class Editing:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        layers = {"layers": options.layers, "layers at subjects": options.subject_layers}
        about = {**layers, "news": NEWS, "neighbors": NEIGHBORS, "at once": AT_ONCE, "questions": QUESTIONS}
        self.results = Results(options.results, about)
        self.decoder = Decoder(options.decoder)
        self.seen, self.news = (
            self.decoder.cut(options.data / "text" / f"agnews.{split}.jsonl.gz", count, NEWS["tokens"])
            for split, count in {"train": NEWS["statistics"], "test": NEWS["perplexity"]}.items()
        )

    def moments(
        self, base: Any, what: str, questions: list[torch.Tensor], targets: list[str]
    ) -> statistics.Statistics:
        """What news, or questions, do in the edited layers."""
        kept = parts(self.seen, 20) if what == "news" else parts(questions, 1)
        batches = [{"input_ids": torch.cat(some)} for some in kept]
        return statistics.collect(base, batches, target_modules=targets, progress=False)

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure`, by their keys."""
        options = self.options
        runs = itertools.product(range(options.seeds), options.counts, ENTRIES)
        return {f"{entry} {count} {seed}": (entry, count, seed) for seed, count, entry in runs}

    def measure(self, entry: str, count: int, seed: int) -> dict[str, Any]:
        """Edit, and ask."""
        asked = countries(count + NEIGHBORS + QUESTIONS, seed)
        facts = [a.fact for a in asked[:count]]
        questions = [self.decoder.ids(a.fact.prompt) for a in asked[count:]]
        others, kept = questions[:NEIGHBORS], questions[NEIGHBORS:]
        base = self.decoder.load()
        begun = [ids[:, : NEWS["begun"]] for ids in self.news[: NEWS["continued"]]]
        before = said(base, [*begun, *others], NEWS["said"])
        logits, perplexity = base(self.news[0]).logits.detach(), decoding.perplexity(base, self.news)
        model = self.edited(base, entry, facts, kept, seed)
        after = said(model, [*begun, *others], NEWS["said"])
        same = [one == other for one, other in zip(before, after, strict=True)]
        perplexity = decoding.perplexity(model, self.news) / perplexity
        reliability = self.right(model, [fact.prompt for fact in facts], facts)
        generalization = self.right(model, [a.other for a in asked[:count]], facts)
        with model.disable_adapter():
            undone = torch.equal(model(self.news[0]).logits, logits)
        return {
            "entry": entry,
            "count": count,
            "seed": seed,
            "reliability": reliability,
            "generalization": generalization,
            "news": sum(same[: len(begun)]) / len(begun),
            "neighbors": sum(same[len(begun) :]) / len(others),
            "perplexity": perplexity,
            "undone": undone,
        }

    def edited(
        self, base: Any, entry: str, facts: list[Fact], questions: list[torch.Tensor], seed: int
    ) -> Any:
        """The model with all facts in it; the questions are those that may be left alone."""
        if entry in LORA:
            return self.trained(base, facts, LORA[entry], seed)
        at, what = "subject" if SUBJECTS in entry else "all", entry.partition(" protecting ")[2]
        layers = self.options.subject_layers if at == "subject" else self.options.layers
        targets = [f"model.layers.{layer}.mlp.down_proj" for layer in layers]
        moments = self.moments(base, what, questions, targets) if what else None
        for number, some in enumerate(parts(facts, AT_ONCE)):
            name = f"edit{number}"
            base = insert_facts(
                base, some, self.decoder.tokenizer, targets, statistics=moments, at=at, adapter_name=name
            )
        return base.eval()

    def trained(self, base: Any, facts: list[Fact], rate: float, seed: int) -> Any:
        """LoRA on all linear layers, until all facts are said or for 40 passes."""
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        model: Any = peft.get_peft_model(base, config).eval()
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, rng = torch.optim.AdamW(own, rate, weight_decay=0.0), random.Random(seed)
        for _ in range(40):
            for some in parts(rng.sample(facts, len(facts)), 8):
                optimizer.zero_grad()
                for fact in some:
                    (self.loss(model, fact) / len(some)).backward()
                optimizer.step()
            if self.right(model, [fact.prompt for fact in facts], facts) == 1:
                break
        return model

    def loss(self, model: Any, fact: Fact) -> torch.Tensor:
        """Cross-entropy of a fact's answer."""
        ids, begin = self.decoder.ids(fact.prompt + fact.answer), self.decoder.ids(fact.prompt).shape[1]
        return nn.functional.cross_entropy(model(ids).logits[0, begin - 1 : -1], ids[0, begin:])

    def right(self, model: Any, prompts: list[str], facts: list[Fact]) -> float:
        """Part of the prompts that the model goes on with by the answer of their fact."""
        wanted = [self.decoder.tokenizer(fact.answer)["input_ids"] for fact in facts]
        answers = said(model, [self.decoder.ids(prompt) for prompt in prompts], max(map(len, wanted)))
        pairs = zip(answers, wanted, strict=True)
        return sum(found[: len(answer)] == answer for found, answer in pairs) / len(facts)


def table(content: dict[str, Any]) -> str:
    """What is measured, by number of facts and entry."""
    runs = sorted(content["runs"].values(), key=lambda run: (run["count"], ENTRIES.index(run["entry"])))
    rows = []
    for count, entry in dict.fromkeys((run["count"], run["entry"]) for run in runs):
        of = [run for run in runs if (run["count"], run["entry"]) == (count, entry)]
        cells = [spread([run[name] for run in of], 2) for name in MEASURES]
        undone = "yes" if all(run["undone"] for run in of) else "no"
        rows.append([count, entry, *cells, undone, len(of)])
    header = ["facts", "", *MEASURES.values(), "logits of before without it", "seeds"]
    return markdown(header, [[str(cell) for cell in row] for row in rows])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = decoding.parser(__doc__.splitlines()[0], "editing")
    made.add_argument("--layers", type=int, nargs="+", default=[12], help="layers whose MLP is edited")
    made.add_argument("--subject-layers", type=int, nargs="+", default=[2, 5, 8], help="those at subjects")
    made.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100], help="numbers of facts")
    return made.parse_args(arguments)


def main() -> None:
    """Run what is missing, and print what was found."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    editing = Editing(parse_arguments())
    editing.results.complete(editing, 1)
    print(table(editing.results.content))


if __name__ == "__main__":
    main()
