"""MoS: pools shared by groups of modules, against loops over shards and wherever pools have to be found."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import peft_subspace
from peft_subspace import MoSConfig
from peft_subspace.methods.mos import MoSLayer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(10).view(2, 5)


class Blocks(nn.Module):
    """A few equal blocks of every kind of layer that can be adapted."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "linear": nn.Linear(8, 12),
                    "transposed": Conv1D(8, 12),
                    "conv": nn.Conv1d(8, 8, 3, padding=1),
                    "grouped": nn.Conv1d(8, 8, 3, padding=1, groups=2),
                }
            )
            for _ in range(blocks)
        )

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["transposed"](torch.relu(block["linear"](x)))
            x = x + block["grouped"](torch.relu(block["conv"](x.mT))).mT
        return x


KINDS = ["embed", "linear", "transposed", "conv", "grouped"]


def llama(layers=3, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {
            "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 32, "num_hidden_layers": layers,
        }  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def config(**options):
    return MoSConfig(**{"target_modules": LINEARS, "init_weights": False, "seed": 3, **options})


def adapted(adapter="default", **options):
    return get_peft_model(llama(), config(**options), adapter).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MoSLayer)}


def delta_of(model, suffix, adapter="default"):
    return next(m.deltas[adapter] for name, m in layers_of(model).items() if name.endswith(suffix))


def pools_under(delta):
    return delta.shared_tensors.pair(delta.spec.group)


def pools_of(model, adapter="default"):
    return {n: p for n, p in model.named_parameters() if f"moshards_pools.{adapter}." in n}


