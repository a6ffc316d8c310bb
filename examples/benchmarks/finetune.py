"""The demos by one method, beside a linear probe: what benchmarks/demos.py runs over seeds.

Command: python examples/benchmarks/finetune.py --demo bbcnews --method mos

The demos read their networks and data out of installed packages (`examples/data-packages.txt`) and need no
network. A fixed seed holds out the test rows; the settings below were chosen on the validation rows. To train
on data of your own, copy `examples/text_classification.py` or another of the examples there.
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
    "digits": {"epochs": 8, "learning_rate": 2e-3, "batch_size": 32},
    "bbcnews": {"epochs": 3, "learning_rate": 3e-3, "batch_size": 16},
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a demo's own settings replace the defaults, explicit options replace both."""
    parser = _parser()
    demo = parser.parse_known_args(arguments)[0].demo
    parser.set_defaults(**DEMOS.get(demo, {}))
    options = parser.parse_args(arguments)
    options.output = options.output or Path("outputs") / options.demo
    return options


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--demo", choices=sorted(DEMOS), required=True, help="network and data")
    _add_method(parser.add_argument_group("method"))
    _add_training(parser.add_argument_group("training"))
    _add_result(parser.add_argument_group("result"))
    return parser


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--method", choices=sorted(METHODS), default="flora", help="fine-tuning method")
    group.add_argument("--rank", type=int, help="rank of the update; without it, the method's default")
    group.add_argument(
        "--target-modules",
        help="regex of the modules to adapt; without it, all linear and convolution layers of the body",
    )
    group.add_argument(
        "--config", type=json.loads, default={}, metavar="JSON", help="further fields of the method's config"
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


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or busy machines take many times as long
    # Imported late: `--help` answers at once, and the libraries read these variables when imported.
    from support import demos, run

    task = demos.TASKS[options.demo]()
    run.fine_tune(task, options, METHODS[options.method])


if __name__ == "__main__":
    main()
