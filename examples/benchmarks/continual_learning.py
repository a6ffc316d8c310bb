"""Learn one text classification task after another, and see what is forgotten.

Commands:
    python examples/benchmarks/continual_learning.py
    python examples/benchmarks/continual_learning.py --data FOLDER --tasks agnews sst2 trec6
    python examples/benchmarks/continual_learning.py --model MODEL --tasks fancyzhx/ag_news stanfordnlp/sst2

Continual SVD is compared with sequential LoRA, O-LoRA, sequential full fine-tuning, PEFT's OSF (merged
between tasks), the head alone, and joint training, the upper bound. All have one head with a row for every
class of every task; a task's loss compares the task's own classes. Accuracy is reported twice: with the task
known at test time, when the prediction is one of its classes, and with one shared head, when it may be any
class. Learning rates are chosen with the first order and seed 0, on rows held out of the training data: from
three, and from more while the best is the smallest or largest of those tried. Head and update share one rate;
with `--own-head-rate`, which all methods do better with, heads train with the rate that is best for the head
alone. An interrupted run goes on where it stopped.

Without options, network and texts come out of installed packages (`examples/data-packages.txt`), and the
tasks are pairs of BBC News topics. `FOLDER` holds NAME.train.jsonl.gz and NAME.test.jsonl.gz with rows
{"text": …, "label": …}; without it, tasks are datasets of the Hub with columns text and label.

Minutes and expected result: the table in model_cards/continual-svd.md, by the settings that
examples/benchmarks/results/continual_tasks.json names.
"""

import argparse
import os
from pathlib import Path

METHODS = ("head", "continual-svd", "continual-svd-16", "lora", "o-lora", "full", "osf", "joint")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    _add_data(parser.add_argument_group("network and tasks"))
    _add_training(parser.add_argument_group("training and comparison"))
    options = parser.parse_args(arguments)
    if (options.data or options.model) and not options.tasks:
        parser.error("give --tasks with --data or --model")
    options.results = options.results or options.output / "results.json"
    return options


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", help="BERT or Llama, of the Hub or a directory; without it, a packaged MiniLM"
    )
    group.add_argument("--data", type=Path, metavar="FOLDER", help="folder with the tasks' files")
    group.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="names of files or datasets")
    group.add_argument(
        "--orders", nargs="+", default=[], metavar="A,B,…", help="orders of the tasks; without it, as given"
    )
    group.add_argument("--train-rows", type=int, default=300, help="rows to train on, of each task")
    group.add_argument("--validation-rows", type=int, default=100, help="rows to choose the rate on")
    group.add_argument("--test-rows", type=int, default=200, help="rows to test on")
    group.add_argument("--max-length", type=int, default=48, help="tokens kept of each text")


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["continual-svd", "lora"],
        metavar="METHOD",
        help=f"methods to compare, of {', '.join(METHODS)}",
    )
    group.add_argument("--preserve", type=float, default=0.5, help="share of directions that is protected")
    group.add_argument("--seeds", type=int, default=1, help="runs of every order with the chosen rate")
    group.add_argument(
        "--own-head-rate",
        action="store_true",
        help="train heads with the rate that is best for the head alone",
    )
    group.add_argument("--epochs", type=int, default=3, help="passes over the rows of each task")
    group.add_argument("--batch-size", type=int, default=16, help="rows in one step")
    group.add_argument("--bf16", action="store_true", help="train and test with bfloat16 autocast")
    group.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    group.add_argument("--no-prediction", action="store_true", help="start without predicting the hours")
    group.add_argument(
        "--output", type=Path, default=Path("outputs/continual_learning"), help="for all files"
    )
    group.add_argument("--results", type=Path, help="results file; without it, results.json in --output")


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or busy machines take many times as long
    if options.model is None:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    # Imported late: `--help` answers at once, and the libraries read these variables when imported.
    from support import sequences

    sequences.run(options)


if __name__ == "__main__":
    main()
