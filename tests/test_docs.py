"""README, the documentation and the pages of the methods: their code runs, their links lead somewhere."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
import trl

import models
import peft_subspace
from peft_subspace import continual, developer, edits, merging, statistics
from test_diffusers import StableDiffusionPipeline, pipeline, unet

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
PAGES = [
    README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")), *CARDS,
]  # fmt: skip
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(28))]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page):
    """A page without its code, whose comments would look like headings."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.S)


def blocks(page):
    """Code of each block, with the line where it stands."""
    text = page.read_text()
    return [(text[: found.start()].count("\n") + 1, found[1]) for found in BLOCK.finditer(text)]


WITH_CODE = [page for page in PAGES if blocks(page)]


def test_every_method_is_in_readme():
    code = "\n".join(block for _, block in blocks(README))
    configs = {name for name in peft_subspace.__all__ if name.endswith("Config")} - {"CompositionConfig"}
    assert all(name in code for name in {*configs, "compose"})


def test_reference_has_every_public_name():
    reference = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    packages = (peft_subspace, continual, edits, merging, statistics, developer)
    public = {name for package in packages for name in package.__all__ if callable(getattr(package, name))}
    public -= {name for name in public if name.endswith(("Model", "Delta"))}  # configs say what these do
    listed = {*re.findall(r"^::: peft_subspace\.[\w.]*?(\w+)$", reference, re.M)}
    assert public - listed == set()
    assert all(re.search(rf"\b{name}\b", reference) for name in merging.METHODS)


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150
    assert len(README.read_bytes()) <= 10_000


def tokenizer():
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", eos_token="w0", unk_token="[UNK]"
    )


class Page:
    """Names that blocks use without making them, with small stand-ins for what is on the Hub."""

    def __init__(self, folder):
        rows = torch.randint(1, 8, (4, 6), generator=torch.Generator().manual_seed(0)).tolist()
        self.names = {
            "Trainer": transformers.Trainer,
            "get_peft_model": peft.get_peft_model,
            "model": models.llama(),
            "arguments": transformers.TrainingArguments(
                output_dir=str(folder / "run"), max_steps=1, per_device_train_batch_size=2, report_to="none",
                use_cpu=True, save_strategy="no", disable_tqdm=True,
            ),
            "data": [{"input_ids": row, "labels": row} for row in rows],
            "dataset": datasets.Dataset.from_list([{"text": "w1 w2 w3"}] * 4),
            "dataloader": [{"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}],
            "batch": {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)},
            "tokenizer": tokenizer(),
            "load_base": models.llama,
            "my_loss": lambda output: output.loss,
            "unet": unet(),
            "fresh_unet": unet(),
            "pipe": pipeline(StableDiffusionPipeline, "unet", unet()),
        }  # fmt: skip

    def run(self, code, line, page):
        """Run a block; base models are fresh, as they are for a reader who takes the block alone."""
        self.names |= {"base": models.llama(), "base_model": models.llama()}
        if isinstance(self.names["model"], peft.PeftModel) and "get_peft_model(model" in code:
            self.names["model"] = models.llama()
        exec(compile("\n" * line + code, str(page), "exec"), self.names)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub: any model is a tiny one, and an adapter that was pushed can be loaded."""
    monkeypatch.chdir(tmp_path)
    with Path("rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((f"w{i} w1", "ab"[i % 2]) for i in range(20))])
    (tmp_path / "llama").mkdir()
    models.llama().save_pretrained(tmp_path / "llama")

    def causal(name, quantization_config=None, **_):
        return transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "llama", quantization_config=quantization_config, device_map={"": "cpu"}
        )

    def classifier(name, num_labels=2, **_):
        return models.build(
            transformers.BertForSequenceClassification,
            transformers.BertConfig(
                vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=24, num_labels=num_labels,
            ),
        )  # fmt: skip

    config = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", causal)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", classifier)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer())
    monkeypatch.setattr(
        transformers.AutoConfig,
        "from_pretrained",
        lambda name, **options: config(tmp_path / "llama", **options),
    )

    small = {"max_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none"}
    sft_config = trl.SFTConfig
    monkeypatch.setattr(
        trl, "SFTConfig", lambda folder, **options: sft_config(folder, **{**options, **small})
    )

    def push(model, repo_id, **_):
        model.save_pretrained(tmp_path / repo_id)

    monkeypatch.setattr(peft_subspace, "push_to_hub", push, raising=False)
    return tmp_path


@pytest.mark.filterwarnings(
    "ignore"
)  # small models and few steps are warned of; what is tested is that it runs
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page, hub):
    if page.stem == "adding_a_method":
        pytest.skip("tests/test_worked_example.py runs it")
    reader = Page(hub)
    for line, code in blocks(page):
        reader.run(code, line, page)


def slug(heading):
    """The anchor that GitHub and MkDocs give a heading."""
    return (
        re.sub(r"[^\w -]", "", re.sub(r"`|\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        .strip()
        .replace(" ", "-")
        .lower()
    )


@every_page
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)", text_of(linked), re.M) if heading else []
        assert not heading or heading in map(slug, headings), target
