"""Configuration fields that the methods share, and all validation that needs no layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from peft_subspace.core.validation import check_count, check_flag, check_number, invalid
from peft_subspace.runtime.files import atomic_write
from peft_subspace.tuner.patterns import MOST_ENTRIES, check_patterns, look_up
from peft_subspace.tuner.registry import peft_type

VERSION = version("peft-subspace")


FORMAT_VERSION = 1

"""Version of the files that the package writes; a reader refuses newer ones."""


@dataclass
class SubspaceConfig(PeftConfig):
    """Fields of every method's configuration.

    Args:
        r: Rank of the update; what it ranks is the method's.
        target_modules: Modules to adapt: a list of names or suffixes, a regular expression, `"all-linear"`,
            or `None` for PEFT's default choice where it knows the architecture.
        exclude_modules: Modules to leave out, as a list of names or suffixes, or a regular expression.
        target_parameters: Parameters to adapt that are no layer's weight, by name or suffix, such as
            `["experts.gate_up_proj", "experts.down_proj"]`: the stacked weights of fused experts. Without
            `target_modules` nothing else is adapted. Not all methods can.
        layers_to_transform: Index, or indices, of the blocks to adapt; all if `None`.
        layers_pattern: Name of the module list that holds the blocks, if it is not recognised.
        rank_pattern: Ranks of single modules, by name or regular expression, in place of `r`.
        modules_to_save: Modules besides the adapter that are trained in full and saved with it.
        trainable_token_indices: Token indices to train in the embedding, as a list, or by name of the
            embedding.
        bias: `"none"`, `"all"`, or the method's own `"…_only"` to train the biases of the adapted modules.
        init_weights: `True` for the method's default start, the name of another one, or `False` for a start
            that changes the output (useful in tests).
        seed: Seed of this adapter's random initialisation; `None` follows `torch.manual_seed` without drawing
            from the global generator.
        initialized: Whether the adapter's tensors come from a file, so that nothing is computed from the base
            weight for them. Set in saved configs.
        peft_subspace_version: Version of the package that made the config; filled in.
        format_version: Version of the file format; filled in.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.
    """

    peft_type_name: ClassVar[str]
    adapts_parameters: ClassVar[bool] = False
    init_choices: ClassVar[tuple[str, ...]] = ()
    on_save: ClassVar[list[Callable[[Path, SubspaceConfig], None]]] = []
    trained = 0  # numbers that train, of the adapter that was made with this object; no field

    r: Any = field(default=8)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    target_parameters: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    modules_to_save: list[str] | None = field(default=None)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    bias: str = field(default="none")
    init_weights: bool | str = field(default=True)
    seed: int | None = field(default=None)
    initialized: bool = field(default=False)
    peft_subspace_version: str | None = field(default=None)
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.peft_type_name)
        self.peft_subspace_version = self.peft_subspace_version or VERSION
        self._check_parameters()
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, list | tuple) and all(isinstance(entry, Hashable) for entry in names):
                setattr(self, name, set(names))
        self._check_types()
        self._check_format()
        self._check_targets()
        self._check_choices()
        for key, rank in self._patterns("rank_pattern"):
            self.check_rank(f"rank_pattern[{key!r}]", rank)
        self.check_rank("r", self.r)
        if self.seed is not None:
            check_count("seed", self.seed, minimum=0, maximum=2**64 - 1)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config, marked as that of a finished adapter, and call the functions in `on_save`.

        PEFT writes the config last, so that all other files of the adapter are there when they are called.
        """
        finished = replace(self, initialized=True)
        with atomic_write(Path(save_directory) / CONFIG_NAME) as partial:
            super(SubspaceConfig, finished).save_pretrained(str(partial.parent), **kwargs)
        for function in self.on_save:
            function(Path(save_directory), self)

    def check_rank(self, name: str, rank: Any) -> None:
        """Raise unless `rank` is a rank that some layer could have."""
        check_count(name, rank)

    def rank_for(self, module_name: str) -> Any:
        """Rank of one module: its entry in `rank_pattern`, else `r`."""
        return look_up(self.rank_pattern, module_name, self.r)

    def scaling_for(self, module_name: str) -> float:
        """Factor before the chain of one module."""
        return 1.0

    def _patterns(self, name: str) -> list[tuple[str, Any]]:
        patterns = getattr(self, name)
        if not isinstance(patterns, dict) or not all(isinstance(key, str) for key in patterns):
            raise invalid(name, patterns, "must map module names or regular expressions to values", TypeError)
        if len(patterns) > MOST_ENTRIES:
            raise ValueError(f"{name} must have at most {MOST_ENTRIES} entries, and has {len(patterns)}")
        check_patterns(name, patterns)
        return list(patterns.items())

    def _check_types(self) -> None:
        """Check what has no rule of its own; PEFT hands these fields on as they are."""
        for name in ("base_model_name_or_path", "revision", "peft_subspace_version", "peft_version"):
            if not isinstance(getattr(self, name), str | None):
                raise invalid(name, getattr(self, name), "must be text, or None", TypeError)
        for name in ("initialized", "inference_mode"):
            check_flag(name, getattr(self, name))
        for name, kind in (("modules_to_save", str), ("layers_pattern", str), ("layers_to_transform", int)):
            entries = getattr(self, name)
            if isinstance(entries, kind | None) and name != "modules_to_save":
                continue
            self._check_entries(name, entries, kind)
        tokens = self.trainable_token_indices
        for name, indices in (tokens if isinstance(tokens, dict) else {"": tokens}).items():
            self._check_entries(f"trainable_token_indices{f'[{name!r}]' if name else ''}", indices, int)

    @staticmethod
    def _check_entries(name: str, entries: Any, kind: type) -> None:
        if entries is None:
            return
        if not isinstance(entries, list | tuple | set) or not all(type(entry) is kind for entry in entries):
            raise invalid(name, entries, f"must be a list of {kind.__name__}", TypeError)
        if len(entries) > MOST_ENTRIES:
            raise ValueError(f"{name} must have at most {MOST_ENTRIES} entries, and has {len(entries)}")
        if kind is int and min(entries, default=0) < 0:
            raise invalid(name, min(entries), "must be at least 0")

    def _check_format(self) -> None:
        check_count("format_version", self.format_version)
        if self.format_version > FORMAT_VERSION:
            raise invalid(
                "format_version",
                self.format_version,
                f"is newer than {FORMAT_VERSION}, the newest that peft_subspace {VERSION} reads; "
                "upgrade peft_subspace",
            )

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, str):
                check_patterns(name, [names], embedded=False)
            elif names is not None:
                rule = "must be a list of module names, or one regular expression"
                if not isinstance(names, set) or not all(isinstance(entry, str) for entry in names):
                    raise invalid(name, names, rule, TypeError)
                self._check_entries(name, names, str)
        patterns = self.layers_pattern or []
        check_patterns("layers_pattern", [patterns] if isinstance(patterns, str) else patterns)
        check_patterns("modules_to_save", self.modules_to_save or [])
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise invalid(
                "layers_to_transform",
                self.layers_to_transform,
                "needs target_modules as a list; name the layers in the regular expression instead",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise invalid(
                "layers_pattern", self.layers_pattern, "needs layers_to_transform as well; set both"
            )

    def _check_parameters(self) -> None:
        names = self.target_parameters
        if names is None:
            return
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise invalid(
                "target_parameters",
                names,
                "must be a list, such as ['experts.down_proj']",
                TypeError,
            )
        if names and not self.adapts_parameters:
            raise invalid(
                "target_parameters",
                names,
                f"cannot be adapted by {type(self).__name__}: its factors belong to one matrix, the weight "
                "of a module, and a stack of experts is many matrices in one parameter; use FLoRAConfig, or "
                "name modules in target_modules",
            )
        self.target_parameters = list(names)
        if names and self.target_modules is None:
            self.target_modules = []

    def _check_choices(self) -> None:
        biases = ("none", "all", f"{self.peft_type_name.lower()}_only")
        if self.bias not in biases:
            raise invalid("bias", self.bias, f"must be one of {biases}")
        if not isinstance(self.init_weights, bool | str) or (
            self.init_weights not in (True, False, *self.init_choices)
        ):
            raise invalid(
                "init_weights", self.init_weights, f"must be one of {(True, False, *self.init_choices)}"
            )


@dataclass
class ScaledConfig(SubspaceConfig):
    """Fields of methods whose branch has a tunable scaling and dropout.

    Args:
        alpha: Numerator of the scaling `alpha / r`.
        alpha_pattern: `alpha` of single modules, by name or regular expression.
        dropout: Probability of dropping an entry (a channel, in a convolution) of the branch's input.
    """

    alpha: float = field(default=8)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha)
        for key, alpha in self._patterns("alpha_pattern"):
            check_number(f"alpha_pattern[{key!r}]", alpha)
        check_number("dropout", self.dropout, minimum=0.0, maximum=1.0)
        if self.dropout and self.target_parameters:
            raise invalid(
                "dropout",
                self.dropout,
                "needs the input of a layer, and target_parameters are updated without it; set dropout=0",
            )

    def scaling_for(self, module_name: str) -> float:
        """`alpha / r` of one module, patterns applied; `r` as configured, before any clamping."""
        rank = self.rank_for(module_name)
        rank = rank if isinstance(rank, int) else rank[0]
        return look_up(self.alpha_pattern, module_name, self.alpha) / rank
