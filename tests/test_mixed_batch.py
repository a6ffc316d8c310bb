"""Batches with one adapter per sample: stacked adapters, what is kept of them, and threads."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from layers import BF16, CASES, FP32, Net, adapt, add, dense, distance, outputs, trainables, tuner_layer
from methods import METHODS
from models import llama, t5
from peft_subspace import FLoRAConfig
from peft_subspace.layers import costs
from peft_subspace.tuner import kept
from peft_subspace.tuner.layer import SubspaceLayer

BY_NAME = {method.name: method for method in METHODS}
WIDE = next(case for case in CASES if case.name == "linear-wide")
NAMES = ["three", "default", "__base__", "three", "two", "four", "default", "__base__", "three", "two"]
ROOMS = {"stacked": 1e9, "apart": 0.0, "some": 1.2}


@pytest.fixture(params=ROOMS)
def room(request, monkeypatch):
    monkeypatch.setattr(kept, "GROWTH", ROOMS[request.param])
    return request.param


@pytest.fixture
def much_room(monkeypatch):
    monkeypatch.setattr(kept, "GROWTH", 1e9)


def ranks(method, rank):
    """Options that ask for a rank, where the method has one."""
    if method.pooled:
        return {"r": rank, "equivalent_r": rank}
    return {"r": rank} if "r" in method.options else {}


def four_adapters(method, case, setting=FP32):
    """Adapters of different ranks on one layer, in an order that is not that of `NAMES`."""
    model = adapt(method, case, setting, **ranks(method, 2))
    for seed, (name, rank) in enumerate({"two": 1, "three": 3, "four": 2}.items(), start=4):
        add(model, method, name, setting, seed=seed, **ranks(method, rank))
    return model.eval()


def assert_rows_are_right(model, method, case, setting=FP32, names=NAMES):
    x = case.inputs(setting.dtype, batch=len(names))
    with torch.no_grad():
        result = model(x, adapter_names=names)
    assert result.dtype == setting.dtype
    for row, name in enumerate(names):
        expected = dense(model, method, x[[row]], () if name == "__base__" else (name,))
        assert distance(result[[row]], expected) < setting.tolerance, (row, name)


def places(model):
    return tuner_layer(model).kept.places


@pytest.mark.typical("layers")
@pytest.mark.feature("one adapter per sample of a batch")
def test_rows_get_their_adapters_of_any_rank_stacked_or_not(method, case, room):
    model = four_adapters(method, case)
    for names in (NAMES, NAMES, ["two"] * 3, list(reversed(NAMES))):  # anew, from what is kept, and others
        assert_rows_are_right(model, method, case, names=names)
    if room == "apart":
        assert not places(model)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name.startswith(("conv2d", "embedding", "Conv1D"))], ids=str
)
@pytest.mark.parametrize("name", ["flora", "mos"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
def test_layers_of_all_kinds_take_stacks(name, case, much_room):
    model = four_adapters(BY_NAME[name], case)
    assert_rows_are_right(model, BY_NAME[name], case)
    thin = case.kind == "conv" or "wide" in case.name
    assert not thin or bool(places(model)) == (
        case.has_plain_forward or type(tuner_layer(model).base_layer) is nn.Conv2d
    )


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.ConvTranspose1d(4, 6, 3),
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        lambda: nn.ConvTranspose3d(4, 6, 2, dilation=2),
    ],
)
@pytest.mark.parametrize("name", ["flora", "lora_sb"])
def test_transposed_convolutions_are_stacked(name, layer, much_room):
    method = BY_NAME[name]
    torch.manual_seed(1)
    model = get_peft_model(Net(layer()), method.config(init_weights=False, seed=3))
    add(model, method, "two", r=1)
    model.eval()
    x = torch.randn(4, 4, *[5] * (tuner_layer(model).base_layer.weight.ndim - 2))
    names = ["two", "default", "__base__", "two"]
    with torch.no_grad():
        result = model(x, adapter_names=names)
        assert set(places(model)) == {"two", "default"}
        for row, name in enumerate(names):
            if name == "__base__":
                expected = tuner_layer(model).base_layer(x[[row]])
            else:
                model.set_adapter(name)
                expected = model(x[[row]])
            assert distance(result[[row]], expected) < 1e-5


@pytest.mark.where(method="has_alpha")
def test_adapters_in_half_precision(method, room):
    case = next(case for case in CASES if case.name == "linear-wide")
    assert_rows_are_right(four_adapters(method, case, BF16), method, case, BF16)


def test_adapters_that_are_picked_from_a_stack_as_on_a_gpu(method, much_room, monkeypatch):
    monkeypatch.setattr("peft_subspace.tuner.mixed_forward.picks_adapters", lambda device: True)
    assert costs.picks_adapters("cuda")
    assert not costs.picks_adapters("cpu")
    model = four_adapters(method, WIDE)
    assert_rows_are_right(model, method, WIDE)  # fills the stack
    assert_rows_are_right(
        model, method, WIDE, names=["four", "default", "two", "four", "__base__", "two", "default"]
    )


def test_autocast_casts_what_is_stacked(room):
    method = BY_NAME["lora_sb"]
    model, x = four_adapters(method, WIDE), WIDE.inputs(batch=len(NAMES))
    with torch.no_grad():
        exact = model(x, adapter_names=NAMES)
        tuner_layer(model).kept = kept.Kept()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(x, adapter_names=NAMES)
        assert 0 < distance(cast.float(), exact) < 2e-2
        assert torch.equal(model(x, adapter_names=NAMES), exact)  # what was kept under autocast is whole


# --------------------------------------------------------------------------- what is kept, and for how long


def stays(model, method, case=WIDE):
    """Whether a batch finds everything that it needs kept."""
    before = tuner_layer(model).kept
    assert_rows_are_right(model, method, case)
    return tuner_layer(model).kept is before


def trained(model):
    """The module that has the parameters of an adapter: its update, or its pools."""
    modules = [m for name, m in model.named_modules() if name.endswith(".three")]
    return next(module for module in modules if list(module.parameters(recurse=False)))


def retrain(model):
    optimizer = torch.optim.SGD(trained(model).parameters(), lr=0.1)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def add_in_place(model):
    with torch.no_grad():
        for tensor in trained(model).parameters():
            tensor.add_(0.1)


def swap_data(model):
    for parameter in trained(model).parameters():
        parameter.data = parameter.data * 2


def replace_parameters(model):
    delta = trained(model)
    for name, parameter in list(delta.named_parameters(recurse=False)):
        setattr(delta, name, nn.Parameter(parameter.detach() * 2))


def load(model):
    delta = trained(model)
    delta.load_state_dict({name: tensor * 2 for name, tensor in delta.named_parameters()}, strict=False)


def write_data_in_training(model):
    model.train()
    for parameter in trained(model).parameters():
        parameter.data.mul_(2)
    model.eval()


@pytest.mark.parametrize(
    "change", [retrain, add_in_place, swap_data, replace_parameters, load, write_data_in_training]
)
def test_changed_adapters_are_noticed(method, change, room):
    model = four_adapters(method, WIDE)
    assert not stays(model, method)
    assert stays(model, method)
    change(model)
    assert not stays(model, method)
    assert stays(model, method)


def test_changed_scalings_deleted_and_new_adapters_are_noticed(method, room):
    model = four_adapters(method, WIDE)
    stays(model, method)
    model.delete_adapter("three")
    assert not tuner_layer(model).kept.states
    add(model, method, "three", seed=11, **ranks(method, 3))
    model.eval()
    assert not stays(model, method)
    layer, x = tuner_layer(model), WIDE.inputs(batch=2)
    with torch.no_grad():
        base, once = model(x, adapter_names=["__base__", "two"])
        layer.set_scale("two", 3.0)
        _, thrice = model(x[[1, 1]], adapter_names=["__base__", "two"])
        expected = layer.base_layer(x)[1]
    assert base.shape == once.shape
    assert distance(thrice - expected, 3 * (once - expected)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_cast_keeps_nothing(method, dtype, much_room):
    model = four_adapters(method, WIDE)
    stays(model, method)
    model.to(dtype)
    assert not tuner_layer(model).kept.states
    x = WIDE.inputs(batch=len(NAMES)).to(dtype)
    with torch.no_grad():
        result = model(x, adapter_names=NAMES)
        for row, name in enumerate(NAMES):
            if name != "__base__":
                model.set_adapter(name)
                assert distance(result[[row]], model(x[[row]])) < 1e-2


def test_disabled_adapters_take_no_part(method, room):
    model, x = four_adapters(method, WIDE), WIDE.inputs(batch=len(NAMES))
    stays(model, method)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(x, adapter_names=NAMES), tuner_layer(model).base_layer(x))
    assert stays(model, method)


def test_gradients_pass_through_adapters_that_train(method, room):
    model, x = four_adapters(method, WIDE), WIDE.inputs(batch=len(NAMES)).requires_grad_()
    stays(model, method)
    model.set_adapter("three")
    result = model(x, adapter_names=NAMES)
    with torch.no_grad():
        assert distance(result, model(x, adapter_names=NAMES)) < 1e-5
    result.square().sum().backward()
    reached = [p for p in model.parameters() if p.requires_grad]
    assert reached
    assert all(p.grad is not None and p.grad.any() for p in reached)
    stacked, x.grad = x.grad, None
    model.requires_grad_(False)
    model(x, adapter_names=NAMES).square().sum().backward()  # through what is kept
    assert distance(x.grad, stacked) < 1e-5


def test_inference_mode_leaves_nothing_that_gradients_cannot_pass(method, much_room):
    model, x = four_adapters(method, WIDE), WIDE.inputs(batch=len(NAMES)).requires_grad_()
    with torch.inference_mode():
        model(x, adapter_names=NAMES)
    assert not any(tensor.is_inference() for tensor in tuner_layer(model).kept.stacked)
    model.requires_grad_(False)
    model(x, adapter_names=NAMES).sum().backward()
    assert x.grad.any()


def test_copies_and_files_begin_with_nothing_kept(method, much_room):
    model = four_adapters(method, WIDE)
    stays(model, method)
    for other in (
        copy.deepcopy(tuner_layer(model).kept),
        pickle.loads(pickle.dumps(tuner_layer(model).kept)),
    ):
        assert other == kept.Kept()
    again = copy.deepcopy(model)
    assert not tuner_layer(again).kept.states
    assert not stays(again, method)


def many_adapters(name):
    """Adapters of one rank on a layer, of which all but the first are frozen, after a batch for all."""
    method = BY_NAME[name]
    model = get_peft_model(
        Net(nn.Linear(96, 128)), method.config(init_weights=False, **ranks(method, 8)), "a0"
    )
    for i in range(1, 24):
        add(model, method, f"a{i}", seed=i, **ranks(method, 8))
    outputs(model.eval(), torch.randn(24, 96), adapter_names=[f"a{i}" for i in range(24)])
    return model


def own_tensors(layer):
    return {t.data_ptr(): t for t in (*layer.deltas.parameters(), *layer.deltas.buffers())}.values()


def bytes_in_memory(tensors):
    """Bytes of all that tensors lie in, parts that they do not use included."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("name", ["flora", "mos", "lora_sb", "effort", "continual_svd_r"])
