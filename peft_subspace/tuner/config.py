"""Configuration fields that the methods share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from peft_subspace.core.delta import Update
from peft_subspace.core.errors import error_context
from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.core.speed import scaling_as_fast_as_lora
from peft_subspace.core.validation import check_count, invalid
from peft_subspace.heads import check_heads
from peft_subspace.runtime.files import atomic_write
from peft_subspace.tuner import callers
from peft_subspace.tuner.config_checks import check_common_fields, check_patterned
from peft_subspace.tuner.patterns import is_named, look_up, patterns_of
from peft_subspace.tuner.registry import peft_type

VERSION = version("peft-subspace")

_LARGEST_RANK = 2**20  # no weight has more

FORMAT_VERSION = 2
"""Version of the files that the package writes; from 2 on they leave out what only further training needs."""

IN_FILES_ONLY = ("initialized", "frozen_file")
"""Fields that say what is in the files of an adapter."""

saved_without: ContextVar[str | None] = ContextVar("saved_without", default=None)
"""Hash of the file that holds the frozen tensors, while adapters are saved without these."""


def written_by_library(default: Any) -> Any:
    """Field that holds state of an adapter: last in the signature, and not shown."""
    return field(default=default, kw_only=True, repr=False)


@dataclass
class SubspaceConfig(PeftConfig):
    """Fields of every method's configuration.

    Args:
        r: Rank of the update; what it ranks is the method's.
        target_modules: Modules to adapt: a list of names or suffixes, a regular expression, `"all-linear"`,
            or `None` for PEFT's default choice where it knows the architecture.
        exclude_modules: Modules to leave out, as a list of names or suffixes, or a regular expression.
        target_parameters: Parameters to adapt by name or suffix, such as
            `["experts.gate_up_proj", "experts.down_proj"]`, the stacked weights of fused experts, or
            `["attention.in_proj_weight"]`. Without `target_modules` nothing else is adapted.
        layers_to_transform: Index, or indices, of the blocks to adapt; all if `None`.
        layers_pattern: Name of the module list that holds the blocks, if it is not recognized.
        rank_pattern: Ranks of single modules, by name or regular expression, in place of `r`.
        heads: Heads in the place of linear classifiers, by the names of these, which need not be in
            `modules_to_save`: `{"classifier": {"kind": "grassmann", "classes": 100, "r": 8}}`, or of kind
            `"equiangular"`. See `GrassmannHead` and `EquiangularHead`.
        modules_to_save: Modules besides the adapter that are trained in full and saved with it.
        trainable_token_indices: Token indices to train in the embedding, as a list, or by name of the
            embedding.
        bias: `"none"`, `"all"`, or the method's own `"…_only"` to train the biases of the adapted modules.
        init_weights: `True` for the method's default initialization, the name of another one, or `False` for
            a random update that is about as large as that of PEFT's LoRA (useful in tests).
        scaling: Factor `s` before the update. `"auto"` takes, from shapes alone, the one with which AdamW
            moves the update as fast as PEFT's LoRA with its defaults, so that LoRA's learning rates fit;
            where this is unknown it is 1. `"paper"` is the authors' constant. Files of version 0.1 keep it.
        keep_zeros: Whether the update is `ΔW ⊙ (W ≠ 0)`, so that a pruned base model stays pruned: zeros and
            N:M patterns survive training and merging. Nothing is stored for it. Each step then forms `ΔW`,
            and no LoRA is equal to the adapter.
        seed: Seed of this adapter's random initialization; `None` follows `torch.manual_seed` without drawing
            from the global generator.
        initialized: Written by the library, into files alone: the tensors are there, so that nothing is
            computed from the base weight for them.
        frozen_file: Written by the library, into files alone: hash of the file that has the frozen tensors.
        zeros: Written by the library: the zeros of the base weights that `keep_zeros` is for.
        peft_subspace_version: Written by the library: version of the package that made the config.
        format_version: Written by the library: version of the file format.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.
    """

    peft_type_name: ClassVar[str]
    init_choices: ClassVar[tuple[str, ...]] = ()
    bounded_rank: ClassVar[bool] = False
    """Whether the rank of a weight limits `r`, which is lowered to it there."""
    values_of_sums: ClassVar[Mapping[str, Any]] = {"scaling": 1.0}
    """Fields that the result of `add_weighted_adapter` has at a value of its own."""
    on_save: ClassVar[list[Callable[[Path, SubspaceConfig], None]]] = []
    """Called, with the folder, when a config has been saved."""

    trained = 0  # trainable parameters of the adapter that was made with this object; no field
    number = 0  # place of the adapter among those of its model, which seeds its initialization; no field
    source = None  # folder that the config was read from, in an object that was; no field

    r: Any = field(default=8)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    target_parameters: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    modules_to_save: list[str] | None = field(default=None)
    heads: dict[str, dict[str, Any]] = field(default_factory=dict, kw_only=True)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    bias: str = field(default="none")
    init_weights: bool | str = field(default=True)
    scaling: float | str = field(default="auto", kw_only=True)
    keep_zeros: bool = field(default=False, kw_only=True)
    seed: int | None = field(default=None)
    initialized: bool = field(default=False, kw_only=True, repr=False, compare=False)
    frozen_file: str | None = field(default=None, kw_only=True, repr=False, compare=False)
    zeros: str | None = field(default=None, kw_only=True, repr=False, compare=False)
    peft_subspace_version: str | None = written_by_library(None)
    format_version: int = written_by_library(FORMAT_VERSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = callers.folder_of_config()
        self.peft_type = peft_type(self.peft_type_name)
        self.peft_subspace_version = self.peft_subspace_version or VERSION
        if self.format_version == 1 and self.scaling == "auto":
            self.scaling = "paper"
        check_heads(self.heads)
        check_common_fields(self, FORMAT_VERSION, VERSION)
        if self.heads:
            self.modules_to_save = sorted({*(self.modules_to_save or ()), *self.heads})
        for key, rank in check_patterned(self, "rank_pattern"):
            self.check_rank(f"rank_pattern[{key!r}]", rank)
        self.check_rank("r", self.r)
        if self.seed is not None:
            check_count("seed", self.seed, minimum=0, maximum=2**64 - 1)

    @property
    def frozen(self) -> bool:
        """Whether the adapter stays as it is even while it is active."""
        return False

    @property
    def for_inference(self) -> bool:
        """Whether the adapter comes from a file and is not trained, so that it needs nothing for that."""
        return self.initialized and self.format_version > 1 and (self.inference_mode or self.frozen)

    @property
    def penalty_weights(self) -> dict[str, float]:
        """Weights of the loss terms by name."""
        return {}

    @property
    def earlier(self) -> dict[str, str]:
        """Adapters that this one follows, with how each was kept, which is one of `HISTORIES`."""
        return {}

    @property
    def lower_adapters(self) -> list[str]:
        """Adapters whose updates are a part of the weight that this one starts from."""
        return [name for name, kept in self.earlier.items() if kept == "stack"]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, but for those that only files have."""
        return {name: value for name, value in super().to_dict().items() if name not in IN_FILES_ONLY}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config, marked as that of an adapter whose tensors are there."""
        folder = Path(save_directory)
        with atomic_write(folder / CONFIG_NAME) as partial:
            super().save_pretrained(str(partial.parent), **kwargs)
            marks = {"initialized": True, "frozen_file": saved_without.get()}
            saved = json.loads(partial.read_text()) | {k: v for k, v in marks.items() if v is not None}
            partial.write_text(json.dumps(saved, indent=2, sort_keys=True))
        for call in self.on_save:
            call(folder, self)

    def check_rank(self, name: str, rank: Any) -> None:
        """Raise unless `rank` is a rank that some layer could have."""
        check_count(name, rank, maximum=_LARGEST_RANK)

    def rank_for(self, module_name: str) -> Any:
        """Rank of one module: its entry in `rank_pattern`, else `r`."""
        return look_up(self.rank_pattern, module_name, self.r)

    def scaling_for(self, update: Update) -> float:
        """Factor before the update of one module: `scaling`, or what that stands for."""
        if self.scaling == "auto":
            return scaling_as_fast_as_lora(update.shape, update.speed())
        return 1.0 if self.scaling == "paper" else float(self.scaling)

    def of_sum(self, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Fields under which the result of `add_weighted_adapter` is created again.

        Args:
            entries: For each module, its value by the name of a pattern.
        """
        fields = {field for values in entries.values() for field in values}
        patterns = {
            field: patterns_of({name: values[field] for name, values in entries.items()}) for field in fields
        }
        return {**self.values_of_sums, **patterns}

    def spec_for(self, module_name: str, shape: WeightShape) -> ModuleSpec:
        """What the config asks for on one weight.

        Raises:
            ValueError: If the weight cannot hold it.
        """
        rank = self.rank_for(module_name)
        if not self.bounded_rank or rank <= shape.full_rank:
            return ModuleSpec(module_name, shape, rank)
        if is_named(self.rank_pattern, module_name):
            rule = (
                f"exceeds {shape.full_rank}, the rank of a weight of shape {shape.dims}; lower rank_pattern"
            )
            raise invalid("r", rank, rule)
        return ModuleSpec(module_name, shape, shape.full_rank, lowered=True)

    def specs(self, shapes: Mapping[str, WeightShape]) -> dict[str, ModuleSpec]:
        """What the config asks for on all targeted weights, of which each may depend on the others.

        Raises:
            ValueError: If a weight cannot hold it; the message names the module.
        """
        specs = {}
        for name, shape in shapes.items():
            with error_context(name):
                specs[name] = self.spec_for(name, shape)
        return specs
