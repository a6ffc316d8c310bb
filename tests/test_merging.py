"""Merging: methods against loops in double precision, invariance, sources, outputs, bad input."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import methods
import models
from layers import distance
from merge_oracles import ORACLES, arc, by_entry, elected, largest, total, trimmed
from peft_subspace.merging import METHODS, Coefficients, Source, Stack, compress, merge, register, search
from peft_subspace.merging.cutting import cut
from peft_subspace.merging.masks import pack, unpack
from peft_subspace.merging.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")


class Made(Source):
    """A source of given factors."""

    def __init__(self, name, pairs):
        super().__init__(name, list(pairs))
        self.pairs = pairs

    def pair(self, module):
        return self.pairs[module]


def sources(count=3, m=7, n=9, ranks=(2, 3, 1), dtype=torch.float64, kernel=()):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    made = []
    for t in range(count):
        left = draw(m, ranks[t])
        made.append(Made(f"s{t}", {"layer": (left, draw(ranks[t], n, *kernel))}))
    return made


def updates(made, module="layer"):
    return [left.double() @ right.flatten(1).double() for left, right in (s.pair(module) for s in made)]


WEIGHTS = [0.7, 1.0, -0.4]


@pytest.mark.parametrize("method", list(ORACLES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_method_equals_its_oracle(method, dtype, tolerance):
    made = sources(dtype=dtype)
    options, oracle = ORACLES[method]
    truth = oracle(updates(made), WEIGHTS)
    found = merge(made, method, weights=WEIGHTS, scale=0.5, **options).update("layer")
    assert found.dtype == dtype
    assert distance(found, 0.5 * truth) < tolerance
    if method == "average":
        assert distance(truth, total(updates(made), WEIGHTS)) > 0.1


def test_slerp_equals_its_oracle_and_has_the_length_of_equal_sources():
    made = sources(2, ranks=(2, 3))
    truth = arc(updates(made), [0.3, 0.9])
    assert distance(merge(made, "slerp", weights=[0.3, 0.9]).update("layer"), truth) < 1e-10
    left, right = made[0].pair("layer")
    turned = Made("turned", {"layer": (left.flip(0), right)})
    length = merge([made[0], turned], "slerp").update("layer").norm()
    assert float(length) == pytest.approx(float((left @ right).norm()), rel=1e-10)
    same = Made("same", {"layer": (left, right.clone())})
    assert distance(merge([made[0], same], "slerp").update("layer"), left @ right) < 1e-10


def test_regmean_solves_least_squares():
    made = sources()
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(30, 9, generator=generator, dtype=torch.float64) for _ in made]
    grams = [x.T @ x for x in inputs]
    found = merge(made, "regmean", grams={"layer": grams}).update("layer")
    stacked = torch.cat(inputs)
    wanted = torch.cat([x @ t.T for x, t in zip(inputs, updates(made), strict=True)])
    truth = torch.linalg.lstsq(stacked, wanted).solution.T
    assert distance(found, truth) < 1e-9
    assert torch.linalg.matrix_rank(found) <= 6


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_random_methods_are_unbiased_seeded_and_do_not_depend_on_tiles(method):
    made = sources()
    one = merge(made, method, density=0.6, seed=3).update("layer")
    assert torch.equal(one, merge(made, method, density=0.6, seed=3, memory=4).update("layer"))
    assert not torch.equal(one, merge(made, method, density=0.6, seed=4).update("layer"))
    spread = {"spread": 0.0} if method == "della" else {}
    full = merge(made, method, density=1.0, **spread).update("layer")
    plain = "task_arithmetic" if method == "dare" else "ties"
    options = {} if method == "dare" else {"density": 1.0}
    assert distance(full, merge(made, plain, **options).update("layer")) < 1e-12
    if method == "dare":
        mean = sum(merge(made, method, density=0.5, seed=s).update("layer") for s in range(400)) / 400
        assert distance(mean, total(updates(made), [1, 1, 1])) < 0.12


def test_della_keeps_large_entries_more_often():
    tau = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)[None]
    made = [Made("s", {"layer": (torch.ones(1, 1, dtype=torch.float64), tau)})]
    kept = sum(merge(made, "della", density=0.5, spread=0.4, seed=s).update("layer") != 0 for s in range(500))
    assert kept[0, 0] < 100
    assert kept[0, 9] > 400


# ---------------------------------------------------------------------------------------- invariance


def everywhere():
    for method, (options, _) in ORACLES.items():
        yield method, options, "weight"
    for method in ("ties", "magnitude", "breadcrumbs", "consensus", "emr"):
        yield method, ORACLES[method][0], "aligned"


@pytest.mark.parametrize(("method", "options", "space"), list(everywhere()))
def test_merge_does_not_depend_on_how_updates_are_factored_nor_on_order_and_tiles(method, options, space):
    made = sources()
    plain = merge(made, method, weights=WEIGHTS, space=space, **options).update("layer")
    generator = torch.Generator().manual_seed(2)
    changed = []
    for source in made:
        left, right = source.pair("layer")
        mix = torch.randn(len(right), len(right), generator=generator, dtype=torch.float64)
        changed.append(Made(source.name, {"layer": (left @ mix, torch.linalg.solve(mix, right))}))
    refactored = merge(changed, method, weights=WEIGHTS, space=space, **options).update("layer")
    assert distance(refactored, plain) < 1e-8
    backwards = merge(made[::-1], method, weights=WEIGHTS[::-1], space=space, **options).update("layer")
    assert distance(backwards, plain) < 1e-8
    tiled = merge(made, method, weights=WEIGHTS, space=space, memory=100, **options).update("layer")
    assert distance(tiled, plain) < 1e-12


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("slerp", "regmean", "svd", "iso_c")])
@pytest.mark.parametrize("space", ["weight", "aligned"])
def test_one_source_with_full_density_is_itself(method, space):
    if method == "consensus":
        options = {"votes": 1}
    elif method == "breadcrumbs":
        options = {"density": 1.0, "outliers": 0.0}
    elif method == "della":
        options = {"density": 1.0, "spread": 0.0}
    else:
        options = {"density": 1.0} if method in ("ties", "magnitude", "dare", "dare_ties") else {}
    made = sources(1)
    assert distance(merge(made, method, space=space, **options).update("layer"), updates(made)[0]) < 1e-10


def test_aligned_space_gives_exact_factors_in_the_common_basis():
    made = sources()
    found = merge(made, "ties", space="aligned", density=0.5)
    left, right = found.factors("layer")
    assert left.shape[1] <= 6
    assert distance(left @ right, found.update("layer")) < 1e-12
    stacked = torch.cat(updates(made), dim=1)
    U, S, _ = torch.linalg.svd(stacked, full_matrices=False)
    basis = U[:, 1e-9 * S[0] < S]
    coordinates = [basis.T @ tau for tau in updates(made)]
    truth = basis @ by_entry(elected)(trimmed(coordinates, 0.5), [1, 1, 1])
    assert distance(found.update("layer"), truth) < 1e-8


# ------------------------------------------------------------------------------------ ranks, reports


def test_reported_error_is_that_of_the_cut():
    made = sources(ranks=(3, 3, 3))
    for method, options in (("task_arithmetic", {}), ("ties", {"density": 0.5})):
        prepared = merge(made, method, **options)
        whole = prepared.update("layer")
        for rank in (1, 2, 4):
            left, right = prepared.factors("layer", rank=rank)
            report = prepared.report["layer"]
            assert left.shape[1] == report.rank == rank
            assert report.error == pytest.approx(
                float((left @ right - whole).norm() / whole.norm()), rel=1e-4
            )
            assert report.norm == pytest.approx(float(whole.norm()), rel=1e-5)
        left, right = prepared.factors("layer", energy=0.9)
        error = float((left @ right - whole).norm() / whole.norm())
        assert error**2 <= 0.1 + 1e-9
        fewer = cut(whole, left.shape[1] - 1, None, method) if left.shape[1] > 1 else None
        assert fewer is None or fewer[2] ** 2 > 0.1
    taus = updates(made)
    cosine = float((taus[0] * taus[1]).sum() / taus[0].norm() / taus[1].norm())
    assert float(prepared.report["layer"].cosines[0, 1]) == pytest.approx(cosine, rel=1e-9)


def test_kernels_are_a_part_of_the_columns():
    made = sources(kernel=(3, 2))
    left, right = merge(made, "task_arithmetic", weights=WEIGHTS).factors("layer")
    assert right.shape == (6, 9, 3, 2)
    assert distance(left @ right.flatten(1), total(updates(made), WEIGHTS)) < 1e-12


def test_a_module_that_a_source_does_not_change_counts_as_zero():
    one, two = sources(2, ranks=(2, 3))
    two.pairs["more"] = two.pairs["layer"]
    two.modules.append("more")
    found = merge([one, two], "average")
    assert found.modules == ["layer", "more"]
    assert distance(found.update("more"), updates([two], "more")[0] / 2) < 1e-12


# ------------------------------------------------------------------------------------------- sources

TARGETS = ["q_proj", "down_proj"]


def lora(folder, base=None, **options):
    torch.manual_seed(len(str(folder)))
    config = LoraConfig(**{"target_modules": TARGETS, "r": 2, "init_lora_weights": False, **options})
    model = get_peft_model(models.llama() if base is None else base, config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def ours(method, folder=None, **options):
    config = method.config(**{"target_modules": TARGETS, "init_weights": False, "seed": 5, **options})
    model = get_peft_model(models.llama(), config).eval()
    if folder:
        model.save_pretrained(folder)
    return model


def deltas(model):
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach()
    return found


def test_loras_of_all_kinds_are_read_as_peft_computes_them(tmp_path):
    kinds = [
        {"lora_alpha": 3},
        {"use_rslora": True, "lora_alpha": 5, "r": 4},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.down_proj": 7}},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ]
    for number, options in enumerate(kinds):
        model = lora(tmp_path / str(number), **options)
        wanted = deltas(model)
        found = merge([tmp_path / str(number)])
        assert set(found.modules) == set(wanted)
        for name, update in wanted.items():
            assert distance(found.update(name), update) < 1e-6, (options, name)
        found.to_lora(tmp_path / f"again{number}")
        again = PeftModel.from_pretrained(models.llama(), tmp_path / f"again{number}").eval()
        ids = torch.arange(3, 15).reshape(2, 6)
        with torch.no_grad():
            assert distance(again(ids).logits, model(ids).logits) < 1e-5


def test_loras_on_a_model_are_read_like_those_in_folders(tmp_path):
    model = get_peft_model(
        models.llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "one"
    )
    model.add_adapter(
        "two",
        LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    held, saved = merge([(model, "one"), (model, "two")]), merge([tmp_path / "one", tmp_path / "two"])
    assert len(held.modules) == 2 * len(merge([(model, "one")]).modules)
    for module in held.modules:
        assert torch.equal(held.update(module), saved.update(module))


def test_every_method_of_ours_is_a_source(method, tmp_path):
    model = ours(method)
    found = merge([model])
    for name, update in deltas(model).items():
        assert distance(found.update(name), update) < 1e-5
    assert len(found.modules) == 6


def test_mixed_methods_and_a_checkpoint_become_one_lora(tmp_path):
    base = models.llama()
    base.save_pretrained(tmp_path / "base")
    for number, rank in enumerate((2, 4)):
        lora(tmp_path / f"lora{number}", r=rank)
    flora = ours(next(m for m in methods.METHODS if m.name == "flora"))
    mos = ours(next(m for m in methods.METHODS if m.name == "mos"))
    tuned = models.llama()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "q_proj" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(tmp_path / "tuned")
    given = [tmp_path / "lora0", tmp_path / "lora1", (flora, "default"), mos, tmp_path / "tuned"]
    with pytest.raises(ValueError, match="must differ; give an adapter once"):
        merge(given, base=tmp_path / "base")
    mos.add_adapter("second", mos.peft_config["default"])
    given[3] = (mos, "second")
    made = merge(given, "average", base=tmp_path / "base")
    made.to_lora(tmp_path / "merged")
    model = PeftModel.from_pretrained(models.llama(), tmp_path / "merged").eval()
    plain = models.llama()
    loras = [
        deltas(PeftModel.from_pretrained(models.llama(), tmp_path / f"lora{i}").eval()) for i in range(2)
    ]
    pools = {
        n.removeprefix("base_model.model."): m.get_delta_weight("second").detach()
        for n, m in mos.named_modules()
        if hasattr(m, "get_delta_weight")
    }
    parts = [*loras, deltas(flora), pools]
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if name.endswith(tuple(TARGETS)):
                change = sum(part.get(name, torch.zeros(())) for part in parts)
                module.weight += (
                    change + tuned.get_submodule(name).weight - base.get_submodule(name).weight
                ) / 5
        assert distance(model(ids).logits, plain(ids).logits) < 1e-5
        made.to_model(tmp_path / "whole")
        whole = type(plain).from_pretrained(tmp_path / "whole").eval()
        assert distance(whole(ids).logits, plain(ids).logits) < 1e-5
    card = (tmp_path / "merged" / "README.md").read_text()
    assert all(str(name) in card for name in ("lora0", "lora1", "tuned", "average", "second"))


def test_a_merge_is_added_to_a_model(tmp_path):
    lora(tmp_path / "a")
    model = lora(tmp_path / "bb", r=3)
    made = merge([tmp_path / "a", tmp_path / "bb"], "task_arithmetic", weights=[0.5, 2.0])
    assert made.add_to(model, "sum") is model
    model.set_adapter("sum")
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found = module.get_delta_weight("sum")
            assert distance(found, made.update(name.removeprefix("base_model.model."))) < 1e-5
    fresh = made.add_to(models.llama(), "default", rank=2)
    assert fresh.peft_config["default"].r == 2
    with pytest.raises(ValueError, match="adapter_name='sum' exists already"):
        made.add_to(model, "sum")


@pytest.mark.parametrize("wrapped", [False, True])
def test_search_finds_the_scale_that_evaluates_best_and_leaves_the_model_alone(tmp_path, wrapped):
    adapter = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    for name in ("first", "second"):
        get_peft_model(models.llama(), adapter).save_pretrained(tmp_path / name)
    folders, ids = [tmp_path / "first", tmp_path / "second"], torch.arange(8)[None]
    wanted = merge(folders, "magnitude", density=0.5, base=models.llama(), scale=0.25)
    wanted = wanted.add_to(models.llama(), "wanted", rank=8).eval()(input_ids=ids).logits
    model = models.llama().eval()
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False)).eval()
    before, kinds = model(input_ids=ids).logits, [type(m) for m in model.modules()]

    def evaluate(merged):
        return -float((merged(input_ids=ids).logits - wanted).norm())

    grid = {"scale": [1.0, 0.25, -0.5], "density": [0.1, 0.5]}
    found = search("magnitude", folders, grid, evaluate, model=model, rank=8)
    assert len(found) == 6
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    assert {key: found[0][key] for key in grid} == {"scale": 0.25, "density": 0.5}
    assert found[0]["score"] > -1e-4
    assert torch.equal(model(input_ids=ids).logits, before)
    assert wrapped or [type(m) for m in model.modules()] == kinds
    for bad in ({}, {"scale": []}):
        with pytest.raises(ValueError, match="must have at least one option"):
            search("magnitude", folders, bad, evaluate, model=model, rank=8)
    with pytest.raises(ValueError, match="evaluate=nan must be finite"):
        search("magnitude", folders, {"density": [0.5]}, lambda _: float("nan"), model=model, rank=8)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("ranks", [(2, 3, 1), (20, 30, 1)])
def test_inner_products_are_those_of_the_updates(ranks):
    made = sources(ranks=ranks)
    stack, taus = Stack(*zip(*(source.pair("layer") for source in made), strict=True)), updates(made)
    wanted = torch.stack([torch.stack([(a * b).sum() for b in taus]) for a in taus])
    assert distance(stack.gram(), wanted) < 1e-12


@pytest.fixture
def two_checkpoints(tmp_path):
    """A base in three files, and two checkpoints that were trained from it."""
    for number, name in enumerate(("base", "one", "two")):
        model = models.llama()
        for parameter in model.parameters():
            if number and parameter.ndim > 1:
                parameter.data += 0.1 * number * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / name, max_shard_size="8KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    return [tmp_path / "one", tmp_path / "two"], tmp_path / "base"


def test_a_merged_model_is_there_once_it_is_complete_and_a_killed_merge_goes_on(
    two_checkpoints, tmp_path, monkeypatch
):
    folders, base = two_checkpoints
    merge(folders, "ties", density=0.5, base=base).to_model(tmp_path / "whole")
    made = merge(folders, "ties", density=0.5, base=base)
    plain = type(made).update

    def killed(self, module):
        if any((tmp_path / "out.partial").glob("*.safetensors")):
            raise KeyboardInterrupt
        return plain(self, module)

    monkeypatch.setattr(type(made), "update", killed)
    with pytest.raises(KeyboardInterrupt):
        made.to_model(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    complete = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert complete
    monkeypatch.setattr(type(made), "update", plain)
    made.to_model(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    assert all((tmp_path / "out" / path.name).stat().st_mtime_ns == at for path, at in complete.items())
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for path in (tmp_path / "whole").glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "out" / path.name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_merge_that_fails_or_has_no_room_leaves_nothing(two_checkpoints, tmp_path, monkeypatch):
    folders, base = two_checkpoints
    made = merge(folders, base=base)

    def broken(self, module):
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(type(made), "update", broken)
        with pytest.raises(ValueError, match="broken"):
            made.to_model(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(ValueError, match="the disk has 100; make room first"):
            made.to_model(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "two"]


def test_heads_are_kept_dropped_or_refused(tmp_path):
    for name in ("a", "bb"):
        lora(tmp_path / name, modules_to_save=["lm_head"])
    both = [tmp_path / "a", tmp_path / "bb"]
    with pytest.raises(ValueError, match="others='error' must be 'drop', or one of"):
        merge(both)
    assert not merge(both, others="drop").others
    kept = merge(both, others=str(tmp_path / "bb")).others
    wanted = load_file(tmp_path / "bb" / "adapter_model.safetensors")
    assert kept
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in kept.items())


def test_the_chosen_heads_are_in_the_lora_and_in_the_model(tmp_path):
    models.llama().save_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        lora(tmp_path / name, modules_to_save=["lm_head"], bias="none")
    both, two = [tmp_path / "one", tmp_path / "two"], str(tmp_path / "two")
    made = merge(both, others=two, base=tmp_path / "base")
    made.to_lora(tmp_path / "merged")
    head = load_file(tmp_path / "two" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    again = PeftModel.from_pretrained(models.llama(), tmp_path / "merged")
    assert torch.equal(again.base_model.model.lm_head.modules_to_save["default"].weight, head)
    made.to_model(tmp_path / "whole")
    whole = models.llama().from_pretrained(tmp_path / "whole").eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert distance(whole(ids).logits, again.eval()(ids).logits) < 1e-5
    merge(both, others="drop", base=tmp_path / "base").to_model(tmp_path / "plain")
    plain = models.llama().from_pretrained(tmp_path / "plain")
    assert torch.equal(plain.lm_head.weight, models.llama().lm_head.weight)


def test_tensors_that_no_result_can_hold_are_refused(two_checkpoints, tmp_path):
    folders, base = two_checkpoints
    names = {name for path in folders[0].glob("*.safetensors") for name in load_file(path)}
    name = next(n for n in sorted(names) if n.endswith("norm.weight"))
    for path in folders[0].glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file({**tensors, name: tensors[name] + 1}, path)
    made = merge(folders, "ties", density=0.5, base=base)
    assert set(made.others) == {name}
    with pytest.raises(ValueError, match=f"cannot go into a LoRA: {name}"):
        made.to_lora(tmp_path / "lora", rank=2)
    made.to_model(tmp_path / "whole")
    found = [load_file(p)[name] for p in (tmp_path / "whole").glob("*.safetensors") if name in load_file(p)]
    wanted = [load_file(p)[name] for p in folders[0].glob("*.safetensors") if name in load_file(p)]
    assert torch.equal(found[0], wanted[0])
    lora(tmp_path / "adapter", modules_to_save=["lm_head"])
    adapter = merge([tmp_path / "adapter"], base=base)
    adapter.kept.others["base_model.model.score.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"has no score\.weight"):
        adapter.to_model(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_and_transposed_weights_are_merged_into_files_as_they_are_stored(tmp_path):
    gpt2, embeddings = models.gpt2(), models.llama()
    for model, targets in ((gpt2, ["c_attn", "c_proj"]), (embeddings, ["embed_tokens", "q_proj"])):
        base, folder = tmp_path / type(model).__name__, tmp_path / f"{type(model).__name__}-lora"
        model.save_pretrained(base)
        transposed = {"fan_in_fan_out": True} if model is gpt2 else {}
        adapted = lora(folder, base=model, target_modules=targets, **transposed)
        ids = torch.arange(8)[None]
        with torch.no_grad():
            wanted = adapted(ids).logits
            merge([folder], base=base).to_model(tmp_path / "whole")
            found = type(model).from_pretrained(tmp_path / "whole").eval()(ids).logits
            assert distance(found, wanted) < 1e-5
            merge([folder], base=base).to_lora(tmp_path / "again")
            plain = type(model).from_pretrained(base)
            assert (
                distance(PeftModel.from_pretrained(plain, tmp_path / "again").eval()(ids).logits, wanted)
                < 1e-5
            )
            # the merged file is a checkpoint, whose update is that of the adapter
            both = merge([folder, tmp_path / "whole"], base=base, others="drop")
            for module in merge([folder]).modules:
                assert distance(both.update(module), 2 * merge([folder]).update(module)) < 1e-4


def test_vocabularies_with_added_tokens_have_their_common_rows_merged(tmp_path):
    torch.manual_seed(0)
    base = models.llama()
    base.save_pretrained(tmp_path / "base")
    size = base.config.vocab_size
    for number, name in enumerate(("one", "two")):
        model = models.llama()
        model.resize_token_embeddings(size + 3 * number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / name)
    folders = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(ValueError, match="rows='common' if tokens were added"):
        merge(folders, base=tmp_path / "base")
    made = merge(folders, "average", base=tmp_path / "base", rows="common")
    made.to_model(tmp_path / "whole")
    whole = dict(models.llama().from_pretrained(tmp_path / "whole").named_parameters())
    parts = [dict(type(base).from_pretrained(folder).named_parameters()) for folder in folders]
    for name, parameter in whole.items():
        wanted = sum(part[name].detach()[: len(parameter)] for part in parts) / 2
        assert distance(parameter.detach(), wanted) < 1e-5, name
    wide = _wide(size)
    lora(tmp_path / "a", target_modules=["embed_tokens", "lm_head", "q_proj"])
    lora(tmp_path / "bb", base=wide, target_modules=["embed_tokens", "lm_head", "q_proj"])
    adapters = [tmp_path / "a", tmp_path / "bb"]
    with pytest.raises(ValueError, match="rows='common' if tokens were added"):
        merge(adapters)
    merge(adapters, rows="common").to_lora(tmp_path / "merged")
    found = deltas(PeftModel.from_pretrained(models.llama(), tmp_path / "merged"))
    bases = models.llama(), _wide(size)
    wanted = [deltas(PeftModel.from_pretrained(m, f)) for m, f in zip(bases, adapters, strict=True)]
    for name, update in found.items():
        assert distance(update, sum(one[name][: len(update)] for one in wanted)) < 1e-5, name
    with pytest.raises(ValueError, match="rows='all' must be"):
        merge(adapters, rows="all")


def _wide(size):
    wide = models.llama()
    wide.resize_token_embeddings(size + 3)
    return wide


def kept_by_mask(entries, threshold, method):
    """What TALL-masks or EMR give each source of one entry, before EMR's scale."""
    if method == "tall":
        together = sum(entries)
        return [together if abs(x) > threshold * abs(together - x) else 0.0 for x in entries]
    elected_ = largest(entries, [1.0] * len(entries))
    return [elected_ if x * elected_ > 0 else 0.0 for x in entries]


