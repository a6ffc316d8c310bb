"""The part of an adapter's model card that this package writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from .config import SubspaceConfig

_MARK = "<!-- peft_subspace -->"

_SECTION = """{mark}
## Use with peft_subspace

The type of this adapter, `{peft_type}`, comes with the package `peft_subspace`. Import it before loading, or
PEFT stops with `KeyError: '{peft_type}'`:

```python
import peft_subspace  # registers the type with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this repository or folder")
```

`peft_subspace.save_as_lora` writes it as a plain LoRA, which loads without the package.
{mark}
"""


def write_card(folder: Path, config: SubspaceConfig) -> None:
    """Add tags and the import line to the model card in `folder`, making the card if there is none."""
    path = folder / "README.md"
    card: Any = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{_new_data(config)}\n---\n")
    tags = ("peft", "peft_subspace", type(config).__name__.removesuffix("Config").lower())
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    before, _, rest = card.text.partition(_MARK)
    after = rest.partition(_MARK)[2]
    section = _SECTION.format(mark=_MARK, peft_type=config.peft_type_name)
    card.text = f"{section}\n{(before + after).lstrip()}"
    card.save(path)


def _new_data(config: SubspaceConfig) -> str:
    return ModelCardData(base_model=config.base_model_name_or_path, library_name="peft").to_yaml()
