"""The part of an adapter's model card that this package writes."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME

from peft_subspace.runtime.files import atomic_write
from peft_subspace.tuner.config import SubspaceConfig

LORA_FOLDER = "lora"
"""Folder, within that of an adapter, whose LoRA the card mentions."""

_MARK = "<!-- peft_subspace -->"
_PLACE = '"this repository or folder"'
_TAG = "base_model:adapter:"

_SECTION = """{mark}
## Use with peft_subspace

The type of this adapter, `{peft_type}`, comes with the package `peft_subspace`. Import it before loading, or
PEFT stops with `KeyError: '{peft_type}'`:

```python
import peft_subspace  # registers the type with PEFT
from peft import PeftModel

# base_model: the one that the adapter was trained on, loaded as for training
model = PeftModel.from_pretrained(base_model, {place})
```

| | |
|---|---|
{rows}
{mark}"""


def write_card(folder: Path, config: SubspaceConfig) -> None:
    """Complete the model card in `folder`, or make one; whatever else the card says stays.

    The section between the two marks belongs to this package and is written anew each time, where it stands;
    a new section goes to the top. It repeats data and results from the card's metadata.
    """
    path = folder / "README.md"
    card: Any = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{_new_data()}\n---\n")
    tags = ("peft", "peft_subspace", type(config).__name__.removesuffix("Config").lower())
    listed = _listed(card.data.tags)  # PEFT adds a tag for folders, too, and where there is no base model
    known = [tag for tag in listed if not tag.startswith(_TAG) or _is_id(tag.removeprefix(_TAG))]
    card.data.tags = list(dict.fromkeys([*known, *tags]))
    bases = _bases(card.data, config)
    ids = [base for base in bases if _is_id(base)]  # the Hub refuses a card with the path of a folder
    card.data.base_model = ids[0] if len(ids) == 1 else ids or None
    rows = "\n".join(f"| {name} | {text} |" for name, text in _facts(folder, config, card.data).items())
    section = _SECTION.format(mark=_MARK, peft_type=config.peft_type_name, place=_PLACE, rows=rows)
    card.text = _with_section(card.text, section)
    with atomic_write(path) as partial:
        card.save(partial)


SubspaceConfig.on_save.append(write_card)


def name_repository(folder: Path, repo_id: str, revision: str | None) -> None:
    """Write into all cards in `folder` the call that loads their adapters once the folder is uploaded."""
    for path in folder.rglob("README.md"):
        place = path.parent.relative_to(folder).as_posix()
        options = {"subfolder": place if place != "." else None, "revision": revision}
        call = "".join(f', {name}="{value}"' for name, value in options.items() if value)
        path.write_text(path.read_text("utf-8").replace(_PLACE, f'"{repo_id}"{call}'), "utf-8")


def equation_of(update_cls: type) -> str:
    """Equation of a method: the first paragraph of the module in which its update is defined."""
    return (getattr(inspect.getmodule(update_cls), "__doc__", None) or "").partition("\n\n")[0]


def _reference_of(config_cls: type) -> str:
    """Paper of a method: the section `Reference:` that ends the docstring of its config."""
    found = re.search(r"Reference:\s(.*)", config_cls.__doc__ or "", re.DOTALL)
    return found.group(1) if found else ""


def _facts(folder: Path, config: SubspaceConfig, data: Any) -> dict[str, str]:
    """Rows of the section's table; what is not known is left out."""
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    results = [
        f"{result.metric_name or result.metric_type} {result.metric_value} ({result.dataset_name})"
        for result in data.eval_results or []
    ]
    facts = {
        "Method": equation_of(tuner.tuner_layer_cls.delta_cls),
        "Reference": _reference_of(type(config)),
        "Base model": ", ".join(map(_shown, _bases(data, config))),
        "Trainable parameters, heads left out": f"{config.trained:,}" if config.trained else "",
        "Data": ", ".join(_listed(data.datasets)),
        "Results": ", ".join(results),
        "As a LoRA, which needs no import": _lora_export(folder),
    }
    return {name: " ".join(text.split()) for name, text in facts.items() if text}


def _with_section(text: str, section: str) -> str:
    """The card's text with a new section in the place of an old one, or at the top."""
    before, *rest = text.split(_MARK, 2)
    if len(rest) == 2:
        return f"{before}{section}{rest[1]}"
    return f"{section}\n\n{''.join([before, *rest]).lstrip()}"


def _lora_export(folder: Path) -> str:
    """How the reader gets the adapter as a LoRA."""
    path = folder / LORA_FOLDER / CONFIG_NAME
    if path.is_file() and json.loads(path.read_text()).get("peft_type") == "LORA":
        return f'with `subfolder="{LORA_FOLDER}"` in the call above'
    return "`peft_subspace.export_lora` writes it"


def _bases(data: Any, config: SubspaceConfig) -> list[str]:
    """Base models that a card names, or else the config."""
    return _listed(data.base_model) or _listed(config.base_model_name_or_path or [])


def _is_id(name: str) -> bool:
    """Whether a name can be a model's on the Hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _shown(base: str) -> str:
    """A base model as the card names it: of a folder its name alone, for the rest is of one machine."""
    return base if _is_id(base) else f"{Path(base).name}, a folder"


def _listed(value: Any) -> list[str]:
    """Entries of a field of the metadata, which may hold a single one in place of a list."""
    return [value] if isinstance(value, str) else [str(entry) for entry in value or []]


def _new_data() -> str:
    """Metadata of a card that is made."""
    return ModelCardData(library_name="peft").to_yaml()
