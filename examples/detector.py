"""Train a detector of generated images with Effort, and test it on images of another generator.

    python examples/detector.py --real PHOTOS --generated IMAGES --unseen OTHERS
    python examples/detector.py --real PHOTOS --generated IMAGES --unseen OTHERS --rank 0    # linear probe

The three folders have image files; a fifth of the photos is held out. With CLIP ViT-B/16 and 500 images of
each kind it takes minutes on a GPU. Expect an AUC near 1 on the generator that was seen. On the other compare
with `--rank 0`: in docs/benchmarks/claims.md the probe came out ahead of Effort, LoRA and full fine-tuning.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from PIL import Image
from sklearn.metrics import roc_auc_score
from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

import peft_subspace

OUTPUT = "outputs/detector"
SUFFIXES = (".jpg", ".jpeg", ".png")
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--real", type=Path, required=True, help="folder of photos")
parser.add_argument("--generated", type=Path, required=True, help="folder of a generator's, to train on")
parser.add_argument("--unseen", type=Path, required=True, help="folder of another generator's, to test on")
parser.add_argument("--model", default="openai/clip-vit-base-patch16", help="CLIP of the Hub, or folder")
parser.add_argument("--rank", type=int, default=1, help="singular triples to train; 0 trains the head alone")
parser.add_argument("--epochs", type=float, default=2, help="passes over the images")
options = parser.parse_args()
found = {}
for folder in (options.real, options.generated, options.unseen):
    found[folder] = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
    if len(found[folder]) < 5:
        sys.exit(f"{folder} has {len(found[folder])} image files (.jpg, .jpeg, .png); at least 5 are needed")
try:
    for file in [file for files in found.values() for file in files]:
        Image.open(file).verify()
    if not (kind := AutoConfig.from_pretrained(options.model).model_type).startswith("clip"):
        sys.exit(f"{options.model} has no image tower of CLIP: it is of the type {kind}")
    processor = AutoImageProcessor.from_pretrained(options.model)
    tower = CLIPVisionModel.from_pretrained(options.model)
except (OSError, ValueError) as error:
    sys.exit(f"images or {options.model} cannot be loaded: {str(error).splitlines()[0]}")


class Detector(torch.nn.Module):
    """An image tower, and one logit: how much an image looks generated."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, torch.nn.Linear(tower.config.hidden_size, 1)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> SequenceClassifierOutput:
        """Loss and logits."""
        logits = self.head(self.tower(pixel_values).pooler_output).squeeze(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return SequenceClassifierOutput(loss, logits)


def rows(files: list[Path], label: float) -> list[dict]:
    """Images as the tower wants them. Equal sizes and formats: else the file type gives the answer away."""
    images = (Image.open(file).convert("RGB") for file in files)
    pixels = (processor(image, return_tensors="pt").pixel_values[0] for image in images)
    return [{"pixel_values": each, "labels": torch.tensor(label)} for each in pixels]


real, fake, unseen = (rows(files, float(number > 0)) for number, files in enumerate(found.values()))
train = [*real[len(real) // 5 :], *fake[len(fake) // 5 :]]
tests = {"seen": real[: len(real) // 5] + fake[: len(fake) // 5], "unseen": real[: len(real) // 5] + unseen}

# The smallest singular triples of each weight of the attention train; all larger ones stay.
targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
config = peft_subspace.EffortConfig(r=max(options.rank, 1), target_modules=targets, modules_to_save=["head"])
model = get_peft_model(Detector(tower), config)
for name, parameter in model.named_parameters():
    parameter.requires_grad &= options.rank > 0 or "modules_to_save" in name
arguments = TrainingArguments(
    OUTPUT, num_train_epochs=options.epochs, learning_rate=1e-3, per_device_train_batch_size=16,
    save_strategy="no", report_to="none", remove_unused_columns=False, label_names=["labels"],
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=train)
trainer.train()
model.save_pretrained(OUTPUT)
for name, test in tests.items():
    scores = trainer.predict(test)
    print(f"AUC, {name} generator: {roc_auc_score(scores.label_ids, scores.predictions):.3f}")