def by_loops(delta, scaling):
    """ΔW entry by entry, the shards looked up one number at a time."""
    pool_a, pool_b = (pool.tolist() for pool in pools_under(delta))
    index_a, index_b = delta.index_A.tolist(), delta.index_B.tolist()
    out, *rest = delta.shape.dims
    columns = torch.Size(rest).numel()
    wide_a, wide_b = len(pool_a[0]), len(pool_b[0])
    shards_a, shards_b = columns // wide_a, out // wide_b
    entries = torch.zeros(out, columns, dtype=torch.float64)
    for o in range(out):
        for i in range(columns):
            entries[o, i] = scaling * sum(
                pool_b[index_b[j * shards_b + o // wide_b]][o % wide_b]
                * pool_a[index_a[j * shards_a + i // wide_a]][i % wide_a]
                for j in range(len(index_a) // shards_a)
            )
    return entries.reshape(out, *rest)


# ------------------------------------------------------------------------------------------- equation


@pytest.mark.parametrize("shards", [None, 1, 2])
@pytest.mark.parametrize("private_r", [None, 0, 2])
def test_update_equals_the_loops_on_every_kind_of_layer(shards, private_r):
    options = {"r": 5, "equivalent_r": 3, "rank_pattern": {"embed": 3}, "alpha": 7}
    model = get_peft_model(
        Blocks(), config(target_modules=KINDS, shards_per_vector=shards, private_r=private_r, **options)
    )
    found = layers_of(model)
    assert len(found) == 13
    for name, layer in found.items():
        expected = by_loops(layer.deltas["default"], 7 / (3 if name.endswith("embed") else 5))
        actual = layer.get_delta_weight("default")
        if isinstance(layer.base_layer, Conv1D | nn.Embedding):
            actual = actual.T
        assert torch.allclose(actual.double(), expected, atol=1e-5), name


def test_forward_is_that_of_the_dense_weight():
    model = get_peft_model(Blocks(), config(target_modules=KINDS)).eval()
    result = model(IDS % 10)
    plain = copy.deepcopy(model).merge_and_unload()
    assert not layers_of(plain)
    assert torch.allclose(plain(IDS % 10), result, atol=1e-5)
    assert not torch.allclose(Blocks()(IDS % 10), result, atol=1e-2)


@pytest.mark.parametrize(("e", "p", "r", "shards"), [(4, 2, 6, 2), (2, 0, 5, 4), (3, 3, 3, 1), (4, 1, 2, 4)])
def test_indices_are_a_draw_of_shared_rows_and_the_modules_own(e, p, r, shards):
    model = adapted(equivalent_r=e, private_r=p, r=r, shards_per_vector=shards)
    own = []
    for k in range(3):
        delta = delta_of(model, f"layers.{k}.self_attn.k_proj")
        for side, pool in zip("AB", pools_under(delta), strict=True):
            assert len(pool) == e * 3 * shards
            index = delta.get_buffer(f"index_{side}").tolist()
            shared, private = index[: (r - p) * shards], index[(r - p) * shards :]
            rows = (e - p) * 3 * shards
            assert len(set(shared)) == len(shared) == (r - p) * shards
            assert all(0 <= row < rows for row in shared)
            assert private == list(range(rows + k * p * shards, rows + (k + 1) * p * shards))
            own += private if side == "A" else []
    assert sorted(own) == list(range((e - p) * 3 * shards, e * 3 * shards))


def test_both_factors_and_all_modules_choose_on_their_own():
    model = adapted(equivalent_r=8, private_r=0, r=6, shards_per_vector=2)
    chosen = [
        tuple(layer.deltas["default"].get_buffer(f"index_{side}").tolist())
        for layer in layers_of(model).values()
        for side in "AB"
    ]
    assert len(set(chosen)) == len(chosen) == 42


def test_with_all_ranks_private_it_is_plain_lora():
    model = adapted(r=3, private_r=3, equivalent_r=3, shards_per_vector=1, alpha=6)
    pool_a, pool_b = pools_under(delta_of(model, "0.self_attn.q_proj"))
    for k in range(3):
        own = slice(3 * k, 3 * k + 3)
        layer = next(m for n, m in layers_of(model).items() if n.endswith(f"{k}.self_attn.q_proj"))
        assert torch.allclose(layer.get_delta_weight("default"), 2 * pool_b[own].T @ pool_a[own], atol=1e-6)


def test_pure_sharing_gives_all_modules_of_a_group_one_update():
    options = {"private_r": 0, "equivalent_r": 2, "shards_per_vector": 1, "pair_dissociation": False}
    for model in (adapted(r=6, alpha=16, **options), adapted(subset_selection=False, alpha=16, **options)):
        pool_a, pool_b = pools_under(delta_of(model, "0.mlp.up_proj"))
        scaling = 16 / model.peft_config["default"].r
        for name, layer in layers_of(model).items():
            if name.endswith("up_proj"):
                expected = scaling * pool_b.T @ pool_a
                assert torch.allclose(layer.get_delta_weight("default"), expected, atol=1e-5)


def test_pair_dissociation_off_takes_the_same_rows_of_both_pools():
    model = adapted(pair_dissociation=False)
    for layer in layers_of(model).values():
        delta = layer.deltas["default"]
        assert torch.equal(delta.index_A, delta.index_B)
        assert len(pools_under(delta)[0]) == len(pools_under(delta)[1])


def test_subset_selection_off_uses_every_shared_row_and_keeps_private_ones():
    model = adapted(subset_selection=False, private_r=2, equivalent_r=8, shards_per_vector=2)
    for k in range(3):
        delta = delta_of(model, f"{k}.mlp.up_proj")
        assert delta.spec.rank == 2 + 6 * 3  # more than the default
        assert sorted(delta.index_A.tolist()) == [*range(36), *range(36 + 4 * k, 40 + 4 * k)]


def test_start_of_the_pools():
    model = get_peft_model(llama(), MoSConfig(target_modules=LINEARS, shards_per_vector=4, equivalent_r=8))
    for name, pool in pools_of(model).items():
        fan_in = 24 if "down_proj" in name else 16  # the whole vector's, not the shard's
        if name.endswith("__A"):
            assert 0.9 * fan_in**-0.5 < pool.abs().max() <= fan_in**-0.5
        else:
            assert not pool.any()
        assert pool.dtype == torch.float32
    assert torch.equal(logits(model), logits(llama()))


# --------------------------------------------------------------------------------------- groups, counts


def test_groups_are_formed_by_type_and_shape():
    model = adapted()
    names = {name.rpartition(".")[2] for name in pools_of(model)}
    assert names == {f"{linear}__{side}" for linear in LINEARS for side in "AB"}
    assert pools_under(delta_of(model, "k_proj"))[1].shape[1] == 8 // 4  # narrower than q_proj's
    bart = BartForConditionalGeneration(
        BartConfig(
            d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, vocab_size=32,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
        )
    )  # fmt: skip
    wrapped = get_peft_model(bart, config(target_modules=["q_proj"]))
    names = {name.rpartition(".")[2] for name in pools_of(wrapped) if name.endswith("__A")}
    assert names == {
        "encoder_layers_self_attn_q_proj__A", "decoder_layers_self_attn_q_proj__A", "encoder_attn_q_proj__A"
    }  # fmt: skip
    assert delta_of(wrapped, "encoder.layers.1.self_attn.q_proj").spec.members == 2


def test_layers_of_one_type_and_several_shapes_are_kept_apart():
    net = nn.Module()
    net.add_module("layers", nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)]))
    model = get_peft_model(net, config(target_modules=r"layers\.\d"))
    assert {name.rpartition(".")[2] for name in pools_of(model)} == {
        f"layers_{size}__{side}" for size in ("8x8", "16x8") for side in "AB"
    }
    assert delta_of(model, "layers.2").spec.position == 1


def test_group_pattern_overrides_the_grouping():
    model = adapted(group_pattern={"q_proj|o_proj": "square", r"0\.self_attn\.v_proj": "first"})
    names = {name.rpartition(".")[2].removesuffix("__A") for name in pools_of(model) if name.endswith("__A")}
    assert names == {"square", "first", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert delta_of(model, "2.self_attn.o_proj").spec.members == 6
    assert delta_of(model, "1.self_attn.v_proj").spec.members == 2


SIZES = {
    "LLaMA-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32},
    "LLaMA-2-13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                    "num_attention_heads": 40, "num_key_value_heads": 40},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "e", "count"),
    [
        ("LLaMA-2-7B", 2, 4_997_120),
        ("LLaMA-2-7B", 4, 9_994_240),
        ("LLaMA-2-7B", 8, 19_988_480),
        ("Llama-3-8B", 2, 5_242_880),
        ("LLaMA-2-13B", 2, 7_823_360),
    ],
)
def test_trainable_counts_of_published_models(size, e, count):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size], vocab_size=32000))
    wrapped = get_peft_model(
        model, MoSConfig(target_modules="all-linear", equivalent_r=e), low_cpu_mem_usage=True
    )
    assert wrapped.get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize(("r", "p", "shards"), [(2, 0, 1), (4, 1, 2), (6, 0, 4), (2, 2, 1)])
