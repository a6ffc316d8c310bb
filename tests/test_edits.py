"""Edits of weights as adapters: their equations, and that they live and go like any other adapter."""

from __future__ import annotations

import peft
import pytest
import tokenizers
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import peft_subspace
from models import llama
from peft_subspace import edits
from peft_subspace.edits import Fact, edit_by_curvature, insert_facts, prune_by_contrast, sampled_loss
from peft_subspace.statistics import collect
from quantized import KINDS, WARNINGS, quantized_model

IDS = torch.arange(3, 35).view(4, 8)
NAME = "model.layers.1.mlp.down_proj"
NAMES = [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("up", "down")]


def statistics_of(model, ids, names=NAMES, loss_fn=sampled_loss):
    batches = [{"input_ids": ids}]
    return collect(
        model, batches, gradients=True, target_modules=list(names), loss_fn=loss_fn, progress=False
    )


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def weight(model, name=NAME):
    return model.get_submodule(name).weight.detach().double()


def update(model, name=NAME, adapter="default"):
    return model.base_model.model.get_submodule(name).get_delta_weight(adapter).double()


# ------------------------------------------------------------------------------------------- curvature


def pairs_kept(inputs, outputs, keep):
    """Pairs of eigenvectors in the order of their curvature, by a loop, until they sum up to `keep`."""
    mu, v = torch.linalg.eigh(inputs)
    lam, u = torch.linalg.eigh(outputs)
    products = sorted(
        (
            (max(0.0, a.item()) * max(0.0, b.item()), i, j)
            for i, a in enumerate(lam)
            for j, b in enumerate(mu)
        ),
        reverse=True,
    )
    total, summed, kept = sum(p for p, _, _ in products), 0.0, []
    for product, i, j in products:
        if summed >= keep * total:
            break
        summed += product
        kept.append((u[:, i], v[:, j]))
    return kept


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_curvature_keeps_the_components_that_a_loop_keeps(keep):
    base = llama()
    statistics = statistics_of(base, IDS)
    model = edit_by_curvature(llama(), statistics, keep=keep)
    for name in NAMES:
        inputs, outputs = statistics.inputs[name].dense(), statistics.output_gradients[name].dense()
        kept = pairs_kept(inputs, outputs, keep)
        expected = sum(u @ weight(base, name) @ v * torch.outer(u, v) for u, v in kept)
        assert 0 < len(kept) < weight(base, name).numel()
        torch.testing.assert_close(weight(base, name) + update(model, name), expected, rtol=0, atol=1e-6)


def test_all_of_the_curvature_changes_nothing_and_the_scale_is_the_strength():
    base = llama()
    statistics = statistics_of(base, IDS)
    model = edit_by_curvature(llama(), statistics, [NAME], keep=1)
    assert torch.equal(logits(model), logits(base))
    model = edit_by_curvature(llama(), statistics, [NAME], keep=0.5)
    full, layer = logits(model), model.base_model.model.get_submodule(NAME)
    whole = update(model)
    assert not torch.allclose(full, logits(base), atol=1e-4)
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(update(model), whole / 2)
    layer.set_scale("default", 0.0)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-6)


def test_sampled_loss_draws_from_the_model_and_leaves_generators_and_padding_alone():
    model, state = llama(), torch.get_rng_state()
    mask = torch.ones_like(IDS)
    first = sampled_loss(model, {"input_ids": IDS, "labels": IDS})
    assert torch.equal(first, sampled_loss(model, {"input_ids": IDS, "attention_mask": mask}))
    assert torch.equal(torch.get_rng_state(), state)
    entropy = torch.distributions.Categorical(logits=logits(model)[:, :-1]).entropy().mean()
    assert first.item() == pytest.approx(entropy.item(), rel=0.25)
    padded = mask.clone()
    padded[:, 4:] = 0
    loss = sampled_loss(model, {"input_ids": IDS, "attention_mask": padded})
    whole = model(input_ids=IDS, attention_mask=padded).logits
    (gradient,) = torch.autograd.grad(loss + 0 * whole.sum(), model.lm_head.weight)
    assert gradient.isfinite().all()
    assert loss.item() != pytest.approx(first.item(), rel=1e-6)


