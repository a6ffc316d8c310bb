"""Detectors of generated images: what is trained, how, and what is measured on them."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peft_subspace
from support.vision import Detector, attention_linears

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT still asks for it

HEAD_LEARNING_RATE = 1e-3
"""Learning rate of the new head under every method; the tuned rate is that of what lies below the head."""


@dataclass(frozen=True)
class Method:
    """A way to train a detector; its learning rate is chosen among `rates`."""

    title: str
    rates: tuple[float, ...]
    wrap: Callable[[Detector], nn.Module] | None
    """Makes the parameters below the head trainable; None is the linear probe, whose rates are 1/C."""


def _effort(detector: Detector, **regularizers: Any) -> nn.Module:
    config = peft_subspace.EffortConfig(r=1, **_where(detector), **regularizers)
    return peft.get_peft_model(detector, config)


def _lora(detector: Detector, rank: int) -> nn.Module:
    return peft.get_peft_model(detector, peft.LoraConfig(r=rank, lora_alpha=2 * rank, **_where(detector)))


def _full(detector: Detector) -> nn.Module:
    return detector.requires_grad_(True)


def _where(detector: Detector) -> dict[str, Any]:
    return {"target_modules": attention_linears(detector), "modules_to_save": ["classifier"]}


METHODS = {
    "effort": Method("Effort, r=1", (3e-3, 1e-2, 3e-2), _effort),
    "effort-losses": Method(
        "Effort, r=1, both losses",
        (3e-3, 1e-2, 3e-2),
        lambda detector: _effort(detector, orthogonality_weight=1.0, energy_weight=1.0),
    ),
    "lora-1": Method("LoRA, r=1", (1e-3, 3e-3, 1e-2), lambda detector: _lora(detector, 1)),
    "lora-16": Method("LoRA, r=16", (1e-4, 3e-4, 1e-3), lambda detector: _lora(detector, 16)),
    "full": Method("full fine-tuning", (3e-6, 1e-5, 3e-5), _full),
    "probe": Method("linear probe", (1e-2, 1.0, 1e2), None),
}


@dataclass
class Examples:
    """8-bit images with labels, 0 for real ones and 1 for generated ones."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, real: Tensor, generated: Tensor) -> "Examples":
        """Real and generated images together."""
        labels = torch.tensor([0] * len(real) + [1] * len(generated))
        return cls(torch.cat([real, generated]), labels)

    def drawn(self, count: int, seed: int) -> "Examples":
        """A random part of `count` examples."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))[:count]
        return Examples(self.images[order], self.labels[order])

    def rows(self) -> list[dict]:
        """What the Trainer reads."""
        pairs = zip(self.images, self.labels, strict=True)
        return [{"pixel_values": image, "labels": label} for image, label in pairs]


@dataclass
class Training:
    """Length and place of the training runs."""

    steps: int
    batch_size: int
    bf16: bool
    output: str


@dataclass
class Trained:
    """A trained detector: `scores`, the logit of "generated" against "real", of features."""

    model: nn.Module
    scores: Callable[[Tensor], np.ndarray]
    trainable: int
    bf16: bool

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Pooled features `(N, width)` of 8-bit images, in fp32."""
        self.model.eval()
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            outputs = [self.model(pixel_values=batch.to(device)) for batch in images.split(64)]
        return torch.cat([output.hidden_states[-1].float().cpu() for output in outputs])


def train(
    method: Method, detector: Detector, examples: Examples, rate: float, seed: int, training: Training
) -> Trained:
    """Trains a copy of `detector`; the seed draws the head, the adapter and the order of the examples."""
    transformers.set_seed(seed)
    detector = copy.deepcopy(detector).requires_grad_(False)
    detector.classifier.reset_parameters()
    if method.wrap is None:
        return _probe(
            detector, examples.drawn(training.steps * training.batch_size, seed), rate, training.bf16
        )
    model = method.wrap(detector)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trainable.items() if "classifier" in name]
    body = [p for name, p in trainable.items() if "classifier" not in name]
    groups = [{"params": body, "lr": rate}, {"params": head, "lr": HEAD_LEARNING_RATE}]
    trainer = Trainer(
        model,
        _arguments(training, seed),
        train_dataset=examples.rows(),
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0, fused=True), None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    weight, bias = (p.detach().cpu() for p in head)

    def scores(features: Tensor) -> np.ndarray:
        logits = nn.functional.linear(features, weight, bias)
        return (logits[:, 1] - logits[:, 0]).numpy()

    return Trained(model, scores, sum(p.numel() for p in trainable.values()), training.bf16)


def _arguments(training: Training, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=training.output,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=seed,
        bf16=training.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _probe(detector: Detector, examples: Examples, penalty: float, bf16: bool) -> Trained:
    """Logistic regression on frozen features, with as many images as the other methods see."""
    frozen = Trained(detector, lambda features: features.numpy(), 0, bf16)
    features = frozen.features(examples.images).numpy()
    regression = LogisticRegression(C=1 / penalty, max_iter=5000).fit(features, examples.labels.numpy())
    parameters = regression.coef_.size + regression.intercept_.size

    def scores(features: Tensor) -> np.ndarray:
        return regression.decision_function(features.numpy())

    return Trained(detector, scores, parameters, bf16)


def loss_of(trained: Trained, examples: Examples) -> float:
    """Mean cross-entropy, by which the learning rate is chosen."""
    scores = trained.scores(trained.features(examples.images)).astype(np.float64)
    probabilities = np.clip(1 / (1 + np.exp(-scores)), 1e-7, 1 - 1e-7)
    return float(log_loss(examples.labels.numpy(), probabilities))


def measures(trained: Trained, real: Tensor, generated: dict[str, Tensor]) -> dict:
    """Accuracy and AUC of each family against the same real images, and the features' effective rank.

    Returns:
        `{"accuracy": {family: …}, "auc": {family: …}, "effective_rank": …}`.
    """
    real_features = trained.features(real)
    features = {family: trained.features(images) for family, images in generated.items()}
    negative = trained.scores(real_features)
    accuracy, auc = {}, {}
    for family, vectors in features.items():
        positive = trained.scores(vectors)
        labels = [0] * len(negative) + [1] * len(positive)
        accuracy[family] = float(((negative <= 0).mean() + (positive > 0).mean()) / 2)
        auc[family] = float(roc_auc_score(labels, np.concatenate([negative, positive])))
    rank = effective_rank(torch.cat([real_features, *features.values()]))
    return {"accuracy": accuracy, "auc": auc, "effective_rank": rank}


def effective_rank(features: Tensor) -> float:
    """`exp(−Σ pᵢ log pᵢ)` with `pᵢ = σᵢ / Σσ`, σ the singular values of the centred features `(N, width)`.

    Reference: Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).
    """
    values = torch.linalg.svdvals(features.double() - features.double().mean(0))
    parts = values[values > 0] / values.sum()
    return float(torch.exp(-(parts * parts.log()).sum()))