def test_count_is_that_of_lora_at_the_equivalent_rank(r, p, shards):
    model = adapted(equivalent_r=2, r=r, private_r=p, shards_per_vector=shards)
    lora = get_peft_model(llama(), LoraConfig(r=2, target_modules=LINEARS))
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("width", "height"), [(10, 20), (10, 10), (1, 2), (2, 1), (256, 256), (7, 5)])
def test_defaults_fit_a_single_small_layer(width, height):
    net = nn.Sequential(nn.Linear(width, height))
    x = torch.randn(3, width)
    before = net(x)
    model = get_peft_model(net, MoSConfig(target_modules=["0"]))
    assert model.get_nb_trainable_parameters()[0] == 4 * (width + height)
    assert delta_of(model, "0").spec.rank == 4
    assert torch.equal(model(x), before)


def test_unset_shards_are_the_largest_divisor_of_each_width_up_to_4():
    for width, height, shards in [(12, 10, (4, 2)), (9, 4, (3, 4)), (7, 25, (1, 1)), (6, 15, (3, 3))]:
        model = get_peft_model(nn.Sequential(nn.Linear(width, height)), MoSConfig(target_modules=["0"]))
        assert delta_of(model, "0").spec.shards == shards
    options = {"target_modules": ["0"], "pair_dissociation": False}  # the same rows of both need the same cut
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10)), MoSConfig(**options))
    assert delta_of(model, "0").spec.shards == (2, 2)


@pytest.mark.parametrize(
    ("members", "options", "private"),
    [
        (2, {}, 2),
        (2, {"equivalent_r": 5}, 2),
        (2, {"equivalent_r": 1}, 0),
        (1, {"r": 2}, 1),
        (2, {"r": 3}, 1),
        (2, {"r": 7}, 1),  # six vectors to choose from, and one of its own
        (3, {"r": 10}, 1),
        (2, {"r": 8}, 0),
    ],
)
def test_unset_private_rank_is_half_of_the_smaller_rank_or_what_the_rank_leaves(members, options, private):
    base = nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(12, 12)}) for _ in range(members)])
    model = get_peft_model(base, MoSConfig(target_modules=["layer"], **options))
    specs = [layer.deltas["default"].spec for layer in layers_of(model).values()]
    assert [spec.private_r for spec in specs] == [private] * members
    assert {spec.rank for spec in specs} == {options.get("r", min(specs[0].shared_vectors + private, 16))}


