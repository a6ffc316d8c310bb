"""Checks of the fields that all configurations have, without any layer."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from peft_subspace.core.validation import check_choice, check_count, check_flag, check_number, invalid
from peft_subspace.tuner.frozen_file import is_digest
from peft_subspace.tuner.patterns import MOST_ENTRIES, check_patterns


def check_common_fields(config: Any, newest_format: int, package_version: str) -> None:
    """Raise unless the fields of a `SubspaceConfig` have possible values; lists of names become sets.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.
    """
    _check_parameters(config)
    for name in ("target_modules", "exclude_modules"):
        names = getattr(config, name)
        if isinstance(names, list | tuple) and all(isinstance(entry, Hashable) for entry in names):
            setattr(config, name, set(names))
    _check_types(config)
    _check_format(config, newest_format, package_version)
    _check_targets(config)
    _check_choices(config)


def check_patterned(config: Any, name: str) -> list[tuple[str, Any]]:
    """Entries of a field that maps patterns to values, after checking the patterns."""
    patterns = getattr(config, name)
    if not isinstance(patterns, dict) or not all(isinstance(key, str) for key in patterns):
        raise invalid(name, patterns, "must map module names or regular expressions to values", TypeError)
    if len(patterns) > MOST_ENTRIES:
        raise ValueError(f"{name} must have at most {MOST_ENTRIES} entries, and has {len(patterns)}")
    check_patterns(name, patterns)
    return list(patterns.items())


def _check_types(config: Any) -> None:
    """Check what has no rule of its own; PEFT hands these fields on as they are."""
    for name in ("base_model_name_or_path", "revision", "peft_subspace_version", "peft_version", "zeros"):
        if not isinstance(getattr(config, name), str | None):
            raise invalid(name, getattr(config, name), "must be text, or None", TypeError)
    if config.frozen_file is not None and not is_digest(config.frozen_file):
        raise invalid("frozen_file", config.frozen_file, "must be a hash of 32 hexadecimal digits, or None")
    for name in ("initialized", "inference_mode", "keep_zeros"):
        check_flag(name, getattr(config, name))
    for name, kind in (("modules_to_save", str), ("layers_pattern", str), ("layers_to_transform", int)):
        entries = getattr(config, name)
        if isinstance(entries, kind | None) and name != "modules_to_save":
            continue
        _check_entries(name, entries, kind)
    tokens = config.trainable_token_indices
    for name, indices in (tokens if isinstance(tokens, dict) else {"": tokens}).items():
        _check_entries(f"trainable_token_indices{f'[{name!r}]' if name else ''}", indices, int)


def _check_entries(name: str, entries: Any, kind: type) -> None:
    if entries is None:
        return
    if not isinstance(entries, list | tuple | set) or not all(type(entry) is kind for entry in entries):
        raise invalid(name, entries, f"must be a list of {kind.__name__}", TypeError)
    if len(entries) > MOST_ENTRIES:
        raise ValueError(f"{name} must have at most {MOST_ENTRIES} entries, and has {len(entries)}")
    if kind is int and min(entries, default=0) < 0:
        raise invalid(name, min(entries), "must be at least 0")


def _check_format(config: Any, newest_format: int, package_version: str) -> None:
    check_count("format_version", config.format_version)
    if config.format_version > newest_format:
        raise invalid(
            "format_version",
            config.format_version,
            f"is newer than {newest_format}, the newest that peft_subspace {package_version} reads; "
            "upgrade peft_subspace",
        )


def _check_targets(config: Any) -> None:
    for name in ("target_modules", "exclude_modules"):
        names = getattr(config, name)
        if isinstance(names, str):
            check_patterns(name, [names], embedded=False)
        elif names is not None:
            rule = "must be a list of module names, or one regular expression"
            if not isinstance(names, set) or not all(isinstance(entry, str) for entry in names):
                raise invalid(name, names, rule, TypeError)
            _check_entries(name, names, str)
    patterns = config.layers_pattern or []
    check_patterns("layers_pattern", [patterns] if isinstance(patterns, str) else patterns)
    check_patterns("modules_to_save", config.modules_to_save or [])
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise invalid(
            "layers_to_transform",
            config.layers_to_transform,
            "needs target_modules as a list; name the layers in the regular expression instead",
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise invalid("layers_pattern", config.layers_pattern, "needs layers_to_transform as well; set both")


def _check_parameters(config: Any) -> None:
    names = config.target_parameters
    if names is None:
        return
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise invalid(
            "target_parameters",
            names,
            "must be a list, such as ['experts.down_proj']",
            TypeError,
        )
    config.target_parameters = list(names)
    if names and config.target_modules is None:
        config.target_modules = []


def _check_choices(config: Any) -> None:
    check_choice("bias", config.bias, ("none", "all", f"{config.peft_type_name.lower()}_only"))
    if isinstance(config.scaling, str) and config.scaling not in ("auto", "paper"):
        raise invalid("scaling", config.scaling, 'must be "auto", "paper", or a number')
    if not isinstance(config.scaling, str):
        check_number("scaling", config.scaling)
    if not isinstance(config.init_weights, bool | str) or (
        config.init_weights not in (True, False, *config.init_choices)
    ):
        raise invalid(
            "init_weights", config.init_weights, f"must be one of {(True, False, *config.init_choices)}"
        )