# --------------------------------------------------------------------------------------------- contrast


def test_pruned_are_the_entries_that_a_loop_prunes():
    base = llama()
    target, reference = (statistics_of(base, ids, [NAME]) for ids in (IDS[:1], IDS[1:]))
    model = prune_by_contrast(llama(), target, reference, share=0.2)
    w = weight(base)
    flagged = torch.zeros_like(w, dtype=torch.bool)
    for i in range(len(w)):
        scores = [
            [abs(w[i, j].item()) * s.inputs[NAME].column_norms[j].item() / s.inputs[NAME].rows ** 0.5
             for j in range(w.shape[1])]
            for s in (target, reference)
        ]  # fmt: skip
        largest = sorted(scores[0], reverse=True)[int(0.2 * w.shape[1]) - 1]
        for j in range(w.shape[1]):
            flagged[i, j] = scores[0][j] >= largest and scores[0][j] > scores[1][j]
    assert 0 < flagged.sum() < flagged.numel() / 4
    assert torch.equal(update(model), torch.where(flagged, -w, 0.0))
    merged = weight(model.merge_and_unload())
    assert not merged[flagged].any()
    assert torch.equal(merged[~flagged], w[~flagged])


def test_sparse_files_hold_two_numbers_per_entry_and_load(tmp_path):
    base = llama()
    statistics = [statistics_of(base, ids, [NAME]) for ids in (IDS[:1], IDS[1:])]
    model = prune_by_contrast(llama(), *statistics, share=0.1)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in state} == {"indices", "values"}
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        assert torch.equal(logits(load(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("wrong", [-1, 16 * 24, "twice"])
def test_entries_outside_of_the_weight_are_refused(wrong, tmp_path):
    base = llama()
    statistics = [statistics_of(base, ids, [NAME]) for ids in (IDS[:1], IDS[1:])]
    prune_by_contrast(llama(), *statistics, share=0.1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    key = next(key for key in state if key.endswith("indices"))
    state[key][0] = state[key][1] if wrong == "twice" else wrong
    save_file(state, path)
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        net = llama()
        modules = [*net.modules()]
        with pytest.raises(ValueError, match=r"indices (must be from 0 to 383|name an entry twice)"):
            load(net, tmp_path)
        assert [*net.modules()] == modules


# ------------------------------------------------------------------------------------------------- facts

WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(35))]
FACTS = [
    Fact("w3 w4 w5", " w6", subject="w4"),
    Fact("w9 w8", " w7 w11"),
    Fact("w20 w4 w21", " w30", subject="w20 w4"),
]
TARGETS = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture(scope="module")
def tokenizer():
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]")


def decoded(model, tokenizer, fact):
    """What the model says by itself after the prompt, without the answer before its eyes."""
    ids = tokenizer(fact.prompt, return_tensors="pt")["input_ids"]
    count = len(tokenizer(fact.answer)["input_ids"])
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, -count:])