# ------------------------------------------------------------------------------------------- files


def test_file_holds_the_pools_once_and_the_indices_as_integers(tmp_path):
    model = adapted(equivalent_r=2, r=4, private_r=1, shards_per_vector=2)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    pools = {
        key: tensor for key, tensor in tensors.items() if key.startswith("base_model.model.moshards_pools.")
    }
    assert sorted(key.removeprefix("base_model.model.moshards_pools.") for key in pools) == sorted(
        f"{linear}__{side}" for linear in LINEARS for side in "AB"
    )
    assert sum(pool.numel() for pool in pools.values()) == model.get_nb_trainable_parameters()[0]
    rest = {key: tensor for key, tensor in tensors.items() if key not in pools}
    assert len(rest) == 2 * 3 * len(LINEARS)
    assert all(re.search(r"_proj\.moshards_delta\.index_[AB]$", key) for key in rest)
    assert all(tensor.dtype == torch.int32 and tensor.shape == (8,) for tensor in rest.values())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapter_loads_to_the_same_outputs(tmp_path, low_cpu_mem_usage):
    model = adapted()
    model.save_pretrained(tmp_path)
    # What the file says counts, not what another seed, or another version of torch, would draw.
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 77}))
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    trained = PeftModel.from_pretrained(llama(), tmp_path, "b", is_trainable=True)
    assert all(pool.requires_grad for pool in pools_of(trained, "b").values())
    assert torch.equal(logits(peft_subspace.load(llama(), tmp_path)), logits(model))


def test_second_adapter_loads_and_saves_beside_the_first(tmp_path):
    first, second = adapted(), adapted(equivalent_r=2, r=3, seed=8)
    second.save_pretrained(tmp_path / "second")
    report = first.load_adapter(tmp_path / "second", "later")
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "later" in key]
    own = logits(first)
    first.set_adapter("later")
    assert torch.equal(logits(first), logits(second))
    first.save_pretrained(tmp_path / "both", selected_adapters=["later"])
    saved = load_file(tmp_path / "both" / "later" / "adapter_model.safetensors")
    expected = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    first.set_adapter("default")
    assert torch.equal(logits(first), own)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("value", [-1, "end"])
def test_indices_outside_their_pool_are_refused(tmp_path, side, value):
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.model.layers.1.mlp.up_proj.moshards_delta.index_{side}"
    pools = dict(zip("AB", pools_under(delta_of(model, "layers.1.mlp.up_proj")), strict=True))
    if value == "end":
        value = len(pools[side])
        tensors[key][2] = value - 1  # the last row is inside
        save_file(tensors, path, metadata={"format": "pt"})
        peft_subspace.load(llama(), tmp_path)
    tensors[key][2] = value
    save_file(tensors, path, metadata={"format": "pt"})
    base = llama()
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.up_proj.*index_{side} points outside its pool"):
        peft_subspace.load(base, tmp_path)
    assert not layers_of(base)
    with pytest.raises(ValueError, match=f"index_{side} points outside its pool"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not layers_of(base)
    assert not hasattr(base, "moshards_pools")
    injected = inject_adapter_in_model(config(), base)
    with pytest.raises(ValueError, match=f"index_{side} points outside its pool"):
        set_peft_model_state_dict(injected, tensors)
    assert torch.equal(logits(injected), logits(model))


def test_missing_or_misshapen_pools_are_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    pool = tensors.pop("base_model.model.moshards_pools.up_proj__A")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"moshards_pools\.up_proj__A"):
        peft_subspace.load(llama(), tmp_path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*moshards_pools\.default\.up_proj__A"):
        PeftModel.from_pretrained(llama(), tmp_path)
    tensors["base_model.model.moshards_pools.up_proj__A"] = pool[:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"moshards_pools\.(default\.)?up_proj__A has shape"):
        PeftModel.from_pretrained(llama(), tmp_path)


# --------------------------------------------------------------------------- injection, transformers, TRL


def test_injection_keeps_the_pools_and_their_state():
    torch.manual_seed(5)
    model = inject_adapter_in_model(config(), llama())
    assert type(model) is LlamaForCausalLM
    assert torch.equal(logits(model), logits(adapted()))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(pools_of(model))
    state = get_peft_model_state_dict(model)
    assert "moshards_pools.q_proj__A" in state
    assert "model.layers.0.self_attn.q_proj.moshards_delta.index_B" in state
    other = inject_adapter_in_model(config(seed=9), llama())
    assert not torch.equal(logits(other), logits(model))
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))
    # A wrapped model reads the same tensors, and the other way round.
    wrapped = adapted(seed=9)
    set_peft_model_state_dict(wrapped, {f"base_model.model.{key}": t for key, t in state.items()})
    assert torch.equal(logits(wrapped), logits(model))
    plain = inject_adapter_in_model(config(seed=9), llama())
    set_peft_model_state_dict(plain, get_peft_model_state_dict(wrapped))
    assert torch.equal(logits(plain), logits(model))