@pytest.mark.parametrize("method", ["tall", "emr"])
def test_checkpoints_are_kept_as_a_shared_update_and_bits(two_checkpoints, tmp_path, method):
    folders, base = two_checkpoints
    made = compress(folders, tmp_path / "both", method, base=base, threshold=0.5)
    origin, *tuned = (dict(models.llama().from_pretrained(f).named_parameters()) for f in (base, *folders))
    names = [f"{module}.weight" for module in made.modules]
    truth = [{}, {}]
    for name in names:
        taus = [(one[name] - origin[name]).detach().double() for one in tuned]
        found = [torch.zeros_like(tau) for tau in taus]
        for place in itertools.product(*map(range, taus[0].shape)):
            for one, value in zip(
                found, kept_by_mask([float(t[place]) for t in taus], 0.5, method), strict=True
            ):
                one[place] = value
        for number, one in enumerate(found):
            truth[number][name] = one
    for number, folder in enumerate(folders):
        if method == "emr":
            size = sum(float((tuned[number][n] - origin[n]).detach().double().abs().sum()) for n in names)
            scale = size / sum(float(truth[number][n].abs().sum()) for n in names)
            truth[number] = {name: scale * one for name, one in truth[number].items()}
        for name in names:
            assert (
                distance(made.update(str(folder), name.removesuffix(".weight")), truth[number][name]) < 1e-5
            )
        made.to_model(str(folder), tmp_path / f"again{number}")
        again = dict(models.llama().from_pretrained(tmp_path / f"again{number}").named_parameters())
        for name, parameter in again.items():
            wanted = origin[name].detach() + truth[number].get(name, 0)
            assert distance(parameter.detach(), wanted) < 1e-5, name
    # a bit for each weight and source
    for number in range(len(made.modules)):
        tensors = load_file(made.folder / f"{number:05}.safetensors")
        assert {tensors[f"mask-{t}"].numel() for t in (0, 1)} == {-(-tensors["shared"].numel() // 8)}
    with pytest.raises(ValueError, match="exists already"):
        compress(folders, tmp_path / "both", base=base)
    with pytest.raises(ValueError, match="source='other' must be one of"):
        made.to_model("other", tmp_path / "more")


def test_one_checkpoint_is_kept_exactly(two_checkpoints, tmp_path):
    folders, base = two_checkpoints
    compress(folders[:1], tmp_path / "tall", base=base).to_model(str(folders[0]), tmp_path / "again")
    wanted = models.llama().from_pretrained(folders[0]).state_dict()
    found = models.llama().from_pretrained(tmp_path / "again").state_dict()
    assert all(distance(found[name], tensor) < 1e-6 for name, tensor in wanted.items())


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 65])
def test_bits_are_packed_eight_to_a_byte(count):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = pack(mask)
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack(packed, count), mask)
    assert int(pack(torch.tensor([True, False, True]))) == 5


