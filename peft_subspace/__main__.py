"""Inspection, export and merging of adapters from the command line.

python -m peft_subspace inspect ADAPTER [OTHER] [--base MODEL] [--revision NAME] [--plot adapter.png]
python -m peft_subspace export ADAPTER --lora FOLDER [--base MODEL] [--revision NAME]
python -m peft_subspace merge A B … --method ties --density 0.2 (--lora FOLDER --rank 32 | --model FOLDER)

The commands need the config of the base model, by default of the one that an adapter names, and its weights
only for full checkpoints and merged models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .merging import Merge, merge
from .merging.plan import plan
from .persistence.lora_export import export_lora
from .tools.read_adapter import read_adapter
from .tools.report import inspect
from .tools.tables import aligned


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 with one line on standard error if it fails for a known reason."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m peft_subspace", description="Inspect, export and merge adapters"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspecting = commands.add_parser("inspect", help="ranks, counts, norms, spectra and overlap of adapters")
    export = commands.add_parser("export", help="write an adapter as a plain LoRA")
    for command in (inspecting, export):
        command.add_argument("adapter", help="folder of an adapter, or its id on the Hub")
        command.add_argument("--revision", help="branch, tag or commit of ADAPTER on the Hub")
        command.add_argument("--subfolder", help="folder of ADAPTER in its repository")
    inspecting.add_argument("other", nargs="?", help="adapter to compare it with")
    inspecting.add_argument("--plot", metavar="FILE", help="write a picture of spectra and overlap")
    inspecting.set_defaults(run=_inspect)
    export.add_argument("--lora", metavar="FOLDER", required=True, help="folder to write")
    export.set_defaults(run=_export)
    merging = commands.add_parser("merge", help="make one adapter, or one model, of several")
    merging.add_argument(
        "adapters", nargs="+", help="folders of adapters or checkpoints, adapters on the Hub"
    )
    merging.add_argument("--method", default="task_arithmetic", help="name of the method")
    merging.add_argument("--weights", help="weights of the adapters, separated by commas")
    merging.add_argument("--density", type=float, help="part of the entries that stays")
    merging.add_argument("--scale", type=float, default=1.0, help="factor of the merged update")
    merging.add_argument("--space", choices=("weight", "aligned"), default="weight", help="where entries are")
    merging.add_argument("--seed", type=int, default=0, help="seed of methods that draw")
    merging.add_argument("--others", default="error", help="whose heads and biases are kept, or 'drop'")
    rows = "'common' where vocabularies differ: the rows that all have"
    merging.add_argument("--rows", choices=("error", "common"), default="error", help=rows)
    merging.add_argument("--rank", type=int, help="rank to cut the LoRA to")
    merging.add_argument("--energy", type=float, help="part of the squared norm to keep instead")
    merging.add_argument("--dry-run", action="store_true", help="tell sizes, and write nothing")
    written = merging.add_mutually_exclusive_group(required=True)
    written.add_argument("--lora", metavar="FOLDER", help="folder of the LoRA to write")
    written.add_argument("--model", metavar="FOLDER", help="folder of the merged model to write")
    merging.set_defaults(run=_merge)
    for command in (inspecting, export, merging):
        default = "by default the model that the adapter names"
        command.add_argument("--base", metavar="MODEL", help=f"folder or id of the base model, {default}")
    return parser


def _inspect(options: argparse.Namespace) -> None:
    found = inspect(options.adapter, options.other, base=options.base, **_place(options))
    print(found)
    if options.plot:
        found.save_plot(options.plot)
        print(f"\npicture: {options.plot}")


def _export(options: argparse.Namespace) -> None:
    export_lora(read_adapter(options.adapter, options.base, **_place(options)), options.lora)
    print(f"LoRA: {options.lora}")


def _place(options: argparse.Namespace) -> dict[str, str]:
    given = {name: getattr(options, name) for name in ("revision", "subfolder")}
    return {name: value for name, value in given.items() if value is not None}


def _merge(options: argparse.Namespace) -> None:
    weights = None if options.weights is None else [float(weight) for weight in options.weights.split(",")]
    given = {} if options.density is None else {"density": options.density}
    made = merge(
        options.adapters,
        options.method,
        weights=weights,
        scale=options.scale,
        space=options.space,
        base=options.base,
        seed=options.seed,
        others=options.others,
        rows=options.rows,
        **given,
    )
    if options.dry_run:
        planned = plan(made, options.rank)
        rows = [[name, str(planned.ranks[name]), *map(str, shape)] for name, shape in planned.shapes.items()]
        print(aligned([["module", "rank", "rows", "columns"], *rows]))
        sizes = f"LoRA {planned.lora_bytes / 2**20:.1f} MiB, peak {planned.peak_bytes / 2**20:.1f} MiB"
        print(f"\n{len(rows)} modules; {sizes} of memory; about {planned.seconds:.0f} s")
    elif options.lora:
        made.to_lora(options.lora, options.rank, options.energy)
        print(f"{aligned(_merge_table(made))}\n\nLoRA: {options.lora}")
    else:
        made.to_model(options.model)
        print(f"model: {options.model}")


def _merge_table(made: Merge) -> list[list[str]]:
    rows = [["module", "rank", "norm", "error of the cut"]]
    return rows + [[n, str(r.rank), f"{r.norm:.4g}", f"{r.error:.3g}"] for n, r in made.report.items()]


if __name__ == "__main__":
    sys.exit(main())
