"""The config of an adapter, read from a file that anyone may have written."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_subspace.tuner.config import VERSION, SubspaceConfig

_MOST_BYTES = 2**24


def read_config(path: Path) -> SubspaceConfig:
    """Read a config whose type this package knows.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If the file is no config, belongs to another package, or has a value that no layer could
            take.
    """
    attributes = _json_object(path)
    config_cls = _config_cls(attributes.get("peft_type"))
    return config_cls(**_known_fields(config_cls, attributes))


def _json_object(path: Path) -> dict[str, Any]:
    """Content of a file that must hold one JSON object of sensible size."""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes; no config of an adapter is that large")
    try:
        attributes = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}); save the adapter again") from error
    if not isinstance(attributes, dict):
        raise ValueError(
            f"{path} is not a JSON object, but {type(attributes).__name__}; save the adapter again"
        )
    return attributes


def _config_cls(peft_type: Any) -> type[SubspaceConfig]:
    """Config class of this package that PEFT has registered under `peft_type`."""
    types: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    known = types.get(peft_type) if isinstance(peft_type, str) else None
    if known is None or not issubclass(known, SubspaceConfig):
        own = sorted(t.value for t, c in types.items() if issubclass(c, SubspaceConfig))
        raise ValueError(
            f"peft_type={peft_type!r:.80} is none of {own}; load it with peft.PeftModel.from_pretrained, or "
            f"upgrade peft_subspace from {VERSION} if PEFT does not know it either"
        )
    return known


def _known_fields(config_cls: type[SubspaceConfig], attributes: dict[str, Any]) -> dict[str, Any]:
    """Entries of a file that are fields; the others are left out with a warning, as PEFT does."""
    names = {field.name for field in fields(config_cls) if field.init}
    unknown = sorted(set(attributes) - names)
    if unknown:
        warnings.warn(
            f"the config has fields that {config_cls.__name__} of peft_subspace {VERSION} does not know, and "
            f"ignores: {str(unknown)[:200]}; it was saved by peft_subspace "
            f"{str(attributes.get('peft_subspace_version'))[:20]}",
            stacklevel=4,
        )
    return {name: value for name, value in attributes.items() if name in names}
