"""A task from any model and dataset of the Hub, or from local directories."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from datasets import ClassLabel, Dataset, load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

from support.task import Task

Loader = Callable[[list[str]], tuple[PreTrainedModel, list[str]]]
"""Loads the base with the named modules unquantised, and says which modules its checkpoint lacks."""
SPLIT_SEED = 0
HELD_OUT = 0.1


def load(options: argparse.Namespace) -> Task:
    """Builds the task that the command line describes."""
    build = {
        "text-classification": _text_classification,
        "image-classification": _image_classification,
        "causal-lm": _causal_lm,
    }
    return build[options.task](options, *_splits(options))


def _text_classification(options: argparse.Namespace, *splits: Dataset) -> Task:
    tokenizer = _tokenizer(options.model)
    classes = _classes(splits[0], options.label_column)

    def encode(row: dict) -> dict:
        tokens = tokenizer(row[options.text_column], truncation=True, max_length=options.max_length)
        return {**tokens, "labels": classes[row[options.label_column]][0]}

    make_base = _base(
        AutoModelForSequenceClassification, options, classes, pad_token_id=tokenizer.pad_token_id
    )
    encoded = [split.map(encode, remove_columns=split.column_names) for split in splits]
    return _task(options, make_base, encoded, DataCollatorWithPadding(tokenizer), tokenizer, "SEQ_CLS")


def _image_classification(options: argparse.Namespace, *splits: Dataset) -> Task:
    processor = AutoImageProcessor.from_pretrained(options.model)
    classes = _classes(splits[0], options.label_column)

    def encode(rows: dict) -> dict:
        images = [image.convert("RGB") for image in rows[options.image_column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {
            "pixel_values": pixels,
            "labels": [classes[label][0] for label in rows[options.label_column]],
        }

    make_base = _base(AutoModelForImageClassification, options, classes)
    encoded = [split.with_transform(encode) for split in splits]
    return _task(options, make_base, encoded, default_data_collator, processor)


def _causal_lm(options: argparse.Namespace, *splits: Dataset) -> Task:
    tokenizer = _tokenizer(options.model)

    def encode(row: dict) -> dict:
        text = row[options.text_column] + (tokenizer.eos_token or "")
        return dict(tokenizer(text, truncation=True, max_length=options.max_length))

    encoded = [split.map(encode, remove_columns=split.column_names) for split in splits]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return _task(options, _base(AutoModelForCausalLM, options), encoded, collate, tokenizer, "CAUSAL_LM")


def _task(
    options: argparse.Namespace,
    make_base: Loader,
    splits: list[Dataset],
    collate: Callable[[list], dict[str, torch.Tensor]],
    processor: Any,
    peft_task_type: str | None = None,
) -> Task:
    _, new_modules = make_base([])
    train, validation, test = splits
    return Task(
        f"{options.model} on {options.dataset}",
        lambda: make_base(new_modules)[0],
        train,
        validation,
        test,
        collate=collate,
        peft_task_type=peft_task_type,
        new_modules=new_modules,
        measure="perplexity" if peft_task_type == "CAUSAL_LM" else "accuracy",
        processor=processor,
    )


def _base(auto: Any, options: argparse.Namespace, classes: dict | None = None, **settings: Any) -> Loader:
    if classes is not None:
        settings["id2label"] = dict(classes.values())
        settings["label2id"] = {name: index for index, name in classes.values()}

    def make_base(unquantised: list[str]) -> tuple[PreTrainedModel, list[str]]:
        settings["quantization_config"] = _quantization(options.quantize, unquantised)
        model, report = auto.from_pretrained(
            options.model, ignore_mismatched_sizes=True, output_loading_info=True, **settings
        )
        _keep_training_layout(model)
        absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
        return model, sorted({key.rpartition(".")[0] for key in absent})

    return make_base


def _quantization(kind: str | None, unquantised: list[str]) -> BitsAndBytesConfig | None:
    if kind is None:
        return None
    return BitsAndBytesConfig(
        load_in_8bit=kind == "8bit",
        load_in_4bit=kind == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=unquantised or None,
    )


def _keep_training_layout(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from repacking 4-bit weights when a CPU evaluates: training breaks after it."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _tokenizer(model: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _classes(split: Dataset, column: str) -> dict[Any, tuple[int, str]]:
    """Maps each value of the label column to its number and its name."""
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return {index: (index, name) for index, name in enumerate(feature.names)}
    return {value: (index, str(value)) for index, value in enumerate(sorted(split.unique(column)))}


def _splits(options: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset]:
    """Training, validation and test rows; a fixed seed holds out of the first what the dataset lacks."""
    data = load_dataset(options.dataset, options.dataset_config)
    train = data[options.train_split]
    if options.test_split:
        test = data[options.test_split]
    else:
        train, test = train.train_test_split(HELD_OUT, seed=SPLIT_SEED).values()
    train, validation = train.train_test_split(HELD_OUT, seed=SPLIT_SEED).values()
    return train, validation, test
