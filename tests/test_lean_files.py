"""Files with what it takes to run an adapter, and those beside them: shared bases, what training needs."""

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import peft_subspace
from layers import distance
from models import llama
from peft_subspace import ContinualSVDConfig, EffortConfig, FLoRAConfig, LoRASBConfig
from peft_subspace.core import projection
from peft_subspace.tuner.frozen_file import file_name
from peft_subspace.tuner.layer import SubspaceLayer
from test_resume import Rows, losses, trained

CONSTRAINTS = ["both", "core", "input", "output"]
LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]
WEIGHTS, CONFIG, TRAINING = "adapter_model.safetensors", "adapter_config.json", "adapter_training.safetensors"
IDS = torch.arange(3, 18).reshape(3, 5)
loaders = pytest.mark.parametrize(
    "load", [PeftModel.from_pretrained, peft_subspace.load], ids=["peft", "own"]
)

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def adapted(base=None, **options):
    options = {"r": 4, "target_modules": LINEARS, "init_weights": False, **options}
    return get_peft_model(base or llama(), ContinualSVDConfig(**options)).eval()


def sharing(names=("one", "two", "three"), config_cls=LoRASBConfig, **options):
    """Adapters of one start."""
    options = {"r": 4, "target_modules": LINEARS, **options}
    torch.manual_seed(0)
    model = get_peft_model(llama(), config_cls(**options), names[0])
    for name in names[1:]:
        model.add_adapter(name, config_cls(**options))
    with torch.no_grad():
        for parameter in parameters(model):
            parameter += torch.randn(parameter.shape)
    return model.eval()


def parameters(model):
    return [p for layer in layers(model) for delta in layer.deltas.values() for p in delta.parameters()]


def layers(model):
    return [module for module in model.modules() if isinstance(module, SubspaceLayer)]


def deltas(model, name="default"):
    return [layer.deltas[name] for layer in layers(model)]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def held_bytes(model):
    """Bytes of all tensors that an adapter adds to its model."""
    return sum(
        t.numel() * t.element_size()
        for name, t in [*model.named_parameters(), *model.named_buffers()]
        if "_delta." in name or ".lora_" in name
    )


def count_decompositions(monkeypatch):
    calls = []
    plain = projection.singular_bases
    module = "peft_subspace.methods.continual_svd.delta.singular_bases"
    monkeypatch.setattr(module, lambda *args: calls.append(args) or plain(*args))
    return calls


def run(folder, **options):
    torch.manual_seed(0)
    config = ContinualSVDConfig(r=2, target_modules=["q_proj", "down_proj"], seed=0, dropout=0.1, **options)
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=5, learning_rate=1e-2,
        per_device_train_batch_size=4, save_steps=2, logging_steps=1, seed=5,
    )  # fmt: skip
    return Trainer(get_peft_model(llama(), config), arguments, train_dataset=Rows())


# ------------------------------------------------------------------------------------- files of LoRA's size


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_file_and_memory_are_those_of_a_lora(constraint, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512}
    r = 8 if constraint == "core" else 16  # its update has twice the rank
    adapted(llama(**wide), r=r, constraint=constraint).save_pretrained(tmp_path / "own")
    lora = get_peft_model(llama(**wide), LoraConfig(r=16, target_modules=LINEARS))
    lora.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(llama(**wide), tmp_path / "own")
    sizes = [(tmp_path / folder / WEIGHTS).stat().st_size for folder in ("own", "lora")]
    assert 0.95 < sizes[0] / sizes[1] < 1.05
    assert 0.95 < held_bytes(again) / held_bytes(lora) < 1.05


