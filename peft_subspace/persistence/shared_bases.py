"""Adapters that share their frozen tensors, saved with these once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_subspace.tuner import frozen_file
from peft_subspace.tuner.config import SubspaceConfig, saved_without
from peft_subspace.tuner.lean import frozen_tensors, layers_by_key


def save_with_shared_bases(
    model: PeftModel, folder: str | Path, adapter_names: Sequence[str] | None = None, **kwargs: Any
) -> list[Path]:
    """Save adapters as `save_pretrained` does, but their frozen tensors once for all that have the same.

    Of LoRA-SB's `B R A` each adapter's file has `R` alone: `r²` numbers per module. The bases `B` and `A` go
    into a file beside the adapters' folders, named by the hash of its content; whoever saves more adapters of
    the same start there, from whichever process, adds no other. It is looked for in an adapter's folder and
    in the two above, so that a tree of them can be moved, or uploaded, as a whole; `save_pretrained` puts an
    adapter into one file again. Effort's triples and the bases of Continual SVD without a rank are shared
    likewise.

    Args:
        model: Model with the adapters.
        folder: Folder of the adapter `"default"`; others get folders of their own names in it.
        adapter_names: Adapters to save, by default all.
        kwargs: Handed to `save_pretrained`.

    Returns:
        The files with the frozen tensors.

    Raises:
        ValueError: If an adapter is unknown, or has no frozen tensors. Nothing has been written then.
    """
    names = list(model.peft_config) if adapter_names is None else list(adapter_names)
    frozen = {name: _frozen(model, name) for name in names}
    home = Path(folder).absolute()
    home = home.parent if names == ["default"] else home
    paths = []
    for name, tensors in frozen.items():
        digest = frozen_file.write(home, tensors)
        paths.append(home / frozen_file.file_name(digest))
        token = saved_without.set(digest)
        try:
            model.save_pretrained(str(folder), selected_adapters=[name], **kwargs)
        finally:
            saved_without.reset(token)
    return list(dict.fromkeys(paths))


def _frozen(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    config = model.peft_config.get(adapter_name)
    layers = {}
    if isinstance(config, SubspaceConfig):
        layers = layers_by_key(model, model.base_model.tuner_layer_cls, adapter_name)
    tensors = frozen_tensors({start: layer.deltas[adapter_name] for (_, start), layer in layers.items()})
    if not tensors:
        raise ValueError(
            f"adapter {adapter_name!r} of {list(model.peft_config)} has no frozen tensors to share; save it "
            "with save_pretrained"
        )
    return tensors