def test_edited_model_gives_the_answers_by_free_decoding(tokenizer):
    base = llama().train()
    base.model.layers[0].eval()
    modes = {module: module.training for module in base.modules()}
    assert not any(decoded(base, tokenizer, fact) == fact.answer.strip() for fact in FACTS)
    model = insert_facts(base, FACTS, tokenizer, TARGETS)
    assert {module: module.training for module in modes} == modes
    assert all(decoded(model, tokenizer, fact) == fact.answer.strip() for fact in FACTS)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_edit_is_a_chain_of_rank_at_most_the_edit_tokens_and_an_exact_lora(tokenizer, tmp_path):
    model = insert_facts(llama(), FACTS, tokenizer, TARGETS)
    with pytest.warns(UserWarning, match="2 of 2 facts are not learned"):  # no early layer of a large model
        at_subjects = insert_facts(llama(), FACTS[::2], tokenizer, TARGETS, at="subject")
    for name in TARGETS:
        assert torch.linalg.matrix_rank(update(model, name).float(), rtol=1e-5) <= 1 + 2 + 1 + 2
        assert torch.linalg.matrix_rank(update(at_subjects, name).float(), rtol=1e-5) == 2
    assert not any(p.requires_grad for p in model.parameters())
    peft_subspace.export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "lora")), logits(model))
    model.save_pretrained(tmp_path / "edit")
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        assert torch.equal(logits(load(llama(), tmp_path / "edit")), logits(model))


def test_one_round_is_the_closed_form(tokenizer):
    """`ΔWᵀ = (HᵀH + λI)⁻¹ HᵀV`, with `V` along the gradients at the edit tokens."""
    fact, name = FACTS[1], TARGETS[1]
    with pytest.warns(UserWarning, match="1 of 1 facts are not learned; raise rounds"):
        model = insert_facts(llama(), [fact], tokenizer, [name], rounds=1, step=0.3, ridge=0.1)
    base, seen = llama(), {}

    def look(module, args, output):
        seen.update(x=args[0].detach()[0].double(), y=output.detach()[0].double())
        output.register_hook(lambda g: seen.update(g=g[0].double()))

    base.get_submodule(name).register_forward_hook(look)
    ids = torch.tensor(tokenizer(fact.prompt + fact.answer)["input_ids"])
    out = base(input_ids=ids[None]).logits[0]
    nn.functional.cross_entropy(out[1:3], ids[2:], reduction="sum").backward()
    H, y, g = (seen[key][1:3] for key in "xyg")
    V = -0.3 * y.norm(dim=1).mean() * g / g.norm(dim=1).max()
    ridge = 0.1 * H.square().sum(1).mean()
    expected = torch.linalg.solve(H.T @ H + ridge * torch.eye(24), H.T @ V).T
    torch.testing.assert_close(update(model, name), expected.detach(), rtol=1e-4, atol=1e-7)


def test_protected_inputs_are_left_alone(tokenizer):
    base = llama()
    few = torch.tensor([[30, 31, 32, 33]])
    statistics = statistics_of(base, few, TARGETS)
    model = insert_facts(llama(), FACTS, tokenizer, TARGETS, statistics=statistics, energy=0.9999)
    free = insert_facts(llama(), FACTS, tokenizer, TARGETS)
    assert all(decoded(model, tokenizer, fact) == fact.answer.strip() for fact in FACTS)
    changed, otherwise = ((logits(m, few) - logits(base, few)).norm() for m in (model, free))
    assert changed < 0.1 * otherwise


def test_edits_stack_and_each_can_be_taken_out(tokenizer):
    model = insert_facts(llama(), FACTS[:1], tokenizer, TARGETS, adapter_name="first")
    first = logits(model)
    model = insert_facts(model, FACTS[1:2], tokenizer, TARGETS, adapter_name="second")
    assert all(decoded(model, tokenizer, fact) == fact.answer.strip() for fact in FACTS[:2])
    both = logits(model)
    model = insert_facts(model, FACTS[:2], tokenizer, TARGETS, adapter_name="known")
    assert torch.equal(logits(model), both)
    model.base_model.set_adapter(["first"])
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    model.base_model.unload()
    assert torch.equal(logits(model.base_model.model), logits(llama()))


@pytest.mark.filterwarnings(*WARNINGS.args)
def test_facts_go_into_a_quantized_base(tokenizer):
    kind = next(kind for kind in KINDS if kind.name == "bnb-nf4")
    model = insert_facts(quantized_model(llama(), kind, ("down_proj",)), FACTS, tokenizer, TARGETS)
    assert all(decoded(model, tokenizer, fact) == fact.answer.strip() for fact in FACTS)


