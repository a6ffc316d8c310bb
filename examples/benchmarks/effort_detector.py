"""Train a detector of generated images with Effort, and see whether it finds generators it has never seen.

Commands:
    python examples/benchmarks/effort_detector.py
    python examples/benchmarks/effort_detector.py --images PHOTOS --image-size 112 --model MODEL
    python examples/benchmarks/effort_detector.py --images PHOTOS --train-on shuffle vae --seeds 5

The real class is a folder of photos, the generated class what small generators of several families make of
them (support/generators.py). A detector learns from one family and is tested on all. Effort is
compared with LoRA, full fine-tuning and a linear probe, each with the learning rate that does best on
validation images of the training family. Without options, network and photos come out of installed packages
(`examples/benchmark-packages.txt`). An interrupted run goes on where it stopped.

Time: predicted and printed before the first detector trains. Expected result: the table in
model_cards/effort.md, measured on a folder of CIFAR-10 images with these options:

    --images CIFAR10 --outside GENIMAGE --bf16 --steps 40 --batch-size 16 --seeds 5
    --train-images 400 --validation-images 64 --test-images 64 --train-on transposed diffusion vae
    --methods probe effort lora-1 lora-16 full effort-losses
"""

import argparse
import os
from pathlib import Path

FAMILIES = ("transposed", "nearest", "shuffle", "vae", "adversarial", "diffusion")
METHODS = ("effort", "effort-losses", "lora-1", "lora-16", "full", "probe")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    _add_data(parser.add_argument_group("network and images"))
    _add_training(parser.add_argument_group("training and comparison"))
    options = parser.parse_args(arguments)
    options.results = options.results or options.output / "results.json"
    return options


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="vision model of the Hub or a directory; without it, a packaged CLIP")
    group.add_argument("--images", type=Path, help="folder of photos; without it, tiles of packaged ones")
    group.add_argument("--outside", type=Path, help="folder of files named real… and fake…, tested as well")
    group.add_argument("--pixels", type=int, default=32, help="size at which images are generated")
    group.add_argument("--image-size", type=int, default=64, help="size at which the network sees them")
    group.add_argument("--train-images", type=int, default=600, help="photos to train a detector on")
    group.add_argument("--validation-images", type=int, default=100, help="photos to choose its rate on")
    group.add_argument("--test-images", type=int, default=100, help="photos to test it on")
    group.add_argument("--generator-images", type=int, default=8000, help="photos to train generators on")
    group.add_argument("--generator-steps", type=int, default=400, help="steps of 32 photos for each")


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--train-on",
        nargs="+",
        choices=FAMILIES,
        default=["transposed"],
        metavar="FAMILY",
        help=f"families to train on, one at a time, of {', '.join(FAMILIES)}",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["effort", "lora-1", "full", "probe"],
        metavar="METHOD",
        help=f"methods to compare, of {', '.join(METHODS)}",
    )
    group.add_argument("--seeds", type=int, default=1, help="runs with the chosen learning rate")
    group.add_argument("--steps", type=int, default=50, help="training steps of a detector")
    group.add_argument("--batch-size", type=int, default=32, help="images in one step, half of them real")
    group.add_argument("--bf16", action="store_true", help="train and test with bfloat16 autocast")
    group.add_argument("--output", type=Path, default=Path("outputs/effort_detector"), help="for all files")
    group.add_argument("--results", type=Path, help="results file; without it, results.json in --output")


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or busy machines take many times as long
    if options.model is None:
        os.environ.update(HF_HUB_OFFLINE="1")
    # Imported late: `--help` answers at once, and the libraries read these variables when imported.
    from support import comparison

    comparison.run(options)


if __name__ == "__main__":
    main()
