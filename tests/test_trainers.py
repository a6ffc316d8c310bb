"""Every method in the trainers of other libraries: they train it, save it, and it loads again."""

import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    BertModel,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import models
import peft_subspace
from methods import METHODS
from models import tokenizer, words
from peft_subspace import GradientInitCallback, RegularizationCallback

EFFORT = next(method for method in METHODS if method.name == "effort")
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.tensor([[5, 9, 12, 33, 7, 20], [8, 8, 14, 3, 30, 22]])

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),  # torch says that there is no accelerator
    # TRL uses names that transformers has changed.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]


def config(method, **options):
    return method.config(target_modules=TARGETS, task_type="CAUSAL_LM", seed=0, **options)


def arguments(config_cls, folder, **options):
    """Settings of a short run; what else is not given is the trainer's default."""
    return config_cls(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        lr_scheduler_type="constant",
        **{"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "no", **options},
    )  # fmt: skip


def run(method, trainer, *, loss_fn=None):
    """Train; methods that start from gradients do so."""
    if method.name == "lora_sb":
        trainer.add_callback(GradientInitCallback(loss_fn=loss_fn, num_batches=2))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_saved(trainer, folder, build=models.llama):
    """The adapter that the trainer saves, loaded on a fresh base, gives the same outputs."""
    trainer.save_model(str(folder))
    model = trainer.model.eval()
    loaded = PeftModel.from_pretrained(build(), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, build()(IDS).logits)


ROWS = [{"input_ids": torch.arange(3 + i, 13 + i), "labels": torch.arange(3 + i, 13 + i)} for i in range(8)]


@pytest.mark.feature("transformers Trainer")
def test_trainer(method, tmp_path):
    """With evaluation, accumulated batches and the best checkpoint at the end."""
    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "eval_strategy": "steps",
        "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True,
        "gradient_checkpointing": True,
    }  # fmt: skip
    model = get_peft_model(models.llama(), config(method))
    settings = arguments(TrainingArguments, tmp_path, **options)
    trainer = Trainer(model, settings, train_dataset=ROWS, eval_dataset=ROWS)
    moved = run(method, trainer)
    assert moved
    assert all(method.prefix in name for name in moved)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.state.best_model_checkpoint
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
    check_saved(trainer, tmp_path / "adapter")


TEXTS = Dataset.from_list([{"text": words(*range(3 + i, 13 + i))} for i in range(8)])


def sft(model, folder, peft_config, **options):
    options = {"per_device_train_batch_size": 8, "bf16": False, "max_length": 12, **options}
    return SFTTrainer(
        model, arguments(SFTConfig, folder, **options), train_dataset=TEXTS, processing_class=tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip


@pytest.mark.feature("TRL SFTTrainer")
def test_sft(method, tmp_path):
    trainer = sft(models.llama(), tmp_path, config(method))
    moved = run(method, trainer)
    assert moved
    assert all(method.prefix in name for name in moved)
    assert losses(trainer)[-1] < losses(trainer)[0]
    check_saved(trainer, tmp_path / "adapter")


PREFERENCES = Dataset.from_list(
    [{"prompt": words(5, 6 + i), "chosen": words(7 + i, 8), "rejected": words(20, 30 - i)} for i in range(4)]
)


@pytest.mark.slow
@pytest.mark.feature("TRL SFTTrainer on a 4-bit base")
def test_sft_on_a_4bit_base(method, tmp_path):
    """TRL takes what trains to bf16, whatever the method stores it in."""
    models.llama().save_pretrained(tmp_path / "base")

    def build():
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=bits, device_map={"": "cpu"}
        )

    trainer = sft(build(), tmp_path, peft_config=config(method))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trained
    assert all(parameter.dtype == torch.bfloat16 for parameter in trained)
    assert run(method, trainer)
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
    with torch.no_grad():
        difference = (
            loaded.train()(IDS).logits - trainer.model(IDS).logits
        )  # evaluation repacks 4-bit weights
    assert difference.abs().max() < 2e-2