# ---------------------------------------------------------------------------------------------- refusals


def refused(message, call, error=ValueError):
    """The call raises, and leaves the model as it is."""
    net = llama()
    modules = [*net.modules()]
    with pytest.raises(error, match=message):
        call(net)
    assert [*net.modules()] == modules
    assert not any(module._forward_hooks for module in modules)


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, True])
def test_keep_out_of_range_is_refused(keep):
    error, rule = (TypeError, "a number") if keep is True else (ValueError, "above 0 and at most 1")
    refused(f"keep=.* must be {rule}", lambda net: edit_by_curvature(net, None, keep=keep), error)


@pytest.mark.parametrize("share", [0, 2.0])
def test_share_out_of_range_is_refused(share):
    refused(r"share=.* must be above 0", lambda net: prune_by_contrast(net, None, None, share=share))


def test_statistics_of_another_model_are_refused(tokenizer):
    other = llama(intermediate_size=20)
    statistics = statistics_of(other, IDS, [NAME])
    refused("are of 20 inputs, and the layer has 24", lambda n: edit_by_curvature(n, statistics))
    refused("are of 20 inputs", lambda n: prune_by_contrast(n, statistics, statistics))
    refused("are of 20 inputs", lambda n: insert_facts(n, FACTS, tokenizer, [NAME], statistics=statistics))
    refused("'absent' is no module of LlamaFor", lambda n: insert_facts(n, FACTS, tokenizer, ["absent"]))
    refused(
        f"have no inputs of {NAMES[0]}, but of 1 other layers",
        lambda n: edit_by_curvature(n, statistics, [NAMES[0]]),
    )


def test_facts_that_cannot_be_inserted_are_refused(tokenizer):
    def insert(*facts, targets=TARGETS):
        return lambda net: insert_facts(net, facts, tokenizer, targets)

    refused("subject='w9' is not in the prompt 'w3 w4'", insert(Fact("w3 w4", " w5", subject="w9")))
    refused("no tokens before or in the answer", insert(Fact("w3", "")))
    refused("at='answer'", lambda net: insert_facts(net, FACTS, tokenizer, TARGETS, at="answer"))
    refused(r"must have at least one", insert())
    many = [Fact(f"w{i} w3", f" w{i}") for i in range(4, 22)]
    refused("18 edit tokens exceed 16, the rank of its weight; insert fewer facts", insert(*many))
    refused("targets='model.norm' is LlamaRMSNorm", insert(*FACTS, targets=["model.norm"]))


def test_nothing_to_prune_is_said():
    statistics = statistics_of(llama(), IDS, [NAME])
    refused(
        "share=0.5 leaves nothing to prune", lambda n: prune_by_contrast(n, statistics, statistics, share=0.5)
    )


def test_models_with_other_adapters_are_refused(tokenizer):
    model = get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters that are no edits; merge them first"):
        insert_facts(model, FACTS, tokenizer, TARGETS, adapter_name="other")
    model = insert_facts(llama(), FACTS, tokenizer, TARGETS)
    with pytest.raises(ValueError, match="adapter_name='default' exists already"):
        insert_facts(model, FACTS, tokenizer, TARGETS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"form": "cubic"}, ValueError, "form='cubic' must be one of"),
        ({"sizes": [3]}, TypeError, "sizes=.* must map module names"),
        ({"sizes": {"a": 0}}, ValueError, r"sizes\['a'\]=0 must be at least 1"),
    ],
)
def test_other_fields_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        edits.EditConfig(**options)


def test_sizes_beyond_the_weight_are_refused():
    for form, size in (("chain", 17), ("sparse", 385)):
        config = edits.EditConfig(target_modules=NAME, form=form, sizes={NAME: size})
        refused(f"sizes={size} exceeds {size - 1}", lambda net, c=config: get_peft_model(net, c))
