"""LoRA-SB: bases, initialization, and what frozen bases ask of saving, copying, combining and training."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import peft_subspace
from peft_subspace import GradientInitCallback, LoRASBConfig, initialize_from_gradient
from peft_subspace.core import linalg
from peft_subspace.core.chain import multiply
from peft_subspace.initialization.callback import first_learning_rate

TARGETS = ["q_proj", "down_proj"]


def llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(r=8, base=None, **options):
    options = {"target_modules": TARGETS, "init_weights": "svd", **options}
    return get_peft_model(base or llama(), LoRASBConfig(r=r, **options))


def batches(count=3, size=4, seed=5):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(64, (size, 10), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i} for i in ids]


def start(model, learning_rate=1e-3, **options):
    initialize_from_gradient(model, batches(), learning_rate=learning_rate, progress=False, **options)


def deltas(model, adapter="default"):
    return {
        name: layer.deltas[adapter]
        for name, layer in model.named_modules()
        if isinstance(layer, peft_subspace.tuner.layer.SubspaceLayer)
    }


def frozen_gradients(model):
    """Mean gradients of the adapted weights, by autograd on the base model."""
    base = copy.deepcopy(model).unload().eval()
    weights = {
        name: base.get_submodule(name.removeprefix("base_model.model.")).weight for name in deltas(model)
    }
    for weight in weights.values():
        weight.requires_grad_()
    loss = sum(base(**batch).loss for batch in batches()) / 3
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def outputs(model):
    with torch.no_grad():
        return model(**batches(1)[0]).logits


# ------------------------------------------------------------------------------------ start and equation


@pytest.mark.parametrize("exact", [False, True])
def test_start_is_the_best_approximation_of_the_first_step(exact):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(200, 160)),
        LoRASBConfig(r=24, target_modules=["0"], exact_svd=exact, scaling="paper"),
    )
    x, target = torch.randn(300, 200), torch.randn(300, 160)
    loss = lambda m, batch: nn.functional.mse_loss(m(batch[0]), batch[1])  # noqa: E731
    base = model.get_base_model()[0].base_layer
    weight = base.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(base, (x, target)), weight)
    weight.requires_grad_(False)
    data = [(x[i : i + 50], target[i : i + 50]) for i in range(0, 300, 50)]
    initialize_from_gradient(model, data, learning_rate=3e-4, loss_fn=loss, progress=False)
    (delta,) = deltas(model).values()
    assert torch.norm(delta.B.T @ delta.B - torch.eye(24)) < 1e-5
    assert torch.norm(delta.A @ delta.A.T - torch.eye(24)) < 1e-5
    step = -3e-4 * gradient.sign()
    _, S, _ = torch.linalg.svd(step)
    assert torch.norm(step - multiply(delta.factors())) < 1.01 * torch.norm(S[24:])
    # best in value as well as in subspace: nothing of the step is left within the two bases
    assert torch.norm(delta.B.T @ step @ delta.A.T - delta.R) < 1e-4 * torch.norm(delta.R)


def test_randomized_svd_against_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 260, generator=generator).sign()  # a flat spectrum, the hardest
    low = torch.randn(300, 20, generator=generator) @ torch.randn(20, 260, generator=generator)
    for matrix in (noise, low + 0.1 * noise, noise.T):
        U, S, Vh = linalg.truncated_svd(matrix, 24)
        exact = torch.linalg.svdvals(matrix)
        residual = torch.norm(matrix - U @ S.diag() @ Vh) / torch.norm(exact[24:])
        assert residual < 1.01
        assert torch.norm(U.T @ U - torch.eye(24)) < 1e-5
        assert torch.norm(Vh @ Vh.T - torch.eye(24)) < 1e-5
        one, other = linalg.truncated_svd(matrix, 24, exact=True), torch.linalg.svd(matrix)
        torch.testing.assert_close(one[1], other[1][:24])


def test_svd_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    one = linalg.truncated_svd(torch.ones(100, 100).tril(), 8)
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, one, linalg.truncated_svd(torch.ones(100, 100).tril(), 8)))


def test_all_layers_start_from_the_gradient_of_the_model():
    model = adapted(scaling="paper")
    gradients = frozen_gradients(model)
    start(model)
    for name, delta in deltas(model).items():
        step = -1e-3 * gradients[name].sign()
        S = torch.linalg.svdvals(step)
        assert torch.norm(step - multiply(delta.factors())) < 1.01 * torch.norm(S[8:])


def test_trajectory_does_not_depend_on_the_scaling():
    """With the gradient that the paper derives, `g^R / s²`, on the plain one that autograd returns."""

    def weights(scale):
        model = adapted(scaling="paper")
        for layer in model.modules():
            if isinstance(layer, peft_subspace.tuner.layer.SubspaceLayer):
                layer.set_scale("default", scale)
        start(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05)
        for step in range(20):
            optimizer.zero_grad()
            model(**batches()[step % 3]).loss.backward()
            for parameter in trained:
                parameter.grad /= scale**2
            optimizer.step()
        return [scale * multiply(delta.factors()).detach() for delta in deltas(model).values()]

    plain, scaled = weights(1.0), weights(4.0)
    for one, other in zip(plain, scaled, strict=True):
        assert torch.norm(one - other) < 1e-3 * torch.norm(one)
        assert torch.norm(one) > 0


def test_svd_start_is_the_identity_in_the_bases_of_the_weight():
    base = llama()
    wanted = outputs(base.eval())
    model = adapted(base=base).eval()
    assert torch.equal(outputs(model), wanted)
    for name, delta in deltas(model).items():
        U, _, Vh = torch.linalg.svd(model.get_submodule(name).get_base_weight())
        torch.testing.assert_close((delta.B.T @ U[:, :8]).abs(), torch.eye(8), atol=0.02, rtol=0)
        torch.testing.assert_close((delta.A @ Vh[:8].T).abs(), torch.eye(8), atol=0.02, rtol=0)


def test_disabled_gives_the_untouched_base():
    base = llama().eval()
    wanted, weights = outputs(base), {k: v.clone() for k, v in base.state_dict().items()}
    model = adapted(base=base)
    start(model, learning_rate=0.1)
    model.eval()
    assert not torch.allclose(outputs(model), wanted)
    with model.disable_adapter():
        assert torch.equal(outputs(model), wanted)
    restored = model.unload().state_dict()
    assert all(torch.equal(restored[key], weights[key]) for key in weights)


# ---------------------------------------------------------------------------------------- config, counts


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r=0 must be at least 1"),
        ({"r": [2, 3]}, TypeError, "must be a whole number"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0 must be"),
        ({"init_weights": "pissa"}, ValueError, "init_weights='pissa' must be one of"),
        ({"exact_svd": "yes"}, TypeError, "exact_svd='yes' must be True or False"),
    ],
)
def test_bad_configs(options, error, message):
    with pytest.raises(error, match=message):
        LoRASBConfig(**options)


def test_rank_of_a_named_layer_above_its_weight_is_refused_before_anything_is_replaced():
    base = llama()
    message = r"q_proj: r=33 exceeds 32, .* shape \(32, 32\); lower rank_pattern"
    with pytest.raises(ValueError, match=message):
        adapted(rank_pattern={"q_proj": 33}, base=base)
    assert not any("lorasb" in name for name, _ in base.named_modules())


def test_default_rank_is_lowered_on_small_layers():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 5)), LoRASBConfig(target_modules=["0"]))
    (delta,) = deltas(model).values()
    assert delta.R.shape == (3, 3)


@pytest.mark.parametrize(
    ("build", "targets", "r", "count"),
    [
        ("mistral", "all-linear", 32, 229_376),
        ("mistral", "all-linear", 96, 2_064_384),
        ("roberta", ["query", "value", "attention.output.dense", "output.dense"], 24, 55_296),
    ],
)
def test_counts_of_the_paper(build, targets, r, count):
    with torch.device("meta"):
        if build == "mistral":
            base = MistralForCausalLM(MistralConfig())
        else:
            base = RobertaForSequenceClassification(
                RobertaConfig(
                    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
                )
            )
        model = get_peft_model(base, LoRASBConfig(r=r, target_modules=targets))
    assert model.get_nb_trainable_parameters()[0] == count


def test_checkpoint_holds_both_bases_and_r(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    wanted = sum(8 * (d.shape.out_features + d.shape.columns) + 64 for d in deltas(model).values())
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        found = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    assert sum(tensor.numel() for tensor in found) == wanted
    assert {tensor.dtype for tensor in found} == {torch.float32}


def test_everything_stays_fp32_on_a_bf16_base():
    model = get_peft_model(
        llama().to(torch.bfloat16), LoRASBConfig(r=8, target_modules=TARGETS, init_weights="svd")
    )
    for cast in (lambda m: m, lambda m: m.to(torch.bfloat16), lambda m: m.half().bfloat16()):
        state = {key: t for key, t in cast(model).state_dict().items() if "lorasb" in key}
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    start(model)
    loss = model(**batches()[0]).loss
    loss.backward()
    assert all(delta.R.grad.dtype == torch.float32 for delta in deltas(model).values())
    delta = next(iter(deltas(model.double()).values()))
    assert delta.R.dtype == delta.B.dtype == torch.float64


# ----------------------------------------------------------------------------------- saving and copying


def test_loading_needs_no_gradient_and_no_svd(tmp_path, monkeypatch):
    model = adapted(init_weights=True)
    start(model)
    model.save_pretrained(tmp_path)
    wanted = outputs(model.eval())

    def no_svd(*args, **kwargs):
        raise AssertionError("an SVD was computed")

    monkeypatch.setattr("peft_subspace.methods.lora_sb.delta.truncated_svd", no_svd)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.equal(outputs(again.eval()), wanted)
    assert torch.equal(outputs(peft_subspace.load(llama(), tmp_path).eval()), wanted)
    with pytest.raises(ValueError, match="was loaded or started"):
        start(again)
    again.train()
    again(**batches()[0])  # and no warning


@pytest.mark.parametrize("started", [False, True])
def test_reference_copy_as_trainers_make_it(started):
    model = adapted()
    if started:
        start(model)
    for delta in deltas(model).values():
        delta.R.data.add_(torch.eye(8))  # as after some training
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.eval()
    wanted = outputs(model)
    model.set_adapter("ref")
    assert torch.equal(outputs(model), wanted)
    for delta in deltas(model).values():
        delta.A.zero_()  # the copy shares nothing
        delta.R.data.zero_()
    model.set_adapter("ref")
    assert torch.equal(outputs(model), wanted)


def test_copy_knows_whether_its_bases_come_from_gradients():
    model = adapted()
    model.add_adapter("early", model.peft_config["default"])
    start(model)
    model.add_adapter("late", model.peft_config["default"])
    first, early, late = (next(iter(deltas(model, n).values())) for n in ("default", "early", "late"))
    assert torch.equal(first.B, late.B)
    assert torch.equal(first.A, late.A)
    assert not torch.equal(first.B, early.B)
    assert not late.R.any()  # the copy starts at the base model
    with pytest.raises(ValueError, match="started from gradients before"):
        start(model, adapter_name="late")
    start(model, adapter_name="early")
    assert torch.equal(first.B, early.B)


def test_warns_once_of_a_start_without_gradients():
    model = adapted(init_weights=True)
    model.eval()
    outputs(model)
    model.train()
    with pytest.warns(UserWarning, match="adapter 'default' trains in bases taken from the base weight"):
        model(**batches()[0])
    model(**batches()[0])
    for quiet in (adapted(init_weights="svd"), adapted(init_weights=False), adapted(init_weights=True)):
        if quiet.peft_config["default"].init_weights is True:
            start(quiet)
        quiet.train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quiet(**batches()[0])


def test_warns_of_an_injected_adapter_too():
    model = llama()
    inject_adapter_in_model(LoRASBConfig(r=2, target_modules=TARGETS), model)
    with pytest.warns(UserWarning, match="trains in bases taken from the base weight"):
        model.train()(**batches()[0])


# ---------------------------------------------------------------------------------- combining, exporting


def updates(model, adapter):
    layers = (m for m in model.modules() if isinstance(m, peft_subspace.tuner.layer.SubspaceLayer))
    return [layer.get_delta_weight(adapter).detach() for layer in layers]


def clients():
    """Two adapters that share their bases and have been trained apart."""
    model = adapted()
    start(model)
    model.add_adapter("other", model.peft_config["default"])
    for number, name in enumerate(("default", "other")):
        for delta in deltas(model, name).values():
            delta.R.data.normal_(generator=torch.Generator().manual_seed(number))
    return model


@pytest.mark.parametrize("combination", ["linear", "cat"])
def test_weighted_adapter_is_exact(combination, tmp_path, monkeypatch):
    model = clients()
    monkeypatch.setattr("peft_subspace.methods.lora_sb.delta.truncated_svd", None)  # none is needed
    model.add_weighted_adapter(["default", "other"], [0.75, -0.25], "mean", combination)
    both = zip(updates(model, "default"), updates(model, "other"), updates(model, "mean"), strict=True)
    for one, other, mean in both:
        torch.testing.assert_close(mean, 0.75 * one - 0.25 * other, atol=1e-5, rtol=1e-5)
    ranks = {len(delta.R) for delta in deltas(model, "mean").values()}
    assert ranks == ({8} if combination == "linear" else {16})
    for delta in deltas(model, "mean").values():
        assert torch.norm(delta.B.T @ delta.B - torch.eye(len(delta.R))) < 1e-5
        assert torch.norm(delta.A @ delta.A.T - torch.eye(len(delta.R))) < 1e-5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path / "mean")
    for one, other in zip(updates(model, "mean"), updates(again, "default"), strict=True):
        assert torch.equal(one, other)


def test_linear_combination_refuses_different_bases():
    model = clients()
    model.add_adapter("third", LoRASBConfig(r=8, target_modules=TARGETS, init_weights=False))
    with pytest.raises(
        ValueError, match=r"q_proj: adapters \['default', 'third'\]: .*different bases.*'cat'"
    ):
        model.add_weighted_adapter(["default", "third"], [0.5, 0.5], "mean", "linear")
    assert "mean" not in model.peft_config


@pytest.mark.parametrize("common", ["A", "B"])
def test_linear_combination_refuses_adapters_that_share_one_basis(common):
    model = clients()
    for delta in deltas(model, "other").values():
        getattr(delta, "B" if common == "A" else "A").neg_()
    with pytest.raises(ValueError, match="different bases"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean", "linear")


def test_concatenation_beyond_the_rank_of_the_weight():
    model = adapted(r=24, init_weights=False)
    model.add_adapter("other", LoRASBConfig(r=24, target_modules=TARGETS, init_weights=False))
    model.add_weighted_adapter(["default", "other"], [1.0, 2.0], "sum")
    for one, other, total in zip(*(updates(model, n) for n in ("default", "other", "sum")), strict=True):
        assert torch.norm(total - one - 2 * other) < 1e-5 * torch.norm(total)
    assert {len(delta.R) for delta in deltas(model, "sum").values()} == {32}


def test_exported_lora_loads_with_peft(tmp_path):
    model = adapted()
    start(model, learning_rate=0.05)
    model.eval()
    peft_subspace.export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert lora.peft_config["default"].r == 8
    torch.testing.assert_close(outputs(lora), outputs(model), atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------- Trainer


class Texts(Dataset):
    def __init__(self, count=24):
        self.ids = torch.randint(64, (count, 10), generator=torch.Generator().manual_seed(7))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Watch(TrainerCallback):
    """Remembers the batches that training sees, and the adapter when it begins."""

    def __init__(self):
        self.seen, self.first = [], None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.first = {k: t.clone() for k, t in model.state_dict().items() if "lorasb" in k}
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.seen.append(kwargs["input_ids"].tolist())

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


def train(model, folder, callbacks, resume=None, **options):
    options = {"max_steps": 4, "warmup_steps": 2, "learning_rate": 1e-3, "save_steps": 2, **options}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        **options,
    )  # fmt: skip
    watch = Watch()
    trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[*callbacks, watch])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_callback_starts_from_the_trainers_own_batches(tmp_path):
    model = adapted(init_weights=True)
    _, watch = train(model, tmp_path / "one", [GradientInitCallback(num_batches=6, learning_rate="schedule")])
    _, plain = train(adapted(), tmp_path / "two", [])
    assert watch.seen == plain.seen  # the order of the data, all of which the callback has read
    wanted = adapted()
    data = [{"input_ids": Texts().ids, "labels": Texts().ids}]
    initialize_from_gradient(
        wanted, data, learning_rate=1e-3 / 2, progress=False
    )  # second of two warm-up steps
    found = {key: tensor for key, tensor in watch.first.items() if key.endswith("R")}
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted.state_dict()[key], rtol=1e-2, atol=1e-6)
    assert all(
        torch.equal(watch.first[k], t) for k, t in model.state_dict().items() if k.endswith((".A", ".B"))
    )
    assert not all(torch.equal(watch.first[k], model.state_dict()[k]) for k in found)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_callback_does_nothing_on_resume_or_on_a_loaded_adapter(tmp_path):
    def broken(model, batch):
        raise AssertionError("gradients were taken")

    whole, _ = train(adapted(init_weights=True), tmp_path, [GradientInitCallback()])
    model = adapted(init_weights=True)
    callback = GradientInitCallback(loss_fn=broken)
    trainer, _ = train(model, tmp_path, [callback], resume=str(tmp_path / "checkpoint-2"))
    for key, tensor in whole.model.state_dict().items():
        if "lorasb" in key:
            torch.testing.assert_close(trainer.model.state_dict()[key], tensor)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2", is_trainable=True)
    before = {key: tensor.clone() for key, tensor in loaded.state_dict().items() if "lorasb" in key}
    _, watch = train(loaded, tmp_path / "more", [callback])
    assert all(torch.equal(watch.first[key], tensor) for key, tensor in before.items())


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("bits", [4, 8])
def test_callback_on_a_quantized_base(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "base")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    model = adapted(base=base, init_weights=True)
    weights = {name: model.get_submodule(name).get_base_weight().clone() for name in deltas(model)}
    trainer, watch = train(model, tmp_path, [GradientInitCallback()], max_steps=2)
    assert trainer.state.global_step == 2
    states = [getattr(getattr(m, "weight", None), "quant_state", None) for m in model.modules()]
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
    for name, delta in deltas(model).items():
        assert delta.initialized
        assert torch.norm(delta.B.T @ delta.B - torch.eye(8)) < 1e-5
        assert torch.equal(model.get_submodule(name).get_base_weight(), weights[name])
    assert all(tensor.any() for tensor in watch.first.values())


def test_first_learning_rate_of_a_schedule():
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1))
    assert first_learning_rate(warm, 9.0) == pytest.approx(0.025)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.AdamW([parameter], lr=0.1))
    assert first_learning_rate(plateau, 9.0) == pytest.approx(0.1)
    never = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0)
    assert first_learning_rate(never, 9.0) == 9.0
