"""Facts put into a model in closed form, `ΔWᵀ = P Hᵀ (H P Hᵀ + λ I)⁻¹ V`: its rank is at most that of `H`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_subspace.core.linalg import column_basis
from peft_subspace.core.validation import check_choice, check_count, check_number, invalid
from peft_subspace.initialization.evaluating import device_of, evaluating
from peft_subspace.layers.calls import innermost
from peft_subspace.statistics import SecondMoment, Statistics
from peft_subspace.statistics.record import INPUTS
from peft_subspace.tuner.layer import SubspaceLayer

from .adapter import add_edit, bases, check_name

_Row = tuple[Tensor, int, list[int]]


@dataclass(frozen=True)
class Fact:
    """What a model is to answer.

    Attributes:
        prompt: Text that comes before.
        answer: Text that is to follow, with the space that separates it.
        subject: Part of the prompt that the fact is about; its last token is edited too.
    """

    prompt: str
    answer: str
    subject: str | None = None


def insert_facts(
    model: nn.Module,
    facts: Sequence[Fact],
    tokenizer: Any,
    targets: Iterable[str],
    *,
    statistics: Statistics | None = None,
    energy: float = 0.98,
    rounds: int = 20,
    step: float = 0.5,
    ridge: float = 0.01,
    at: str = "all",
    adapter_name: str = "default",
) -> PeftModel:
    r"""Make a model answer prompts as it is told, by a frozen update of low rank that can be taken out again.

    `H (N, n)` are the inputs of a layer at the `N` edit tokens (those before each token of the answers, and
    the last one of each subject), and `V (N, m)` is what is to be added to its outputs there: it follows the
    gradients of the answers' loss, round by round, until all answers are the likeliest ones; a warning counts
    those that the rounds were too few for. The update is the smallest one that adds `V`, up to the ridge `λ`.
    With `P = I` and one round it is UltraEdit's. `P`, as AlphaEdit has it, leaves alone the directions that
    hold `energy` of the inputs that `statistics` have seen, and the keys of edits that are there already. The
    weights are not read, so that they may be quantized, and the result is an exact LoRA.

    Args:
        model: Causal language model, or a model with edits.
        facts: What it is to answer.
        tokenizer: Its tokenizer.
        targets: Names of the linear layers to edit, such as the second ones of some MLPs.
        statistics: Statistics of inputs that are to be left alone; None protects nothing.
        energy: Part of these inputs' squares that is protected, from 0 to below 1.
        rounds: Most steps of `V`.
        step: Length of a step, relative to the outputs at the edit tokens.
        ridge: `λ` relative to the mean square of the rows of `H`.
        at: `"all"` edit tokens, or those of the `"subject"` alone for facts that have one. In a large model's
            early layers other sentences about the subject then know the fact, too.
        adapter_name: Name of the new adapter.

    Raises:
        ValueError: If a subject is not in its prompt, there are more edit tokens than a weight has rank, or
            the statistics are of another model. Nothing is changed then.

    Reference:
        Gu et al., "UltraEdit" (arXiv 2505.14679); Fang et al., "AlphaEdit" (arXiv 2410.02355).
    """
    check_name(model, adapter_name)
    check_count("rounds", rounds)
    check_choice("at", at, ("all", "subject"))
    for name, value, limit in (("energy", energy, 1.0), ("step", step, 1e6), ("ridge", ridge, 1e6)):
        check_number(name, value, minimum=0.0, maximum=limit)
    rows = [_encoded(fact, tokenizer, at) for fact in facts]
    if not rows:
        raise invalid("facts", facts, "must have at least one; give a list of Fact")
    layers = {name: _Edited(module) for name, module in bases(model, targets)}
    tokens = sum(len(positions) for _, _, positions in rows)
    for name, layer in layers.items():
        layer.check(name, tokens)
        seen = None if statistics is None else statistics.moment(INPUTS, name, layer.sizes[1])
        layer.protect(seen, energy)
    _learn(model, rows, list(layers.values()), rounds, step, ridge)
    states = {name: {"left": layer.left, "right": layer.right} for name, layer in layers.items()}
    return add_edit(model, "chain", states, adapter_name)


class _Edited:
    """A layer: rows `[x, y, g]` of a pass at the edit tokens, and the two factors so far."""

    def __init__(self, module: nn.Module) -> None:
        self.module, base = module, innermost(module)
        self.sizes = (getattr(base, "out_features", 0), getattr(base, "in_features", 0))
        self.seen: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.untouched = torch.zeros(self.sizes[1], 0)  # orthonormal columns
        self.added = self.left = self.right = self.leaf = torch.empty(0)

    def check(self, name: str, tokens: int) -> None:
        """Raise unless the layer is linear, and its weight has a rank of at least so many edit tokens."""
        if not all(self.sizes):
            raise invalid("targets", name, f"is {type(self.module).__name__}; name linear layers")
        if tokens > min(self.sizes):
            rule = f"exceed {min(self.sizes)}, the rank of its weight"
            raise ValueError(f"{name}: {tokens} edit tokens {rule}; insert fewer facts, in several adapters")

    def protect(self, moment: SecondMoment | None, energy: float) -> None:
        """Find the directions that stay untouched: of inputs that were seen, and of earlier edits."""
        deltas = self.module.deltas.values() if isinstance(self.module, SubspaceLayer) else ()
        kept = [d.right.T.double().cpu() for d in deltas if d.form == "chain"]
        if moment is not None:
            values, vectors = torch.linalg.eigh(moment.dense().cpu())
            count = int((values.flip(0).cumsum(0) < energy * values.sum()).sum()) + 1
            kept.append(vectors.flip(1)[:, :count])
        if kept:
            self.untouched = column_basis(torch.cat([k / k.norm() for k in kept], dim=1)).float()

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Add the update, and a leaf whose gradient is that of the output."""
        x, self.leaf = args[0].detach(), torch.zeros_like(output, requires_grad=True)
        if self.left.numel():
            output = output + (x.float() @ self.right.T @ self.left.T).to(output.dtype)
        self.rows = [x[0].float(), output[0].detach().float()]
        return output + self.leaf

    def begin(self) -> None:
        """Keep the keys, those of the model before the edit, and add nothing yet."""
        m, n = self.sizes
        inputs, outputs, _ = torch.cat(self.seen).split([n, m, m], dim=1)
        untouched = self.untouched.to(inputs)
        self.right = inputs - (inputs @ untouched) @ untouched.T
        self.added = torch.zeros_like(outputs)
        self.left = self.added.T

    def move(self, step: float, ridge: float) -> None:
        """Take a step of `V`, and solve for the factors."""
        m, n = self.sizes
        _, outputs, gradients = torch.cat(self.seen).split([n, m, m], dim=1)
        self.seen.clear()
        largest = gradients.norm(dim=1).max().clamp_min(torch.finfo(torch.float32).tiny)
        self.added = self.added - step * outputs.norm(dim=1).mean() * gradients / largest
        gram = (self.right @ self.right.T).double()
        gram += ridge * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram)).to(gram)
        self.left = torch.linalg.solve(gram, self.added.double()).float().T


