"""Registration with PEFT: the only module that touches `PeftType` and PEFT's maps."""

from __future__ import annotations

from typing import Any

import aenum
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method


def peft_type(name: str) -> PeftType:
    """Return the member of `PeftType` called `name`, adding it if PEFT has none of that name.

    Name and value are equal, because PEFT and transformers look members up by either.
    """
    if name not in PeftType.__members__:
        aenum.extend_enum(PeftType, name, name)
    return PeftType[name]


def register(name: str, config_cls: type, model_cls: Any) -> None:
    """Make a method known to PEFT as `PeftType[name]`; doing it again, as a reload does, is harmless.

    Raises:
        ImportError: If PEFT, or another package, has a method of that name. Nothing is overwritten.
    """
    member = peft_type(name)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is None:
        register_peft_method(
            name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )
    elif (known.__module__, known.__qualname__) == (config_cls.__module__, config_cls.__qualname__):
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
    else:
        raise ImportError(
            f"peft_type={name!r} is already taken by {known.__module__}.{known.__qualname__}, and "
            "peft_subspace does not overwrite it: install a peft version within peft_subspace's "
            "requirements, or a newer peft_subspace"
        )
