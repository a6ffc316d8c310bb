"""Tasks for a language model, whose loss is that of answers and whose accuracy is of choices among answers.

They read `math/gsm8k.{train,test}.jsonl.gz` with rows `{"question": …, "answer": …}`,
`math/svamp.test.jsonl.gz` with rows `{"question": …, "equation": "( 3.0 + 4.0 )", "answer": 7.0}`, and
`text/agnews.{train,test}.jsonl.gz`.
"""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from support import texts
from support.task import DATA_SEED, Choice, Sizes, Task, cut

DECODER = r".*\.([qkvo]_proj|(gate|up|down)_proj)"

WRONG = 2
"""Wrong answers beside the right one."""


def mathematics(folder: Path, decoder: Path, sizes: Sizes) -> Task:
    """A decoder trained on worked answers of GSM8K, which then chooses among three answers in SVAMP."""
    tokenizer = _tokenizer(decoder)

    def encoded(row: dict[str, Any], answer: str) -> dict[str, Any]:
        return _answered(tokenizer, f"Question: {row['question']}\nAnswer:", answer)

    def worked(split: str) -> list[dict[str, Any]]:
        rows = texts.lines(folder / "math" / f"gsm8k.{split}.jsonl.gz")
        kept = (encoded(row, row["answer"]) for row in rows)
        return [row for row in kept if len(row["input_ids"]) <= sizes.tokens]

    rng = random.Random(DATA_SEED)
    choices = []
    for row in texts.lines(folder / "math" / "svamp.test.jsonl.gz"):
        wrong = _wrong_answers(row["equation"], row["answer"])
        if row["answer"].is_integer() and len(wrong) >= WRONG:
            numbers, right = rng.sample(wrong, WRONG), rng.randrange(WRONG + 1)
            numbers.insert(right, row["answer"])
            choices.append(Choice([encoded(row, f"#### {number:.0f}") for number in numbers], right))
    train = worked("train")
    whole = _language_task("SmolLM2 on GSM8K", decoder, tokenizer, train, worked("test"), choices, sizes)
    return cut(whole, sizes)


def _wrong_answers(equation: str, answer: float) -> list[float]:
    """What other operations than an equation's make of its numbers.

    These numbers themselves would say more of how a model copies from the question than of how it counts.
    """
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", equation)]
    found: set[float] = set()
    for one, other in itertools.permutations(numbers, 2):
        found |= {one + other, one - other, one * other}
        if other:
            found.add(one / other)
    return sorted(number for number in found - {answer, *numbers} if number >= 0 and number.is_integer())


def topics(folder: Path, decoder: Path, sizes: Sizes) -> Task:
    """A decoder that answers with the topic of a text."""
    tokenizer = _tokenizer(decoder)
    wanted = {split: getattr(sizes, split) for split in texts.SPLITS}
    source = texts.load(["agnews"], folder / "text", wanted, DATA_SEED)["agnews"]

    def encoded(row: dict[str, Any], label: int) -> dict[str, Any]:
        ids = tokenizer(row["text"], truncation=True, max_length=sizes.tokens)["input_ids"]
        return _answered(tokenizer, f"{tokenizer.decode(ids)}\nTopic:", source.classes[label])

    def right(split: str) -> list[dict[str, Any]]:
        return [encoded(row, row["labels"]) for row in source.rows[split]]

    labels = range(len(source.classes))
    choices = [Choice([encoded(row, i) for i in labels], row["labels"]) for row in source.rows["test"]]
    train = right("validation") + right("train")
    return _language_task("SmolLM2 on agnews", decoder, tokenizer, train, right("test"), choices, sizes)


def _tokenizer(decoder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _answered(tokenizer: Any, question: str, answer: str) -> dict[str, Any]:
    """Ids of a question and its answer, which alone has labels."""
    asked = tokenizer(question)["input_ids"]
    answered = tokenizer(f" {answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
    return {"input_ids": asked + answered, "labels": [-100] * len(asked) + answered}


def _language_task(
    name: str,
    decoder: Path,
    tokenizer: Any,
    train: list[dict[str, Any]],
    test: list[dict[str, Any]],
    choices: list[Choice],
    sizes: Sizes,
) -> Task:
    """A decoder on answers; the first rows to train on are for validation."""
    return Task(
        name,
        lambda: AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32),
        train[sizes.validation :],
        train[: sizes.validation],
        test,
        collate=DataCollatorForSeq2Seq(tokenizer),
        peft_task_type="CAUSAL_LM",
        target_modules=DECODER,
        choices=choices,
        measure="perplexity",
    )


TASKS = {"gsm8k-svamp": mathematics, "agnews-generation": topics}
