"""Fine-tune a pretrained network with a subspace method: train, save, reload, check, export, plot.

Commands:
    python examples/finetune.py --demo digits     or `make demo`
    python examples/finetune.py --demo bbcnews    or `make demo-text`
    python examples/finetune.py --task text-classification --model MODEL --dataset DATASET --method flora

In several processes: `accelerate launch --config_file examples/launch/ddp.yaml examples/finetune.py …`; the
heads of the files in `examples/launch` say more.

The demos read their networks and data out of installed packages (`examples/data-packages.txt`) and need no
network. A fixed seed holds out the test rows; the settings below were chosen on the validation rows.

Minutes and expected accuracies: the table "Demos" in README.md, written by examples/benchmarks/demos.py.
"""

import argparse
import json
import os
from pathlib import Path

METHODS = {  # --method: the config class in peft_subspace
    "effort": "EffortConfig",
    "flora": "FLoRAConfig",
    "mos": "MoSConfig",
    "lora-sb": "LoRASBConfig",
    "continual-svd": "ContinualSVDConfig",
}
DEMOS = {  # --demo: the settings that differ from the defaults below
    "digits": {"task": "image-classification", "epochs": 8, "learning_rate": 5e-3, "batch_size": 32},
    "bbcnews": {"task": "text-classification", "epochs": 3, "learning_rate": 3e-3, "batch_size": 16},
}
TASKS = ("text-classification", "image-classification", "causal-lm")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a demo's own settings replace the defaults, explicit options replace both."""
    parser = _parser()
    demo = parser.parse_known_args(arguments)[0].demo
    parser.set_defaults(**DEMOS.get(demo, {}))
    options = parser.parse_args(arguments)
    if options.demo and (options.model or options.dataset):
        parser.error("--demo brings its own model and dataset; leave out --model and --dataset")
    if not options.demo and not (options.model and options.dataset and options.task):
        parser.error("give --demo, or --task, --model and --dataset")
    options.output = options.output or Path("outputs") / (options.demo or Path(options.model).name)
    return options


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    _add_source(parser.add_argument_group("what to train on"))
    _add_method(parser.add_argument_group("method"))
    _add_training(parser.add_argument_group("training"))
    _add_result(parser.add_argument_group("result"))
    return parser


def _add_source(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--demo", choices=sorted(DEMOS), help="a ready-made run that needs no network")
    group.add_argument("--task", choices=TASKS, help="what the model is to do")
    group.add_argument("--model", help="model id on the Hub, or a local directory")
    group.add_argument("--dataset", help="dataset id on the Hub, or a local directory")
    group.add_argument("--dataset-config", help="name of the dataset's configuration, if it has several")
    group.add_argument("--train-split", default="train", help="split to train on")
    group.add_argument(
        "--test-split", help="split to test on; without it, a tenth of the training split is held out"
    )
    group.add_argument("--text-column", default="text", help="column with the text")
    group.add_argument("--image-column", default="image", help="column with the image")
    group.add_argument("--label-column", default="label", help="column with the class")
    group.add_argument("--max-length", type=int, default=128, help="tokens kept of each text")


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--method", choices=sorted(METHODS), default="flora", help="fine-tuning method")
    group.add_argument("--rank", type=int, help="rank of the update; without it, the method's default")
    group.add_argument(
        "--target-modules",
        help="regex of the modules to adapt; without it, all linear and convolution layers",
    )
    group.add_argument(
        "--config", type=json.loads, default={}, metavar="JSON", help="further fields of the method's config"
    )
    group.add_argument(
        "--quantize", choices=("4bit", "8bit"), help="load the base model quantised by bitsandbytes"
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=float, default=3.0, help="passes over the training rows")
    group.add_argument("--max-steps", type=int, default=-1, help="stop after this many steps; -1 means never")
    group.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    group.add_argument("--weight-decay", type=float, default=0.01, help="weight decay of AdamW")
    group.add_argument("--batch-size", type=int, default=16, help="rows in one step")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the new head and of the order of rows; splits do not depend on it",
    )


def _add_result(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output", type=Path, help="directory to write to; without it, outputs/NAME")
    group.add_argument(
        "--skip-checks",
        action="store_true",
        help="do not reload what was saved (saves a second copy of the base in memory)",
    )
    group.add_argument("--push-to-hub", metavar="REPO", help="upload the adapter to this Hub repository")


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    if options.demo:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or busy machines take many times as long
    # Imported late: `--help` answers at once, and the libraries read these variables when imported.
    from support import demos, hub, run

    task = demos.TASKS[options.demo]() if options.demo else hub.load(options)
    run.fine_tune(task, options, METHODS[options.method])


if __name__ == "__main__":
    main()