def _learn(
    model: Any, rows: Sequence[_Row], edited: Sequence[_Edited], rounds: int, step: float, ridge: float
) -> None:
    """Move what is added until all answers are the likeliest ones; those that are not are warned of."""
    with evaluating(model, [], ""), ExitStack() as hooks:
        for layer in edited:
            hooks.callback(layer.module.register_forward_hook(layer.hook).remove)
        wrong = _pass(model, rows, edited)
        for layer in edited:
            layer.begin()
        while wrong and rounds:
            for layer in edited:
                layer.move(step, ridge)
            wrong, rounds = _pass(model, rows, edited), rounds - 1
    if wrong:
        remedy = "raise rounds, name more layers, or insert fewer facts at a time"
        warnings.warn(f"{wrong} of {len(rows)} facts are not learned; {remedy}", stacklevel=3)


def _encoded(fact: Fact, tokenizer: Any, at: str) -> _Row:
    """Tokens, where the answer begins, and the positions of the edit tokens.

    Raises:
        ValueError: If the subject is not in the prompt, or prompt or answer are empty.
    """
    if fact.subject is not None and fact.subject not in fact.prompt:
        raise invalid("subject", fact.subject, f"is not in the prompt {fact.prompt!r}; give words of it")
    prompt, whole = (tokenizer(text)["input_ids"] for text in (fact.prompt, fact.prompt + fact.answer))
    if not prompt or len(whole) <= len(prompt):
        raise ValueError(f"{fact} has no tokens before or in the answer; give both")
    only_subject = fact.subject and at == "subject"
    positions = set() if only_subject else set(range(len(prompt) - 1, len(whole) - 1))
    if fact.subject:
        end = fact.prompt.index(fact.subject) + len(fact.subject)
        positions.add(max(0, len(tokenizer(fact.prompt[:end])["input_ids"]) - 1))
    return torch.tensor(whole), len(prompt), sorted(positions)


def _pass(model: Any, rows: Sequence[_Row], edited: Sequence[_Edited]) -> int:
    """Run all facts, one by one, for their gradients; how many answers are not the likeliest ones."""
    wrong, device = 0, device_of(model)
    for tokens, begin, positions in rows:
        ids = tokens.to(device)
        with torch.enable_grad():
            logits = model(input_ids=ids[None]).logits[0, begin - 1 : -1].float()
            loss = nn.functional.cross_entropy(logits, ids[begin:], reduction="sum")
        gradients = torch.autograd.grad(loss, [layer.leaf for layer in edited])
        for layer, gradient in zip(edited, gradients, strict=True):
            layer.seen.append(torch.cat([*layer.rows, gradient[0].float()], dim=1)[positions])
        wrong += not bool((logits.argmax(-1) == ids[begin:]).all())
    return wrong