def test_what_is_kept_takes_no_more_than_the_bound(name):
    layer = tuner_layer(many_adapters(name))
    own = sum(tensor.nbytes for tensor in own_tensors(layer))
    lora = 24 * {"effort": 16}.get(name, 8) * (96 + 128) * 4
    base = layer.base_layer.weight.nbytes
    assert base + bytes_in_memory([*own_tensors(layer), *layer.kept.stacked]) <= 1.2 * (base + max(own, lora))
    assert len(layer.kept.places) == 24 or name == "effort"


@pytest.mark.parametrize("name", ["flora", "lora_sb", "continual_svd_r"])
def test_frozen_adapters_lie_in_the_stack_and_are_what_they_were(name, tmp_path):
    trained = many_adapters(name)
    trained.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(Net(tuner_layer(trained).base_layer), tmp_path / "a0", "a0")
    for i in range(1, 24):
        model.load_adapter(tmp_path / f"a{i}", f"a{i}")
    outputs(model, torch.randn(24, 96), adapter_names=[f"a{i}" for i in range(24)])
    layer = tuner_layer(model)
    storages = {tensor.untyped_storage().data_ptr() for tensor in layer.kept.stacked}
    inside = [t for t in own_tensors(layer) if t.untyped_storage().data_ptr() in storages]
    assert not any(tensor.requires_grad for tensor in inside)
    assert sum(t.nbytes for t in inside) > 0.5 * sum(t.nbytes for t in own_tensors(layer))
    x = torch.randn(3, 96)
    model.set_adapter("a5")
    expected = outputs(model, x)
    model.save_pretrained(tmp_path, selected_adapters=["a5"])
    base = Net(copy.deepcopy(layer.base_layer))
    assert distance(outputs(PeftModel.from_pretrained(base, tmp_path / "a5"), x), expected) < FP32.tolerance
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in trainables(model).values():
        parameter.data.add_(1.0)  # as an optimizer does, in the stack
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".a5." in name), name