def test_masks_of_adapters_are_refused_where_the_adapters_are_smaller(tmp_path):
    models.llama().save_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        lora(tmp_path / name, r=1, target_modules=["lm_head"])
    folders = [tmp_path / "one", tmp_path / "two"]
    wide = [Made(f"s{t}", {"layer": (torch.ones(256, 1), torch.ones(1, 256))}) for t in range(2)]
    with pytest.raises(ValueError, match=r"take 2,048 bytes in bf16, and their masks alone 16,384"):
        compress(wide, tmp_path / "masks", base=tmp_path / "base")
    assert not (tmp_path / "masks").exists()
    assert compress(folders, tmp_path / "masks", base=tmp_path / "base").modules == ["lm_head"]


def test_users_add_methods():
    @register("first_only")
    def first_only(stack: Stack, weights: Tensor, generators, *, times: float = 1.0):
        """`times · τ_1`."""
        return Coefficients(times * (torch.arange(len(stack)) == 0).to(weights))

    try:
        made = sources()
        assert distance(merge(made, "first_only", times=2.0).update("layer"), 2 * updates(made)[0]) < 1e-12
        with pytest.raises(ValueError, match="'first_only' exists already"):
            register("first_only")
    finally:
        del METHODS["first_only"]


def test_a_merge_is_computed_when_it_is_written_and_not_before(monkeypatch):
    for method in ("ties", "dare", "task_arithmetic"):
        with monkeypatch.context() as patch:
            patch.setattr("peft_subspace.merging.driver.compute", None)
            made = merge(sources(), method)
            with pytest.raises(TypeError):
                made.update("layer")
        assert made.update("layer").shape == (7, 9)


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "mean"}, ValueError, r"method='mean' must be one of"),
        ({"space": "both"}, ValueError, r"space='both' must be"),
        ({"weights": [1.0]}, ValueError, r"weights=\[1\.0\] must have one entry for each of the 3"),
        ({"weights": [1.0, float("nan"), 1.0]}, ValueError, r"weights=nan must be finite"),
        ({"scale": "a"}, TypeError, r"scale='a' must be a number"),
        ({"method": "ties", "density": 0.001}, ValueError, r"layer: density=0.001 keeps nothing of 63"),
        ({"method": "ties", "density": 0}, ValueError, r"density=0 must be above 0"),
        ({"method": "dare", "density": None}, ValueError, r"density=None must be above 0"),
        ({"method": "slerp"}, ValueError, r"takes two sources, and there are 3"),
        ({"method": "della", "density": 0.9, "spread": 0.2}, ValueError, r"spread=0.2 must be from 0 to 0.1"),
        ({"method": "regmean", "grams": {"layer": []}}, ValueError, r"one matrix for each of the 3"),
        ({"method": "ties", "dense": 1}, TypeError, r"dense"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        merge(sources(), **options)


def test_bad_sources_are_refused_and_nothing_is_written(tmp_path):
    lora(tmp_path / "a")
    with pytest.raises(ValueError, match=r"sources=.* must name at least one"):
        merge([])
    with pytest.raises(TypeError, match="sources must be a list, and is one str"):
        merge("organization/adapter")
    with pytest.raises(ValueError, match="must differ; give an adapter once"):
        merge([tmp_path / "a", tmp_path / "a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither an adapter_config\.json nor model\.safetensors"):
        merge([tmp_path / "a", tmp_path / "empty"])
    lora(tmp_path / "wide", base=models.build(type(models.llama()), _wider()))
    with pytest.raises(ValueError, match=r"is for a weight of shape .*different base models"):
        merge([tmp_path / "a", tmp_path / "wide"])
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = next(iter(state))
    save_file({**state, key: state[key] * float("nan")}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        list(merge([tmp_path / "a"]).pairs())
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pickled tensors are not read"):
        merge([tmp_path / "a"])
    made = merge(sources(), "ties", density=0.5)
    for options, message in (
        ({}, "rank=None is needed"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": 2, "energy": 0.5}, "cannot be given beside rank=2"),
        ({"energy": 1.5}, "energy=1.5 must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            made.to_lora(tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="base=None must be the folder"):
        made.to_model(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _wider():
    import transformers as hf

    return hf.LlamaConfig(**models.TEXT, **{**models.LLAMA, "hidden_size": 24})


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("base_model_name_or_path", r"different base models, \['one', 'two'\]"),
        ("revision", r"different revisions of the base model, \['one', 'two'\]"),
    ],
)
def test_different_named_bases_are_refused(named, message, tmp_path):
    for name, base in (("a", "one"), ("bb", "two"), ("ccc", None)):
        model = lora(tmp_path / name)
        setattr(model.peft_config["default"], named, base)
        model.peft_config["default"].save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        merge([tmp_path / "a", tmp_path / "bb"])
    merge([tmp_path / "ccc", tmp_path / "a"]).to_lora(tmp_path / "merged")
    assert getattr(PeftConfig.from_pretrained(str(tmp_path / "merged")), named) == "one"


@pytest.mark.parametrize("name", ["effort", "continual_svd"])
def test_adapters_of_other_base_weights_are_refused(name, tmp_path):
    method = next(m for m in methods.METHODS if m.name == name)
    base = models.llama()
    for number, folder in enumerate((tmp_path / "one", tmp_path / "two", tmp_path / "other")):
        if folder.name == "other":
            base.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 1
        config = method.config(target_modules=TARGETS, init_weights=True, seed=number)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    assert merge([tmp_path / "one", tmp_path / "two"], base=models.llama()).modules
    message = r"layers\.1\.self_attn\.q_proj: .*one and .*other were trained on different base weights"
    with pytest.raises(ValueError, match=message):
        merge([tmp_path / "one", tmp_path / "other"], base=models.llama())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is set, and DoRA rescales the weight"),
        ({"lora_bias": True}, "lora_bias is set, and it trains biases of its factors"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "it acts on some tokens only"),
        ({"target_parameters": ["q_proj.weight"]}, "its factors belong to parameters of modules"),
        ({"layer_replication": [[0, 2]]}, "its base has layers twice"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is set, and that start changes the base"),
    ],
)
def test_loras_whose_update_is_not_their_factors_are_refused(options, message, tmp_path):
    lora(tmp_path / "a")
    config = PeftConfig.from_pretrained(str(tmp_path / "a"))
    for field, value in options.items():
        setattr(config, field, value)
    config.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ValueError, match=message):
        merge([tmp_path / "a"])


# ------------------------------------------------------------------------------------ command line


def test_command_line_merges_and_says_what_it_would(tmp_path, capsys):
    from peft_subspace.__main__ import main

    for name in ("a", "bb"):
        lora(tmp_path / name)
    given = ["merge", str(tmp_path / "a"), str(tmp_path / "bb"), "--weights", "0.5,2"]
    out = str(tmp_path / "out")
    assert main([*given, "--lora", out, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.strip().splitlines()]
    assert len(rows) == 1 + 6 + 2
    made = merge([tmp_path / "a", tmp_path / "bb"], weights=[0.5, 2.0])
    made.to_lora(tmp_path / "exact")
    tensors = load_file(tmp_path / "exact" / "adapter_model.safetensors").values()
    assert plan(made).lora_bytes == sum(tensor.nbytes for tensor in tensors)
    assert f"LoRA {plan(made).lora_bytes / 2**20:.1f} MiB" in printed
    assert {name: int(rank) for name, rank, *_ in rows[1:7]} == {
        name: sum(stack.ranks) for name, stack in made.stacks()
    }
    assert not (tmp_path / "out").exists()
    assert main([*given, "--method", "ties", "--density", "0.5", "--lora", out, "--rank", "3"]) == 0
    assert "error of the cut" in capsys.readouterr().out
    expected = merge([tmp_path / "a", tmp_path / "bb"], "ties", weights=[0.5, 2.0], density=0.5)
    again = merge([out])
    for module in expected.modules:
        left, right = expected.factors(module, rank=3)
        assert distance(again.update(module), left @ right) < 1e-5
    assert main([*given, "--method", "ties", "--lora", str(tmp_path / "more")]) == 1
    assert "rank=None is needed" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
    assert main([*given, "--model", out]) == 1
    assert "base=None must be" in capsys.readouterr().err
