"""Run README's quick start with what the package itself depends on, and nothing else.

    python tests/quick_start.py README.md

What its blocks leave to the reader is a tiny model with random weights, and random data.
"""

import re
import sys
from pathlib import Path

import torch
import transformers


def model():
    """Classifier of texts with two layers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertForSequenceClassification(config)


def main(readme: Path) -> None:
    """Run the blocks up to the second, which loads what the first has saved."""
    train, load = re.findall(r"```python\n(# (?:train|load).*?)```", readme.read_text(), re.DOTALL)
    rows = [{"input_ids": torch.randint(40, (8,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    arguments = transformers.TrainingArguments(
        "outputs", use_cpu=True, report_to=[], max_steps=2, disable_tqdm=True
    )
    names = {"Trainer": transformers.Trainer, "arguments": arguments, "data": rows}
    trained = {**names, "model": model()}
    exec(train, trained)  # README's own text
    loaded = {"base_model": model()}
    exec(load, loaded)
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        wanted, found = (m["model"].eval()(input_ids=ids).logits for m in (trained, loaded))
    torch.testing.assert_close(found, wanted)
    where = sys.modules["peft_subspace"].__file__
    print(f"quick start: the adapter that was loaded computes what the trained one does ({where})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