def test_injection_on_the_meta_device_then_loading():
    state = get_peft_model_state_dict(inject_adapter_in_model(config(), llama()))
    model = inject_adapter_in_model(config(seed=9), llama(), low_cpu_mem_usage=True)
    assert all(pool.is_meta for pool in pools_of(model).values())
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert torch.equal(logits(model), logits(adapted()))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_adapters_of_transformers(tmp_path):
    expected = adapted()
    expected.save_pretrained(tmp_path / "peft")
    model = llama()
    plain = logits(model)
    model.load_adapter(tmp_path / "peft", "a")
    assert torch.equal(logits(model), logits(expected))
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "transformers")
    again = llama()
    again.load_adapter(tmp_path / "transformers")
    assert torch.equal(logits(again), logits(expected))

    model.add_adapter(config(seed=4), "b")
    assert all(pool.requires_grad for pool in pools_of(model, "b").values())
    assert not any(pool.requires_grad for pool in pools_of(model, "a").values())
    assert not torch.equal(logits(model), logits(expected))
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    assert not any(p.requires_grad for p in model.parameters())
    model.enable_adapters()
    model.set_adapter("a")
    assert torch.equal(logits(model), logits(expected))
    assert all(pool.requires_grad for pool in pools_of(model, "a").values())
    assert not any(pool.requires_grad for pool in pools_of(model, "b").values())
    model.delete_adapter("b")
    assert not pools_of(model, "b")
    assert torch.equal(logits(model), logits(expected))
    model.delete_adapter("a")
    assert not [key for key in model.state_dict() if "moshards" in key]
    assert torch.equal(logits(model), plain)


def test_transformers_loads_onto_a_bf16_model(tmp_path):
    model = get_peft_model(llama().bfloat16(), config()).eval()
    model.save_pretrained(tmp_path)
    loaded = llama().bfloat16()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert delta_of(loaded, "q_proj").index_A.dtype == torch.int32


def test_reference_copy_of_trainers_gives_an_equal_model():
    torch.manual_seed(1)
    model = adapted(seed=None)
    expected = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    own = dict(model.named_parameters())
    copied = 0
    for name, parameter in own.items():
        if ".default." in name:
            own[name.replace(".default.", ".ref.")].data.copy_(parameter.data)
            copied += 1
    assert copied == 14
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    for pool in pools_of(model).values():
        pool.data.zero_()
    assert torch.equal(logits(model), expected)


# ------------------------------------------------------------------------------- life of the adapters


