"""What trains is handed over, and nothing else: to adapters of any name, whole, or not at all."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

import models
import peft_subspace
from methods import METHODS
from peft_subspace import (
    ContinualSVDConfig,
    EffortConfig,
    LoRASBConfig,
    frozen_digest,
    load_trainable_state_dict,
    trainable_state_dict,
)
from processes import run_in_two_processes, sharded
from test_distributed import Network, adapted

IDS = torch.arange(3, 15).reshape(2, 6)
TARGETS = ["query", "dense"]


def classifier(config, name="default", seed=0):
    """Adapter and head, moved away from where they start."""
    model = get_peft_model(models.bert(), config, name).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def heads(config_cls=LoRASBConfig, **options):
    return config_cls(
        **{"r": 4, "target_modules": TARGETS, "modules_to_save": ["classifier"], "seed": 0, **options}
    )


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def numbers(state):
    return sum(tensor.numel() for tensor in state.values())


def updates(model):
    return [m.get_delta_weight("default") for m in model.modules() if hasattr(m, "get_delta_weight")]


# ---------------------------------------------------------------------------------------- what is taken


def test_state_is_all_that_trains_whatever_the_name(method):
    one, two = (
        get_peft_model(Network(), method.config(target_modules=["blocks.0", "blocks.1"], seed=0), name)
        for name in ("blocks", "other")  # one is a part of the modules' paths
    )
    for number, parameter in enumerate(trained(one)):
        parameter.data.normal_(generator=torch.Generator().manual_seed(number), std=0.1)
    state = trainable_state_dict(one, "blocks")
    assert numbers(state) == sum(parameter.numel() for parameter in trained(one))
    assert state.keys() == trainable_state_dict(two, "other").keys()
    load_trainable_state_dict(two, state, "other")
    for mine, theirs in zip(trained(one), trained(two), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def test_of_lora_sb_the_matrix_alone_is_taken_with_the_head():
    state = trainable_state_dict(classifier(heads()))
    assert {name.rpartition(".")[2] for name in state} == {"R", "weight", "bias"}
    assert state["bert.encoder.layer.0.attention.self.query.lorasb_delta.R"].shape == (4, 4)
    assert state["classifier.modules_to_save.weight"].shape == (3, 16)
    assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize(
    "config",
    [
        heads(bias="all", trainable_token_indices=[3, 5]),
        heads(heads={"classifier": {"kind": "grassmann", "classes": 3, "r": 2}}),
        LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["classifier"], use_dora=True),
        LoraConfig(r=4, target_modules=["word_embeddings", "query"], bias="lora_only"),
    ],
    ids=["biases and tokens", "a head of this package", "DoRA", "LoRA of an embedding"],
)
def test_all_kinds_of_what_trains_reach_another_model(config):
    one, two = classifier(copy.deepcopy(config), "one", 1), classifier(copy.deepcopy(config), "two", 2)
    assert not torch.allclose(logits(one), logits(two), atol=1e-4)
    load_trainable_state_dict(two, trainable_state_dict(one, "one"), "two")
    assert torch.equal(logits(one), logits(two))


def test_other_adapters_are_left_out():
    model = classifier(heads())
    alone = trainable_state_dict(model).keys()
    model.add_adapter("other", heads(r=2, modules_to_save=None))
    model.base_model.set_adapter(["default", "other"])
    assert trainable_state_dict(model).keys() == alone
    assert {tensor.shape for tensor in trainable_state_dict(model, "other").values()} == {(2, 2)}


def test_injected_compiled_replicated_and_plain_models():
    wanted = trainable_state_dict(classifier(heads(modules_to_save=None)))
    injected = inject_adapter_in_model(heads(modules_to_save=None), models.bert(), "one")
    assert trainable_state_dict(injected, "one").keys() == wanted.keys()
    compiled = torch.compile(classifier(heads(modules_to_save=None)))
    assert trainable_state_dict(compiled).keys() == wanted.keys()
    part = classifier(heads(modules_to_save=None))
    layer = part.base_model.model.bert.encoder.layer
    layer[0] = torch.compile(layer[0])
    assert trainable_state_dict(part).keys() == wanted.keys()
    plain = models.bert().requires_grad_(False)
    plain.classifier.requires_grad_()
    assert set(trainable_state_dict(plain)) == {"classifier.weight", "classifier.bias"}


def test_states_are_copies_and_optimizers_go_on():
    model = classifier(heads())
    state, parameters = trainable_state_dict(model), trained(model)
    first = next(iter(state.values()))
    first.zero_()
    assert parameters[0].any()
    load_trainable_state_dict(model, state)
    assert not parameters[0].any()
    assert all(mine is old for mine, old in zip(trained(model), parameters, strict=True))


# -------------------------------------------------------------------------------------- what is refused


def pop(state):
    state.pop(min(state))


def add(state):
    state["classifier.modules_to_save.scale"] = torch.ones(3)


def replace(value):
    def change(state):
        state["classifier.modules_to_save.weight"] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (pop, ValueError, r"state lacks 'bert\.encoder\.layer\.0\..*R', and \d+ tensors train"),
        (add, ValueError, r"state has 'classifier\.modules_to_save\.scale', and \d+ tensors train"),
        (replace(torch.ones(3, 15)), ValueError, r"weight'\] has shape \(3, 15\), and \(3, 16\) trains"),
        (replace(torch.full((3, 16), torch.nan)), ValueError, r"weight'\] has NaN or infinite values"),
        (replace(torch.ones(3, 16).long()), TypeError, r"weight'\] must be .* numbers, not torch\.int64"),
        (replace([1.0]), TypeError, r"weight'\] must be .* numbers, not list"),
    ],
)
def test_states_that_do_not_fit_change_nothing(change, error, message):
    model = classifier(heads())
    before = trainable_state_dict(model)
    state = {name: tensor + 1 for name, tensor in before.items()}
    change(state)
    with pytest.raises(error, match=message):
        load_trainable_state_dict(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable_state_dict(model).items())


def test_adapters_that_do_not_train_are_named():
    model = classifier(heads())
    with pytest.raises(ValueError, match=r"'other' is none of \['default'\], the adapters"):
        trainable_state_dict(model, "other")
    with pytest.raises(ValueError, match="'other' is no adapter of peft_subspace"):
        frozen_digest(model, "other")
    state = trainable_state_dict(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged; call unmerge_adapter\(\) first"):
        load_trainable_state_dict(model, state)
    model.unmerge_adapter()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing of .*'default' trains; activate it"):
        trainable_state_dict(model)
    with torch.device("meta"):
        plain, base = models.bert(), models.bert()
    with pytest.raises(ValueError, match="weight has no values yet; load the base model's weights first"):
        trainable_state_dict(plain)
    model = get_peft_model(base, heads(EffortConfig, modules_to_save=None))
    for call in (trainable_state_dict, frozen_digest):
        with pytest.raises(RuntimeError, match="starts from the base weight, which is on the meta device"):
            call(model)


# ------------------------------------------------------------------------------------- clients and a server


def mean(states, weights):
    return {
        name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) for name in states[0]
    }


@pytest.mark.parametrize(
    "config",
    [heads(init_weights="svd"), heads(ContinualSVDConfig, r=None)],
    ids=["LoRA-SB", "Continual SVD"],
)
def test_the_average_of_states_is_that_of_updates(config, tmp_path):
    clients = [classifier(copy.deepcopy(config), seed=seed) for seed in range(3)]
    weights, server = (0.5, 0.3, 0.2), classifier(copy.deepcopy(config), seed=9)
    assert len({frozen_digest(model) for model in (*clients, server)}) == 1
    load_trainable_state_dict(server, mean([trainable_state_dict(model) for model in clients], weights))
    for found, *parts in zip(updates(server), *map(updates, clients), strict=True):
        torch.testing.assert_close(found, sum(w * part for w, part in zip(weights, parts, strict=True)))
    heads_of = [model.base_model.model.classifier.modules_to_save["default"].weight for model in clients]
    wanted = sum(w * head for w, head in zip(weights, heads_of, strict=True))
    torch.testing.assert_close(server.base_model.model.classifier.modules_to_save["default"].weight, wanted)


def test_clients_and_server_share_their_bases_in_files(tmp_path):
    clients = [classifier(heads(init_weights="svd"), seed=seed) for seed in range(2)]
    server = classifier(heads(init_weights="svd"), seed=9)
    load_trainable_state_dict(server, mean([trainable_state_dict(model) for model in clients], (0.5, 0.5)))
    for number, model in enumerate((server, *clients)):
        (bases,) = peft_subspace.save_with_shared_bases(model, tmp_path / f"{number}")
        again = peft_subspace.load(models.bert(), tmp_path / f"{number}").eval()
        assert torch.equal(logits(again), logits(model))
        assert bases.parent == tmp_path
    assert len(list(tmp_path.glob("frozen-*.safetensors"))) == 1
    assert "A" not in {key.rpartition(".")[2] for key in load_file(tmp_path / "0/adapter_model.safetensors")}


def test_digests_tell_other_bases_and_nothing_else():
    wanted = frozen_digest(classifier(heads(init_weights="svd"), seed=1))
    assert frozen_digest(classifier(heads(init_weights="svd"), "one", seed=2), "one") == wanted
    assert frozen_digest(torch.compile(classifier(heads(init_weights="svd")))) == wanted
    assert frozen_digest(classifier(heads(init_weights=False))) != wanted
    drawn = [frozen_digest(classifier(heads(init_weights=False, seed=seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    protected = heads(ContinualSVDConfig, preserve=0.5), heads(ContinualSVDConfig, preserve=0.25)
    assert len({frozen_digest(classifier(config)) for config in protected}) == 2


def exchange(rank, folder):
    for method in METHODS:
        model = sharded(adapted(method))
        state = trainable_state_dict(model)
        assert not any(hasattr(tensor, "device_mesh") for tensor in state.values())
        load_trainable_state_dict(model, {name: tensor + 1 for name, tensor in state.items()})
        torch.save([state, trainable_state_dict(model)], folder / f"{method}-{rank}.pt")


def test_shards_are_gathered_and_written(tmp_path):
    run_in_two_processes(exchange, tmp_path)
    for method in METHODS:
        wanted = trainable_state_dict(adapted(method))
        for rank in range(2):
            before, after = torch.load(tmp_path / f"{method}-{rank}.pt")
            assert before.keys() == after.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(before[name], tensor)
                assert torch.equal(after[name], tensor + 1)


def test_what_fsdp1_has_flattened_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoRASBConfig(r=2, target_modules=["0"]))
    for parameter in trained(model):
        parameter._fsdp_flattened = True
    with pytest.raises(RuntimeError, match=r"FSDP1 .* so handing over what trains must come before"):
        trainable_state_dict(model)