def dpo(model, folder, **options):
    peft_config = options.pop("peft_config", None)
    options = {"per_device_train_batch_size": 4, "bf16": False, "max_length": 12, "max_steps": 4, **options}
    return DPOTrainer(
        model, None, arguments(DPOConfig, folder, **options), train_dataset=PREFERENCES,
        processing_class=tokenizer(), peft_config=peft_config,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.feature("TRL DPOTrainer")
@pytest.mark.parametrize("precomputed", [False, True], ids=["base-as-reference", "precomputed-reference"])
def test_dpo(method, precomputed, tmp_path):
    options = {"precompute_ref_log_probs": precomputed, "peft_config": config(method)}
    trainer = dpo(models.llama(), tmp_path, **options)
    moved = run(method, trainer, loss_fn=trainer.compute_loss)
    assert moved
    assert all(method.prefix in name for name in moved)
    if method.name != "lora_sb":  # whose update is not zero at initialization
        assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses(trainer)[-1] < losses(trainer)[0]
    check_saved(trainer, tmp_path / "adapter")


@pytest.mark.feature("TRL DPOTrainer")
def test_dpo_takes_a_copy_of_a_trained_adapter_as_reference(method, tmp_path):
    get_peft_model(models.llama(), config(method, init_weights=False)).save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(models.llama(), tmp_path / "first", is_trainable=True)
    start = model.eval()(IDS).logits.detach()
    trainer = dpo(model, tmp_path)
    assert list(model.peft_config) == ["default", "ref"]
    model.set_adapter("ref")
    assert torch.equal(model.eval()(IDS).logits, start)
    model.set_adapter("default")
    moved = run(method, trainer)
    assert moved
    assert all(".default." in name for name in moved)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses(trainer)[-1] < losses(trainer)[0]
    model.set_adapter("ref")
    assert torch.equal(model.eval()(IDS).logits, start)


@pytest.mark.slow
@pytest.mark.feature("TRL GRPOTrainer")
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "copied-reference"])
def test_grpo(method, trained, tmp_path):
    def reward(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    model = models.llama()
    if trained:
        model = get_peft_model(model, config(method, init_weights=False))
    options = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4, "beta": 0.1,
        "max_steps": 2, "bf16": False,
    }  # fmt: skip
    prompts = Dataset.from_list([{"prompt": words(5, 6 + i)} for i in range(4)])
    start = {"init_weights": "svd"} if method.name == "lora_sb" else {}
    trainer = GRPOTrainer(
        model, reward, arguments(GRPOConfig, tmp_path, **options), train_dataset=prompts,
        processing_class=tokenizer(), peft_config=None if trained else config(method, **start),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved
    assert all(method.prefix in name and ".default" in name for name in moved)
    assert ("ref" in trainer.model.peft_config) == trained
    check_saved(trainer, tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [sft, dpo])
def test_regularizers_of_effort_come_from_the_callback(kind, tmp_path):
    """TRL makes its losses of log-probabilities and takes none from the model."""

    def trained(weight, *callbacks, steps=1):
        settings = config(EFFORT, init_weights=False, orthogonality_weight=weight, energy_weight=weight)
        options = {"max_steps": steps, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0}
        trainer = kind(models.llama(), tmp_path, peft_config=settings, **options)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])

    plain, once = trained(0.0), trained(0.5, RegularizationCallback())
    assert (once - plain).abs().max() > 1e-4
    twice = trained(1.0, RegularizationCallback())
    torch.testing.assert_close(twice - plain, 2 * (once - plain), atol=1e-5, rtol=1e-3)
    with pytest.warns(
        UserWarning, match=r"has taken a step without .* add peft_subspace.RegularizationCallback"
    ):
        trained(0.5, steps=2)


def sentence_model(folder):
    settings = models.bert().config
    settings.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    models.build(BertModel, settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    encoder = Transformer(str(folder), max_seq_length=12)
    return SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())], device="cpu")


@pytest.mark.slow
@pytest.mark.feature("sentence-transformers")
def test_sentence_transformers(method, tmp_path):
    model = sentence_model(tmp_path / "base")
    base = model.encode([words(5, 9, 12)], convert_to_tensor=True)
    model.add_adapter(method.config(target_modules=["query", "value"], seed=0))
    rows = Dataset.from_list([{"anchor": words(5, 6 + i), "positive": words(6 + i, 20)} for i in range(4)])
    options = {"per_device_train_batch_size": 4, "max_steps": 4}
    trainer = SentenceTransformerTrainer(
        model, arguments(SentenceTransformerTrainingArguments, tmp_path / "run", **options),
        train_dataset=rows, loss=MultipleNegativesRankingLoss(model),
    )  # fmt: skip
    assert run(method, trainer, loss_fn=trainer.compute_loss)
    assert losses(trainer)[-1] < losses(trainer)[0]
    trained = model.encode([words(5, 9, 12)], convert_to_tensor=True)
    assert not torch.allclose(trained, base, atol=1e-4)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    again = loaded.encode([words(5, 9, 12)], convert_to_tensor=True)
    torch.testing.assert_close(again, trained, atol=1e-6, rtol=1e-5)
    loaded.disable_adapters()
    assert torch.equal(loaded.encode([words(5, 9, 12)], convert_to_tensor=True), base)


@pytest.mark.feature("PeftMixedModel")
def test_mixed_model_refuses_ours(method, record_property):
    message = f"'{method.config_cls.peft_type_name}' is not compatible with the `PeftMixedModel`"
    with pytest.raises(ValueError, match=message):
        get_peft_model(models.llama(), config(method), mixed=True)
    lora = get_peft_model(models.llama(), LoraConfig(target_modules=TARGETS), mixed=True)
    with pytest.raises(ValueError, match=message):
        lora.add_adapter("ours", config(method))
    assert lora(IDS).logits.shape == (2, 6, 37)
    record_property(
        "no",
        "COMPATIBLE_TUNER_TYPES in peft/tuners/mixed/model.py is a fixed tuple of PEFT's own types, and "
        "MixedModel._create_and_replace goes through them one by one; export_lora gives a LoRA to mix",
    )


def test_lora_export_can_be_mixed(method, tmp_path):
    """What PeftMixedModel takes in place of a method's own adapter."""
    model = get_peft_model(models.llama(), config(method, init_weights=False)).eval()
    peft_subspace.export_lora(model, tmp_path)
    mixed = PeftMixedModel.from_pretrained(models.llama(), tmp_path).eval()
    mixed.add_adapter("other", LoHaConfig(target_modules=["o_proj"]))
    mixed.set_adapter(["default", "other"])
    torch.testing.assert_close(mixed(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)