def test_plain_folder_has_nothing_for_training_in_it_or_beside_it(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {WEIGHTS, CONFIG, "README.md"}


@loaders
def test_training_an_adapter_that_was_loaded_to_be_run_is_refused(load, tmp_path):
    adapted().save_pretrained(tmp_path)
    model = load(llama(), tmp_path)
    model.set_adapter("default")
    logits(model)
    model.train()
    message = r"'default' was loaded, or closed, to be run only.*is_trainable=True.*set_requires_grad"
    with pytest.raises(RuntimeError, match=message):
        model(input_ids=IDS)
    model.set_requires_grad("default", False)
    model(input_ids=IDS)


@loaders
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_further_training_decomposes_again_and_says_so(constraint, load, tmp_path, monkeypatch, caplog):
    model = adapted(constraint=constraint)
    model.save_pretrained(tmp_path)
    calls = count_decompositions(monkeypatch)
    with caplog.at_level(logging.WARNING, "peft_subspace"):
        again = load(llama(), tmp_path, is_trainable=True)
    assert len(calls) == len(layers(again)) == 12
    assert (
        "'default' comes without what only training needs; computing it from 12 base weights" in caplog.text
    )
    for delta, wanted in zip(deltas(again), deltas(model), strict=True):
        assert all(distance(*pair) < 1e-6 for pair in zip(delta.factors(), wanted.factors(), strict=True))
        assert all(torch.equal(getattr(delta, name), getattr(wanted, name)) for name in delta.training_only)
    assert [n for n, p in again.named_parameters() if p.requires_grad]


def test_transformers_trains_on_as_well(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(str(tmp_path), is_trainable=True)
    for delta, wanted in zip(deltas(again), deltas(model), strict=True):
        assert all(torch.equal(getattr(delta, name), getattr(wanted, name)) for name in delta.training_only)
    assert distance(logits(again), logits(model)) < 1e-5


def test_adapter_of_other_directions_is_not_trained_on(tmp_path):
    """As that of a task without the tasks below it: the base weight is the same."""
    model = adapted()
    for delta in deltas(model):
        for name in delta.training_only:
            torch.nn.init.orthogonal_(getattr(delta, name))
    model.save_pretrained(tmp_path)
    base = llama()
    with pytest.raises(ValueError, match=r"q_proj: . is another one .* other directions here.* tasks below"):
        PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert not layers(base)


def test_base_is_checked_before_it_is_decomposed(tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    calls = count_decompositions(monkeypatch)
    for load in (PeftModel.from_pretrained, peft_subspace.load):
        with pytest.raises(ValueError, match=r"q_proj: the base weight is not the one"):
            load(other, tmp_path, is_trainable=True)
        assert not layers(other)
    assert not calls


def test_file_of_version_1_on_a_lean_adapter_is_projected(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "lean")
    model.peft_config["default"].format_version = 1
    model.save_pretrained(tmp_path / "whole")
    assert any(key.endswith(".U") for key in load_file(tmp_path / "whole" / WEIGHTS))
    lean = PeftModel.from_pretrained(llama(), tmp_path / "lean")
    for parameter in parameters(lean):
        parameter.data.zero_()
    lean.load_adapter(str(tmp_path / "whole"), "default")
    assert distance(logits(lean), logits(model)) < 1e-5


def test_lean_adapters_add_up(tmp_path):
    for seed, name in enumerate(("one", "two")):
        adapted(seed=seed).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(llama(), tmp_path / "one", "one")
    model.load_adapter(str(tmp_path / "two"), "two")
    model.add_weighted_adapter(["one", "two"], [2.0, -0.5], "sum")
    for layer in layers(model):
        parts = [layer.get_delta_weight(name) for name in ("one", "two", "sum")]
        assert distance(parts[2], 2 * parts[0] - 0.5 * parts[1]) < 1e-6
    model.save_pretrained(tmp_path / "all")
    again = peft_subspace.load(llama(), tmp_path / "all" / "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(again), logits(model))


# ------------------------------------------------------------------------ what training needs, of checkpoints


def test_checkpoints_share_one_file_and_resume_to_the_bit(tmp_path, monkeypatch):
    whole = run(tmp_path)
    whole.train()
    (frozen,) = (tmp_path / "_training").iterdir()
    assert {path.name for path in tmp_path.iterdir()} == {
        "_training",
        *(f"checkpoint-{i}" for i in (2, 4, 5)),
    }
    assert frozen.stat().st_size > 4 * (tmp_path / "checkpoint-2" / WEIGHTS).stat().st_size / 3
    assert (tmp_path / "checkpoint-2" / TRAINING).is_file()
    resumed = run(tmp_path)
    with torch.no_grad():  # as another machine would have it
        for delta in deltas(resumed.model):
            for name in delta.training_only:
                getattr(delta, name).add_(1e-6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    wanted, found = trained(whole), trained(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    calls = count_decompositions(monkeypatch)
    again = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-5", is_trainable=True)
    state = dict(again.named_parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    assert not calls


def test_checkpoint_alone_resumes_in_the_same_subspace(tmp_path):
    run(tmp_path).train()
    shutil.rmtree(tmp_path / "_training")
    (tmp_path / "checkpoint-2" / TRAINING).unlink()
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    leak = peft_subspace.continual.subspace_leak(resumed.model, from_weight=True)
    assert leak["max"] < 1e-5


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def of_another_base(path):
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)


def of_another_model(path):
    save_file({key: tensor[:1].clone() for key, tensor in load_file(path).items()}, path)


DAMAGE = [
    (truncated, ValueError, "not a complete safetensors file"),
    (of_another_base, ValueError, "does not hold the tensors that its name stands for"),
    (of_another_model, ValueError, r"does not fit: .* has shape"),
]


@loaders
@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE)
def test_damaged_file_for_training_is_refused_before_anything_changes(
    damage, error, message, load, tmp_path, monkeypatch
):
    run(tmp_path).train()
    damage(next((tmp_path / "_training").iterdir()))
    base, calls = llama(), count_decompositions(monkeypatch)
    with pytest.raises(error, match=message):
        load(base, tmp_path / "checkpoint-5", is_trainable=True)
    assert not layers(base)
    assert not calls
    load(base, tmp_path / "checkpoint-5")  # which needs no such file


def test_training_tensors_of_another_adapter_are_refused(tmp_path):
    run(tmp_path).train()
    shutil.copy(tmp_path / "checkpoint-2" / TRAINING, tmp_path / "checkpoint-5" / TRAINING)
    base = llama()
    with pytest.raises(ValueError, match=r"or adapter_training\.safetensors is of another adapter"):
        PeftModel.from_pretrained(base, tmp_path / "checkpoint-5", is_trainable=True)
    assert not layers(base)


# --------------------------------------------------------------------------------------------- shared bases


@loaders
@pytest.mark.parametrize(
    ("config_cls", "options"),
    [(LoRASBConfig, {"init_weights": "svd"}), (EffortConfig, {"r": 2}), (ContinualSVDConfig, {"r": None})],
    ids=["lora_sb", "effort", "continual_svd"],
)
def test_adapters_of_one_start_have_their_bases_once(config_cls, options, load, tmp_path):
    model = sharing(config_cls=config_cls, **options)
    (bases,) = peft_subspace.save_with_shared_bases(model, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [bases.name]
    for name in ("one", "two", "three"):
        again = load(llama(), tmp_path / name)
        model.set_adapter(name)
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "alone" / name)
    shutil.rmtree(tmp_path / "one")
    bases.unlink()
    assert torch.equal(logits(load(llama(), tmp_path / "alone" / "three")), logits(model))


def test_file_of_an_adapter_has_the_trained_matrix_alone(tmp_path):
    model = sharing(init_weights="svd")
    (bases,) = peft_subspace.save_with_shared_bases(model, tmp_path)
    state = load_file(tmp_path / "two" / WEIGHTS)
    assert {key.rpartition(".")[2] for key in state} == {"R"}
    assert sum(tensor.numel() for tensor in state.values()) == len(layers(model)) * 4 * 4
    assert {key.rpartition(".")[2] for key in load_file(bases)} == {"A", "B"}


def test_clients_save_beside_one_another(tmp_path):
    for client in range(2):
        model = sharing(["default"], init_weights="svd", seed=client)
        peft_subspace.save_with_shared_bases(model, tmp_path / f"{client}")
    assert len(list(tmp_path.glob("frozen-*"))) == 1
    assert torch.equal(logits(peft_subspace.load(llama(), tmp_path / "1")), logits(model))


def test_transformers_loads_and_trains_with_shared_bases(tmp_path):
    model = sharing(init_weights="svd")
    peft_subspace.save_with_shared_bases(model, tmp_path)
    again = llama()
    again.load_adapter(str(tmp_path / "three"), is_trainable=True)
    model.set_adapter("three")
    assert torch.equal(logits(again), logits(model))


def test_adapter_is_loaded_onto_the_meta_device_first(tmp_path):
    model = sharing(init_weights="svd")
    peft_subspace.save_with_shared_bases(model, tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "three", low_cpu_mem_usage=True)
    model.set_adapter("three")
    assert torch.equal(logits(again), logits(model))


def test_shared_bases_replace_those_of_an_adapter_that_is_there(tmp_path):
    """As a Trainer loads the best checkpoint."""
    model = sharing(["default"], init_weights="svd")
    wanted = logits(model)
    peft_subspace.save_with_shared_bases(model, tmp_path / "best")
    for delta in deltas(model):
        for tensor in delta.state_dict().values():
            tensor.zero_()
    model.load_adapter(str(tmp_path / "best"), "default")
    assert torch.equal(logits(model), wanted)


@loaders
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        *DAMAGE,
        (lambda path: path.unlink(), FileNotFoundError, "neither there nor in the two folders above; copy"),
    ],
)
def test_damaged_bases_are_refused_before_anything_changes(damage, error, message, load, tmp_path):
    (bases,) = peft_subspace.save_with_shared_bases(sharing(init_weights="svd"), tmp_path)
    damage(bases)
    base = llama()
    with pytest.raises(error, match=message):
        load(base, tmp_path / "two")
    assert not layers(base)
    assert not hasattr(base, "peft_config")


@loaders
@pytest.mark.parametrize("value", ["../../x", "0" * 31, 5])
def test_name_of_a_file_elsewhere_is_refused(value, load, tmp_path):
    peft_subspace.save_with_shared_bases(sharing(init_weights="svd"), tmp_path)
    path = tmp_path / "two" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frozen_file": value}))
    with pytest.raises(ValueError, match=r"frozen_file=.* must be a hash"):
        load(llama(), tmp_path / "two")


def test_adapters_without_bases_to_share_are_refused(tmp_path):
    model = sharing(config_cls=FLoRAConfig)
    for names, unknown in ((None, "one"), (["x"], "x")):
        with pytest.raises(ValueError, match=rf"adapter '{unknown}' of .* has no frozen tensors"):
            peft_subspace.save_with_shared_bases(model, tmp_path, names)
    assert not list(tmp_path.iterdir())


def test_file_of_another_name_is_none(tmp_path):
    """The hash is that of the content, so a renamed file of other adapters is noticed."""
    (bases,) = peft_subspace.save_with_shared_bases(sharing(init_weights="svd"), tmp_path / "1")
    (other,) = peft_subspace.save_with_shared_bases(
        sharing(init_weights=False, seed=1), tmp_path / "2", ["two"]
    )
    assert other.name != bases.name
    shutil.copy(other, bases)
    with pytest.raises(ValueError, match="another base model"):
        peft_subspace.load(llama(), tmp_path / "1" / "two")
    assert bases.name == file_name(bases.stem.removeprefix("frozen-"))
