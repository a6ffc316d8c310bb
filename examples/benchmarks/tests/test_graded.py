"""Tasks of the comparison: what is trained on and what is asked, of language models and of images."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.modeling_outputs import CausalLMOutput

BENCHMARKS = Path(__file__).resolve().parents[1]
LETTERS = "".join(map(chr, range(32, 127))) + "\n"
END = "~"

QUESTIONS = {"train": [("1+1?", "2 #### 2"), ("a long one " * 9, "0 #### 0"), ("2+3?", "5 #### 5")],
             "test": [("3+3?", "6 #### 6")]}  # fmt: skip
PROBLEMS = [
    {"question": "9 less 4?", "equation": "( 9.0 - 4.0 )", "answer": 5.0},
    {"question": "half of 1?", "equation": "( 1.0 / 2.0 )", "answer": 0.5},  # the only one that is no integer
    {"question": "7 and 2?", "equation": "( 7.0 + 2.0 )", "answer": 9.0},
]
NEWS = [("a match", "Sports"), ("a vote", "World"), ("a goal", "Sports"), ("a war", "World")]


@pytest.fixture
def decoder(tmp_path):
    """Directory of a language model of single characters."""
    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    folder = tmp_path / "decoder"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=END)
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=96
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    files = {f"math/gsm8k.{split}": [{"question": q, "answer": a} for q, a in rows]
             for split, rows in QUESTIONS.items()}  # fmt: skip
    files["math/svamp.test"] = PROBLEMS
    for split in ("train", "test"):
        files[f"text/agnews.{split}"] = [{"text": f"{text} {split}", "label": c} for text, c in NEWS]
    for name, rows in files.items():
        file = tmp_path / f"{name}.jsonl.gz"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return tmp_path


@pytest.fixture
def archive(tmp_path):
    """Red pictures and blue ones, more of them red."""
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "images" / "cifar10_25k.tar", "w") as tar:
        for split, label, count in (("train", "red", 9), ("train", "blue", 6), ("test", "red", 2)):
            for number in range(count):
                file = io.BytesIO()
                Image.new("RGB", (8, 8), label).save(file, "jpeg")
                entry = tarfile.TarInfo(f"{split}/{label}/{number}.jpg")
                entry.size = file.tell()
                file.seek(0)
                tar.addfile(entry, file)
    return tmp_path


def read(row):
    """Text of a row, and what of it is labeled."""
    ids, labels = row["input_ids"], [label for label in row["labels"] if label >= 0]
    assert len(ids) == len(row["labels"])
    return "".join(LETTERS[i] for i in ids), "".join(LETTERS[i] for i in labels)


def loaded(name, data, decoder, tokens=60):
    from support import graded
    from support.task import Sizes

    return graded.load(name, data, decoder, Sizes(train=9, validation=1, test=9, tokens=tokens))


def test_math_trains_on_answers_that_fit_and_asks_for_one_of_three_numbers(data, decoder):
    task = loaded("gsm8k-svamp", data, decoder)
    assert [read(row) for row in task.validation] == [
        (f"Question: 1+1?\nAnswer: 2 #### 2{END}", f" 2 #### 2{END}")
    ]
    assert [read(row)[1] for row in (*task.train, *task.test)] == [f" 5 #### 5{END}", f" 6 #### 6{END}"]
    assert len(task.choices) == 2
    for choice in task.choices:
        texts, answers = zip(*map(read, choice.candidates), strict=True)
        (problem,) = [p for p in PROBLEMS if p["question"] in texts[0]]
        assert {text.removesuffix(answer) for text, answer in zip(texts, answers, strict=True)} == {
            f"Question: {problem['question']}\nAnswer:"
        }
        assert len({*answers}) == 3
        asked = re.findall(r"\d", problem["question"])
        assert not {f" #### {number}{END}" for number in asked} & {*answers}
        assert answers[choice.right] == f" #### {problem['answer']:.0f}{END}"


def test_topics_are_chosen_among_all_classes(data, decoder):
    task = loaded("agnews-generation", data, decoder, tokens=8)
    assert (len(task.train), len(task.validation), len(task.test)) == (3, 1, 4)
    for row, choice in zip(task.test, task.choices, strict=True):
        answers = [read(candidate)[1] for candidate in choice.candidates]
        assert answers == [f" Sports{END}", f" World{END}"]
        assert choice.candidates[choice.right] == row
        assert len(read(row)[0].removesuffix(answers[choice.right])) == 8 + len("\nTopic:")


def test_language_models_train_and_choose(data, decoder):
    from support import trial

    task = loaded("agnews-generation", data, decoder)
    schedule = trial.Schedule(steps=2, batch_size=2, checks=1, start_batches=1)
    found = trial.run(task, "lora", 2, 1e-3, 0, schedule)
    assert found["test_accuracy"] in {0.0, 0.25, 0.5, 0.75, 1.0}
    assert found["test_loss"] > 0


def is_red(row):
    red, _, blue = row["pixel_values"].mean((1, 2))
    return bool(red > blue)


def test_images_come_from_the_archive(archive):
    from support import graded
    from support.task import Sizes

    task = graded.load("cifar10", archive, None, Sizes(train=9, validation=3, test=9, pixels=32))
    assert (len(task.train), len(task.validation), len(task.test)) == (9, 3, 2)
    for row in (*task.train, *task.validation, *task.test):
        assert row["pixel_values"].shape == (3, 32, 32)
        assert row["labels"] == is_red(row)  # blue comes before red
    assert {row["labels"] for row in task.train} == {0, 1}
    assert task.make_base().config.num_labels == 2


@pytest.mark.parametrize(("name", "classes"), [("resnet-digits", 10), ("resnet-cifar10", 2)])
def test_a_residual_network_has_kernels_to_adapt(archive, name, classes):
    from support import graded
    from support.contestants import CONTESTANTS
    from support.task import Sizes

    task = graded.load(name, archive, None, Sizes(train=9, validation=3, test=9, pixels=32))
    assert task.train[0]["pixel_values"].shape == (3, 32, 32)
    model = CONTESTANTS["flora"].adapt(task, 2, ())
    adapted = [m.get_base_layer() for m in model.modules() if hasattr(m, "get_delta_weight")]
    assert Counter(layer.kernel_size for layer in adapted) == {(1, 1): 36, (3, 3): 16}
    batch = task.collate([task.train[0]])
    assert model(pixel_values=batch["pixel_values"]).logits.shape == (1, classes)


def test_the_residual_network_is_the_stored_one():
    from sklearn.datasets import load_sample_images

    from support import demos, photos, residual

    functional = torch.nn.functional
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (demos.IMAGENET_MEAN, demos.IMAGENET_STD))
    pictures = photos.stacked(
        Image.fromarray(photo).resize((224, 224)) for photo in load_sample_images().images
    ) / 255  # fmt: skip
    model, layers = residual.resnet50_half(10).base_model, residual.stored()
    with torch.no_grad():
        (weight, bias), (average, variance, count), (scale, shift) = layers[:3]
        x = functional.conv2d(255 * (pictures - mean).flip(1), weight, bias, stride=2, padding=3)
        x = functional.batch_norm(x, average / count, variance / count, scale, shift)
        truth = functional.max_pool2d(x.relu(), 3, 2, ceil_mode=True)
        found = model(pixel_values=(pictures - mean) / std, output_hidden_states=True)
        torch.testing.assert_close(found.hidden_states[0], truth, atol=1e-3, rtol=1e-3)
        weight, bias = layers[-1]
        suitable = (found.pooler_output.flatten(1) @ weight.T + bias).softmax(1)[:, 0]
    assert suitable.min() > 0.99  # as its own head sees them


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_little_is_dropped_before_the_head(archive, name):
    from support import graded
    from support.task import Sizes

    task = graded.load(name, archive, None, Sizes(train=9, validation=3, test=9, pixels=32))
    assert task.make_base().dropout.p == 0.2
    assert task.train[0]["pixel_values"].shape == (3, 32, 32)


@pytest.mark.parametrize(("name", "widest"), [("flora", 1), ("flora-all", 960)])
def test_convolutions_in_groups_are_adapted_where_all_are(archive, name, widest):
    from support import graded
    from support.contestants import CONTESTANTS
    from support.task import Sizes

    task = graded.load("cifar10", archive, None, Sizes(train=9, validation=3, test=9, pixels=32))
    model = CONTESTANTS[name].adapt(task, 2, ())
    groups = {m.get_base_layer().groups for m in model.modules() if hasattr(m, "get_delta_weight")}
    assert max(groups) == widest


def test_few_images_of_each_class(archive, monkeypatch):
    from support import graded, pictures
    from support.task import Sizes

    monkeypatch.setattr(pictures, "SHOTS", 2)
    task = graded.load("clip-fewshot", archive, None, Sizes(train=9, validation=3, test=9, pixels=32))
    assert sorted(row["labels"] for row in task.train) == [0, 0, 1, 1]
    assert len(task.validation) == 3


@pytest.mark.slow
def test_clip_takes_small_images_as_its_tower_does():
    from support import pictures, vision

    model = vision.clip_classifier(48, 5)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.vision_model(images).last_hidden_state
        truth = vision.clip_vision()(images, interpolate_pos_encoding=True).last_hidden_state
    assert found.shape == (2, 1 + 3 * 3, 768)
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)
    assert model(pixel_values=images, labels=torch.tensor([0, 4])).logits.shape == (2, 5)
    adapted = [name for name, _ in model.named_modules() if re.fullmatch(pictures.CLIP.target_modules, name)]
    assert len(adapted) == 12 * 6


def test_a_decoder_has_to_be_given(data):
    with pytest.raises(SystemExit, match="'gsm8k-svamp' needs --decoder"):
        loaded("gsm8k-svamp", data, None)


@pytest.mark.parametrize(("right", "accuracy"), [((1, 0), 1.0), ((1, 1), 0.5), ((0, 1), 0.0)])
def test_the_likeliest_answer_is_chosen(data, decoder, right, accuracy):
    from support import trial
    from support.task import Choice

    class Next(torch.nn.Module):
        """Finds the next letter of the alphabet twice as likely as any other."""

        def forward(self, input_ids, attention_mask=None):
            following = torch.nn.functional.one_hot((input_ids + 1) % 96, 96)
            return CausalLMOutput(logits=(1 + following.float()).log())

    def row(answer):
        asked = [5, 6]
        return {"input_ids": [*asked, *answer], "labels": [-100, -100, *answer]}

    task = loaded("agnews-generation", data, decoder)
    # of the second pair, the shorter answer is likelier though each of its letters is less so
    pairs = [[row([9]), row([7])], [row([9]), row([7, 8, 9, 3])]]
    task.choices = [Choice(pair, place) for pair, place in zip(pairs, right, strict=True)]
    assert trial.choice_accuracy(Next(), task, False) == accuracy