def test_set_adapter_and_requires_grad_switch_the_pools():
    model = adapted()
    model.add_adapter("b", config(seed=4))
    train = {
        name: {pool.requires_grad for pool in pools_of(model, name).values()} for name in ("default", "b")
    }
    assert train == {"default": {True}, "b": {False}}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(pools_of(model))
    model.set_adapter("b")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(pools_of(model, "b"))
    model.set_requires_grad("b", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad(["b", "default"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *pools_of(model), *pools_of(model, "b")
    }  # fmt: skip
    for layer in layers_of(model).values():
        layer.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


def test_adapters_keep_pools_of_their_own():
    model = adapted()
    alone = logits(model)
    model.add_adapter("b", config(seed=4))
    model.set_adapter("b")
    model(IDS).logits.sum().backward()
    assert all(pool.grad is not None for pool in pools_of(model, "b").values())
    assert all(pool.grad is None for pool in pools_of(model).values())
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    for pool in pools_of(model, "b").values():
        pool.data.zero_()
    assert torch.equal(logits(model), alone)
    assert not torch.equal(both, alone)


def test_disable_adapter_gives_the_base_model():
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert all(pool.requires_grad for pool in pools_of(model).values())


def test_deleting_an_adapter_deletes_its_pools():
    model = adapted()
    expected = logits(model)
    model.add_adapter("b", config(seed=4))
    model.delete_adapter("b")
    assert not [key for key in model.state_dict() if ".b." in key]
    assert torch.equal(logits(model), expected)
    model.add_adapter("b", config(seed=5, equivalent_r=2))
    model.set_adapter("b")
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("merge", [False, True])
def test_unloading_leaves_no_pool_behind(merge):
    model = adapted()
    expected = logits(model) if merge else logits(llama())
    plain = model.merge_and_unload() if merge else model.unload()
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    assert {*plain.state_dict()} == {*llama().state_dict()}
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in llama().named_modules()]
    assert logits(get_peft_model(plain, config())) is not None


def test_merging_and_unmerging_restores_the_base_exactly():
    model = adapted()
    expected, weight = logits(model), model.get_base_model().model.layers[0].self_attn.q_proj.weight.clone()
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.get_base_model().model.layers[0].self_attn.q_proj.weight, weight)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_follow_their_own_pools(duplicate):
    for model in (adapted(), inject_adapter_in_model(config(), llama())):
        expected = logits(model)
        twin = duplicate(model)
        assert torch.equal(logits(twin), expected)
        for pool in pools_of(twin).values():
            pool.data.zero_()
        assert torch.equal(logits(twin), logits(llama()))
        assert torch.equal(logits(model), expected)
        if isinstance(twin, PeftModel):
            twin.delete_adapter("default")
            assert not pools_of(twin)
            assert pools_of(model)


def test_pools_are_found_after_they_were_replaced():
    model = adapted()
    expected = logits(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert torch.equal(logits(model), expected)
    zeros = {name: torch.zeros_like(pool) for name, pool in pools_of(model).items()}
    result = torch.func.functional_call(model, zeros, (IDS,)).logits
    assert torch.equal(result, logits(llama()))


def test_dtype_of_the_pools():
    kept = get_peft_model(llama().bfloat16(), config())
    assert {pool.dtype for pool in pools_of(kept).values()} == {torch.float32}
    assert logits(kept).dtype == torch.bfloat16
    cast = get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=False)
    assert {pool.dtype for pool in pools_of(cast).values()} == {torch.bfloat16}
    cast.half()
    assert {pool.dtype for pool in pools_of(cast).values()} == {torch.float16}
    assert delta_of(cast, "q_proj").index_A.dtype == torch.int32
    assert torch.isfinite(logits(cast)).all()


def test_a_root_that_runs_its_children_in_turn():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    expected = net(x)
    model = get_peft_model(net, MoSConfig(target_modules=["0", "2"]))
    assert torch.equal(model(x), expected)
    assert torch.equal(model.unload()(x), expected)


