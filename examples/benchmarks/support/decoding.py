"""A decoder asked in the plain way: greedy tokens, and how well it expects texts."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import timing
from support import texts


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Command line of a script that asks a decoder, with a results file of its name."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder with the texts")
    made.add_argument("--decoder", type=Path, required=True, metavar="DIRECTORY", help="language model")
    made.add_argument("--seeds", type=int, default=3, help="number of seeds")
    made.add_argument("--results", type=Path, default=timing.RESULTS / f"{name}.json", help="JSON file")
    return made


class Decoder:
    """A saved language model with its tokenizer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def load(self) -> Any:
        """The model, to be asked."""
        return AutoModelForCausalLM.from_pretrained(self.directory).eval()

    def ids(self, text: str) -> torch.Tensor:
        """Tokens of a text, `(1, tokens)`."""
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def cut(self, path: Path, count: int, tokens: int) -> list[torch.Tensor]:
        """The first texts of a file that are long enough, cut to one length."""
        rows = (self.ids(row["text"])[:, :tokens] for row in texts.lines(path))
        return list(itertools.islice((ids for ids in rows if ids.shape[1] == tokens), count))


@torch.no_grad()
def said(model: Any, prompts: list[torch.Tensor], count: int) -> list[list[int]]:
    """Most likely next tokens of each prompt, one after another; prompts of one length go together."""
    found: dict[int, list[int]] = {}
    for length in {ids.shape[1] for ids in prompts}:
        places = [place for place, ids in enumerate(prompts) if ids.shape[1] == length]
        tokens, cache, answers = torch.cat([prompts[place] for place in places]), None, []
        for _ in range(count):
            output = model(tokens, past_key_values=cache, use_cache=True)
            tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            answers.append(tokens)
        found.update(zip(places, torch.cat(answers, dim=1).tolist(), strict=True))
    return [found[place] for place in range(len(prompts))]


@torch.no_grad()
def perplexity(model: Any, rows: list[torch.Tensor]) -> float:
    """Perplexity of texts of one length."""
    batch = torch.cat(rows)
    return math.exp(model(batch, labels=batch).loss.item())