def test_memory_of_deleted_adapters_is_given_back():
    model = many_adapters("flora")
    before = bytes_in_memory([*own_tensors(tuner_layer(model)), *tuner_layer(model).kept.stacked])
    for i in range(4, 24):
        model.delete_adapter(f"a{i}")
    outputs(model, torch.randn(2, 96), adapter_names=["a1", "a2"])
    layer = tuner_layer(model)
    assert bytes_in_memory([*own_tensors(layer), *layer.kept.stacked]) < 0.3 * before


# ------------------------------------------------------------------------------------------- threads


def test_threads_with_different_names_get_their_own_outputs(method, much_room):
    model = get_peft_model(
        llama(),
        method.config(target_modules=["q_proj", "up_proj"], init_weights=False, modules_to_save=["lm_head"]),
    )
    options = {"target_modules": ["q_proj", "up_proj"], "init_weights": False, "modules_to_save": ["lm_head"]}
    for seed, name in enumerate(["two", "three"]):
        model.add_adapter(name, method.config(seed=seed, **options))
    for name, parameter in model.named_parameters():
        if "lm_head.modules_to_save" in name:
            nn.init.normal_(parameter)
    model.eval()
    ids = torch.arange(3, 15).reshape(2, 6)
    choices = [["default", "two"], ["three", "__base__"], ["two", "three"], None]
    with torch.no_grad():
        expected = [model(ids, adapter_names=c).logits if c else model(ids).logits for c in choices]
    assert distance(expected[0], expected[2]) > 1e-3
    wrong, start = [], threading.Barrier(len(choices))

    def serve(which):
        start.wait()
        with torch.no_grad():
            for _ in range(15):
                names = choices[which]
                logits = model(ids, adapter_names=names).logits if names else model(ids).logits
                if distance(logits, expected[which]) > 1e-5:
                    wrong.append(which)

    threads = [threading.Thread(target=serve, args=(which,)) for which in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_names_do_not_reach_a_model_that_runs_inside_another():
    method = BY_NAME["flora"]
    outer, inner = four_adapters(method, WIDE), four_adapters(method, WIDE)
    x = WIDE.inputs(batch=len(NAMES))
    with torch.no_grad():
        expected, found = inner(x), []
        handle = outer.base_model.model.register_forward_hook(lambda *_: found.append(inner(x)))
        outer(x, adapter_names=NAMES)
        handle.remove()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("inside", [False, True])
def test_what_was_compiled_without_names_is_not_used_with_them(inside):
    method = BY_NAME["flora"]
    model, x = four_adapters(method, WIDE), WIDE.inputs(batch=len(NAMES))
    with torch.no_grad():
        plain, mixed = model(x), model(x, adapter_names=NAMES)
        compiled = model
        if inside:
            model.base_model.model = torch.compile(model.base_model.model, backend="eager")
        else:
            compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            assert distance(compiled(x), plain) < 1e-5
            assert distance(compiled(x, adapter_names=NAMES), mixed) < 1e-5


# ------------------------------------------------------------------------------------------- rows


def test_generate_repeats_the_names_for_every_sequence_that_it_returns():
    method = BY_NAME["flora"]
    model = get_peft_model(llama(), method.config(target_modules=["q_proj", "v_proj"], init_weights=False))
    model.add_adapter("two", method.config(target_modules=["q_proj", "v_proj"], init_weights=False, seed=4))
    ids = torch.arange(3, 9).reshape(2, 3)
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    ids_of = model.eval().generate(input_ids=ids, adapter_names=["two", "default"], **options)
    for row, name in ((0, "two"), (3, "default")):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids[[row // 3]], max_new_tokens=4, do_sample=False)
        assert torch.equal(ids_of[row : row + 3], alone.expand(3, -1))


def test_a_model_that_makes_several_rows_of_a_prompt_is_refused_with_the_number_of_prompts():
    class Windows(Net):
        def forward(self, x):
            return self.layer(x.reshape(-1, x.shape[-1]))

    method = BY_NAME["flora"]
    model = get_peft_model(Windows(nn.Linear(32, 48)), method.config(init_weights=False)).eval()
    with pytest.raises(ValueError, match=r"2 entries for a batch of 12; .* 6 rows of each of 2 prompts"):
        model(torch.randn(2, 6, 32), adapter_names=["default"] * 2)
    assert outputs(model, torch.randn(2, 6, 32)).shape == (12, 48)


def test_encoders_see_each_prompt_once_while_beams_are_searched():
    method = BY_NAME["flora"]
    model = get_peft_model(t5(), method.config(target_modules=["q", "wi"], init_weights=False))
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLayer):
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.append((name, len(args[0]))))
    model.eval().generate(
        input_ids=torch.arange(3, 9).reshape(2, 3),
        adapter_names=["default"] * 2,
        num_beams=3,
        max_new_tokens=2,
    )
    assert {rows for name, rows in seen if "encoder" in name} == {2}
    assert {rows for name, rows in seen if "decoder" in name} == {6}


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(12, 10), Conv1D(10, 12), nn.Embedding(30, 10), nn.Conv2d(4, 6, 3)],
    ids=["linear", "conv1d", "embedding", "conv"],
)
def test_a_layer_that_is_called_by_itself_takes_names_too(layer):
    model = get_peft_model(Net(layer), FLoRAConfig(target_modules=["layer"], init_weights=False, seed=0))
    model.add_adapter("two", FLoRAConfig(target_modules=["layer"], init_weights=False, seed=1))
    layer, generator = model.eval().base_model.model.layer, torch.Generator().manual_seed(0)
    shape = (3, 4, 9, 9) if isinstance(layer.get_base_layer(), nn.Conv2d) else (3, 5, 12)
    x = torch.randn(shape, generator=generator)
    x = torch.arange(15).view(3, 5) if isinstance(layer.get_base_layer(), nn.Embedding) else x
    names = ["two", "__base__", "default"]
    found = layer(x, adapter_names=names)
    assert torch.allclose(found, model(x, adapter_names=names), atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(layer(x, adapter_names=names), layer(x))
    with pytest.raises(ValueError, match="non-existing"):
        layer(x, adapter_names=["two", "three", "two"])
    with pytest.raises(ValueError, match="2 entries for a batch of 3"):
        layer(x, adapter_names=["two", "two"])
