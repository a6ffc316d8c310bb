"""Inspection, export and merging of adapters from the command line.

python -m peft_subspace inspect ADAPTER [OTHER] [--base MODEL] [--plot adapter.png]
python -m peft_subspace export ADAPTER --lora FOLDER [--base MODEL]
python -m peft_subspace merge A B … --method ties --density 0.2 (--lora FOLDER --rank 32 | --model FOLDER)

The commands need the config of the base model, by default of the one that an adapter names, and its weights
only for full checkpoints and merged models.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from .merging import Merge, merge
from .persistence.lora_export import export_lora
from .tools.inspection import LayerUpdate, Overlap, layer_overlaps, layer_updates
from .tools.plots import save_plot
from .tools.read_adapter import read_adapter
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
    inspect = commands.add_parser("inspect", help="ranks, counts, norms, spectra and overlap of adapters")
    inspect.add_argument("adapter", help="folder of an adapter, or its id on the Hub")
    inspect.add_argument("other", nargs="?", help="adapter to compare it with")
    inspect.add_argument("--plot", metavar="FILE", help="write a picture of the spectra and of the overlap")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser("export", help="write an adapter as a plain LoRA")
    export.add_argument("adapter", help="folder of an adapter, or its id on the Hub")
    export.add_argument("--lora", metavar="FOLDER", required=True, help="folder to write")
    export.set_defaults(run=_export)
    merging = commands.add_parser("merge", help="make one adapter, or one model, of several")
    merging.add_argument("adapters", nargs="+", help="folders of adapters, or of full checkpoints")
    merging.add_argument("--method", default="task_arithmetic", help="name of the method")
    merging.add_argument("--weights", help="weights of the adapters, separated by commas")
    merging.add_argument("--density", type=float, help="part of the entries that stays")
    merging.add_argument("--scale", type=float, default=1.0, help="factor of the merged update")
    merging.add_argument("--space", choices=("weight", "aligned"), default="weight", help="where entries are")
    merging.add_argument("--seed", type=int, default=0, help="seed of methods that draw")
    merging.add_argument("--others", default="error", help="whose heads and biases are kept, or 'drop'")
    merging.add_argument("--rank", type=int, help="rank to cut the LoRA to")
    merging.add_argument("--energy", type=float, help="part of the squared norm to keep instead")
    merging.add_argument("--dry-run", action="store_true", help="tell sizes, and write nothing")
    written = merging.add_mutually_exclusive_group(required=True)
    written.add_argument("--lora", metavar="FOLDER", help="folder of the LoRA to write")
    written.add_argument("--model", metavar="FOLDER", help="folder of the merged model to write")
    merging.set_defaults(run=_merge)
    for command in (inspect, export, merging):
        default = "by default the model that the adapter names"
        command.add_argument("--base", metavar="MODEL", help=f"folder or id of the base model, {default}")
    return parser


def _inspect(options: argparse.Namespace) -> None:
    model = read_adapter(options.adapter, options.base)
    updates, overlaps = layer_updates(model), None
    print(f"{_summary(options.adapter, model)}\n\n{_update_table(updates)}")
    if options.other:
        other = read_adapter(options.other, options.base)
        overlaps = layer_overlaps(model, other)
        print(f"\noverlap with {_summary(options.other, other)}\n\n{_overlap_table(overlaps)}")
    if options.plot:
        save_plot(options.plot, updates, overlaps)
        print(f"\npicture: {options.plot}")


def _export(options: argparse.Namespace) -> None:
    export_lora(read_adapter(options.adapter, options.base), options.lora)
    print(f"LoRA: {options.lora}")


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
        **given,
    )
    if options.dry_run:
        print(aligned([["module", "rank", "rows", "columns"], *map(_planned(made), made.modules)]))
    elif options.lora:
        made.to_lora(options.lora, options.rank, options.energy)
        print(f"{aligned(_merge_table(made))}\n\nLoRA: {options.lora}")
    else:
        made.to_model(options.model)
        print(f"model: {options.model}")


def _planned(made: Merge) -> Callable[[str], list[str]]:
    """Row of a module: the rank of the exact sum, and the size of its weight."""

    def row(module: str) -> list[str]:
        pairs = [source.pair(module) for source in made.sources if module in source.modules]
        columns = pairs[0][1][0].numel()
        return [module, str(sum(left.shape[1] for left, _ in pairs)), str(len(pairs[0][0])), str(columns)]

    return row


def _merge_table(made: Merge) -> list[list[str]]:
    rows = [["module", "rank", "norm", "error of the cut"]]
    return rows + [[n, str(r.rank), f"{r.norm:.4g}", f"{r.error:.3g}"] for n, r in made.report.items()]


def _summary(path: str, model: PeftModel) -> str:
    """Two lines: what the adapter is, and how large."""
    config: Any = model.peft_config["default"]
    trained = sum(p.numel() for name, p in model.named_parameters() if ".default." in f"{name}.")
    saved = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    ranks = f"r={config.r}" + (f", rank_pattern={config.rank_pattern}" if config.rank_pattern else "")
    return (
        f"{path}: {config.peft_type.value}, {ranks}, on {config.base_model_name_or_path}\n"
        f"{trained:,} trainable parameters, {sum(tensor.numel() for tensor in saved):,} numbers in the file; "
        f"written by peft_subspace {config.peft_subspace_version}, format {config.format_version}"
    )


def _update_table(updates: dict[str, LayerUpdate]) -> str:
    table = [["module", "rank", "trainable", "norm of update", "effective rank", "largest singular value"]]
    for name, update in updates.items():
        trained = f"{update.trained:,}" if update.trained else "shared"
        sizes = f"{update.norm:.4g}", f"{update.effective_rank:.2f}", f"{update.singular_values[0]:.4g}"
        table.append([name, str(update.rank), trained, *sizes])
    return aligned(table)


def _overlap_table(overlaps: dict[str, Overlap]) -> str:
    table = [["module", "cosine", "outputs", "inputs"]]
    for name, overlap in overlaps.items():
        values = (overlap.cosine, overlap.outputs, overlap.inputs)
        table.append([name, *("-" if math.isnan(value) else f"{value:.4f}" for value in values)])
    return aligned(table)


if __name__ == "__main__":
    sys.exit(main())