def test_requests_of_several_adapters_in_one_batch():
    model = adapted()
    model.add_adapter("b", config(seed=4, equivalent_r=2, r=5))
    ids = torch.cat([IDS, IDS + 3, IDS + 9])
    names = ["b", "default", "__base__", "default", "b", "b"]
    with torch.no_grad():
        mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = copy.deepcopy(model)
        if name == "__base__":
            alone = alone.unload()
        else:
            alone.set_adapter(name)
        with torch.no_grad():
            assert torch.allclose(mixed[row], alone(ids[row : row + 1]).logits[0], atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base(bits):
    bnb = pytest.importorskip("bitsandbytes")

    def quantized():
        torch.manual_seed(0)
        make = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
        options = {"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False, "threshold": 0.0}
        plain = [nn.Linear(64, 64) for _ in range(3)]
        layers = []
        for linear in plain:
            layer = make(64, 64, **options)
            layer.load_state_dict(linear.state_dict())
            layers.append(layer)
        return nn.Sequential(*layers).to("cpu").eval()

    x = torch.randn(5, 64)
    base = quantized()(x)
    model = get_peft_model(quantized(), config(target_modules=["0", "1", "2"], init_weights=True)).eval()
    assert torch.allclose(model(x), base, atol=1e-2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(model(x), base, atol=1e-3)
    with model.disable_adapter(), torch.no_grad():
        assert torch.allclose(model(x), base, atol=1e-2)  # without gradients another kernel runs
    assert model.unload()(x).shape == base.shape


# ------------------------------------------------------------------------------------------- export


def test_exported_lora_is_the_same_model(tmp_path):
    for model in (
        adapted(r=5, equivalent_r=3),
        inject_adapter_in_model(config(r=5, equivalent_r=3), llama()),
    ):
        peft_subspace.export_lora(model, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
            lora = PeftModel.from_pretrained(llama(), tmp_path)
        assert lora.peft_config["default"].r == 5
        assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "moshards" in key]
        assert torch.allclose(logits(lora), logits(model), atol=1e-5)


def test_a_sum_is_a_lora_in_the_form_of_mos():
    model = adapted()
    model.add_adapter("b", config(seed=4))
    model.base_model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "sum")
    made = model.peft_config["sum"]
    ranks = {2 * m.deltas["default"].spec.rank for m in model.modules() if isinstance(m, MoSLayer)}
    assert {made.r, made.equivalent_r, made.private_r} == {max(ranks)}
    rows = {}
    for layer in model.modules():
        if isinstance(layer, MoSLayer):
            delta = layer.deltas["sum"]
            for side in "AB":
                found = rows.setdefault((delta.spec.group, side), [])
                found += getattr(delta, f"index_{side}").tolist()
    assert all(len(found) == len(set(found)) for found in rows.values())  # no row is shared


# ------------------------------------------------------------------------------------- determinism


def test_indices_depend_on_seed_and_module_alone():
    def indices(model, adapter="default"):
        return {
            name.removeprefix("base_model.model."): (
                layer.deltas[adapter].index_A.tolist(), layer.deltas[adapter].index_B.tolist()
            )
            for name, layer in layers_of(model).items()
        }  # fmt: skip

    torch.manual_seed(1)
    first = indices(adapted(seed=None))
    torch.manual_seed(2)
    assert indices(adapted("other", seed=None), "other") == first
    assert indices(inject_adapter_in_model(config(seed=0), llama())) == first
    assert indices(adapted(seed=1)) != first


def test_pools_follow_the_seed_and_leave_the_global_generator_alone():
    def start(manual_seed, **options):
        torch.manual_seed(manual_seed)
        return [pool.detach().clone() for pool in pools_of(adapted(**options)).values()]

    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert equal(start(1, seed=5), start(2, seed=5))
    assert not equal(start(1, seed=5), start(1, seed=6))
    assert equal(start(1, seed=None), start(1, seed=None))
    assert not equal(start(1, seed=None), start(2, seed=None))
    base, state = llama(), torch.get_rng_state()
    get_peft_model(base, config(seed=None))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_is_deterministic():
    def trained():
        model = adapted(dropout=0.1).train()
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(3):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, [pool.detach() for pool in pools_of(model).values()]

    first, second = trained(), trained()
    assert first[0] == second[0]
    assert first[0][-1] < first[0][0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_gradient_of_a_pool_is_the_sum_over_the_modules_that_use_its_rows():
    model = adapted(equivalent_r=2, r=4, private_r=1, shards_per_vector=2)
    model(IDS, labels=IDS).loss.backward()
    pool_a, _ = pools_under(delta_of(model, "v_proj"))
    expected = torch.zeros_like(pool_a)
    for name, layer in layers_of(copy.deepcopy(model)).items():
        if not name.endswith("v_proj"):
            continue
        # Let one module at a time have a pool of its own.
        lone = copy.deepcopy(model)
        lone.zero_grad()
        delta = lone.get_submodule(name).deltas["default"]
        own = copy.deepcopy(delta.shared_tensors)
        delta.attach({"own": own}, "own")
        lone(IDS, labels=IDS).loss.backward()
        gradient = own.pair("v_proj")[0].grad
        used = set(layer.deltas["default"].index_A.tolist())
        assert {row for row in range(len(gradient)) if gradient[row].any()} <= used
        expected += gradient
    assert expected.any()
    assert torch.allclose(pool_a.grad, expected, rtol=1e-4, atol=1e-7)


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r=0 must be at least 1"),
        ({"r": [4, 4]}, TypeError, "r=.* must be a whole number"),
        ({"equivalent_r": 0}, ValueError, "equivalent_r=0 must be at least 1"),
        ({"equivalent_r": 2.0}, TypeError, "equivalent_r=2.0 must be a whole number"),
        ({"private_r": -1}, ValueError, "private_r=-1 must be at least 0"),
        (
            {"private_r": 5, "equivalent_r": 4},
            ValueError,
            "private_r=5 must be at most equivalent_r=4; lower",
        ),
        (
            {"private_r": 3, "r": 2},
            ValueError,
            "private_r=3 must be at most r=2; lower private_r to 2, or raise r",
        ),
        ({"private_r": 2, "rank_pattern": {"q_proj": 1}}, ValueError, r"at most rank_pattern\['q_proj'\]=1"),
        ({"shards_per_vector": 0}, ValueError, "shards_per_vector=0 must be at least 1"),
        ({"subset_selection": 1}, TypeError, "subset_selection=1 must be True or False"),
        ({"pair_dissociation": None}, TypeError, "pair_dissociation=None must be True or False"),
        ({"group_pattern": ["q_proj"]}, TypeError, "group_pattern=.* must map module names"),
        (
            {"group_pattern": {"q_proj": "a.b"}},
            ValueError,
            r"group_pattern\['q_proj'\]='a.b' must be made of",
        ),
        ({"bias": "lora_only"}, ValueError, "moshards_only"),
        ({"init_weights": "orthogonal"}, ValueError, "init_weights='orthogonal' must be one of"),
    ],
)
def test_values_that_fit_no_model_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards_per_vector": 3}, r"shards_per_vector=3 must divide .* 16 .*layers\.0\.self_attn\.q_proj'"),
        ({"shards_per_vector": 3}, "; try 1, 2, 4, 8, 16, or None"),
        ({"rank_pattern": {"q_proj": 13}}, "r=13 must be at most the 12 .*equivalent_r=4 .*q_proj.* 3 mod"),
        ({"rank_pattern": {"q_proj": 9}, "private_r": 2}, "r=9 must be at most the 8 vectors .*private_r=2"),
        ({"rank_pattern": {"up_proj": 40}}, r"r=40 must be at most .*layers\.0\.mlp\.up_proj"),
        ({"r": 5, "subset_selection": False, "private_r": 0}, "r=5 must be all of the 12 vectors"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_this_model_are_refused_before_it_changes(options, message):
    base = llama()
    before = {*base.state_dict()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**options))
    assert {*base.state_dict()} == before
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("bad", config(**options))
    assert set(model.peft_config) == {"default"}
    assert not pools_of(model, "bad")
    assert torch.equal(logits(model), expected)


def test_state_dict_that_names_other_modules_than_the_config_is_refused():
    state = get_peft_model_state_dict(inject_adapter_in_model(config(), llama()))
    with pytest.raises(ValueError, match="q_proj is in the state dict but not among target_modules"):
        inject_adapter_in_model(config(target_modules=["up_proj"]), llama(), state_dict=state)


class Plain(nn.Module):
    """A linear map that is no layer of torch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("parameters", [["0.weight"], ["2.weight"], ["1.weight", "2.weight"]])
@pytest.mark.parametrize("modules", [[], ["3"]])
def test_parameters_are_injected_into_a_model_that_holds_the_pools_itself(modules, parameters):
    options = {"target_modules": modules, "target_parameters": parameters, "init_weights": False, "seed": 0}
    torch.manual_seed(0)
    base = nn.Sequential(Plain(), Plain(), Plain(), nn.Conv1d(3, 3, 1))
    expected = get_peft_model(copy.deepcopy(base), MoSConfig(**options))
    found = inject_adapter_in_model(MoSConfig(**options), base)
    x = torch.randn(2, 3, 8)
    assert torch.allclose(found(x), expected(x), atol=1e-6)
    assert get_peft_model_state_dict(found).keys() == {
        key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(expected)
    }
