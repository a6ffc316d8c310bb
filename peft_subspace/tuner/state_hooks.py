"""The hooks by which PEFT finds an adapter's tensors in a model, and hands over those that it has read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from peft_subspace.tuner import apart, callers, lean, ownership, state
from peft_subspace.tuner.config import saved_without
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.snapshot import Snapshot


class StateHooks(BaseTuner):
    """Tuner whose adapters are checked before they are loaded, wherever their tensors are held."""

    prefix: str
    tuner_layer_cls: type[SubspaceLayer]
    _before_loading: Snapshot | None = None
    _apart: dict[str, Tensor] | None = None
    """What was found apart from the file of the adapter that is being loaded."""

    @classmethod
    def shared_attribute(cls) -> str | None:
        """Name, in the model and in files, of the container of what layers share; None if they share none."""
        update_cls = cls.tuner_layer_cls.delta_cls
        return f"{cls.prefix}{update_cls.shared_name}" if update_cls.defines("shared") else None

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Tensors of an adapter under their keys in the model, shared ones wherever they are held."""
        layer_cls, shared = cls.tuner_layer_cls, cls.shared_attribute()
        is_theirs = ownership.owner_test(model, layer_cls, shared, unwanted_adapter_names)
        # PEFT goes on to select heads from the same dictionary.
        ownership.restore_dropped(model, state_dict, unwanted_adapter_names, is_theirs)
        own = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names=unwanted_adapter_names
        )
        own = {key: tensor for key, tensor in own.items() if not is_theirs(key)}
        own = state.without_aliases(model, cls.tuner_layer_cls, own)
        if config.format_version > 1:
            own = lean.inference_state(model, cls.tuner_layer_cls, adapter_name, own)
        if saved_without.get() is not None:
            own = lean.without_frozen(model, cls.tuner_layer_cls, adapter_name, own)
        return own | state.shared_state(model, cls.shared_attribute(), adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Key in a file: without the name, and of shared tensors that of the base model's root."""
        attribute = cls.shared_attribute()
        for container in filter(None, (f"{cls.prefix}delta", attribute)):
            path, found, tensor = key.rpartition(f"{container}.{adapter_name}.")
            if found and (not path or path.endswith(".")):
                return state.saved_key(f"{path}{container}.{tensor}", attribute)
        return key.replace(f".modules_to_save.{adapter_name}.", ".modules_to_save.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors that PEFT is about to load; if they are unfit, all is as before the call."""
        shared = cls.shared_attribute()
        keys = state.shared_keys(model, shared, adapter_name)
        renamed = {keys.get(state.at_root(key, shared), key): t for key, t in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        own, layers = model.state_dict(), state.layers_of(model, cls.tuner_layer_cls, adapter_name)
        remapped |= state.missing_fingerprints(layers, adapter_name, remapped)
        tuner = next((module for module in model.modules() if isinstance(module, cls)), None)
        pending = None if tuner is None else tuner._apart
        try:
            if callers.ignores_mismatched_sizes():
                remapped = state.without_misfits(own, layers, cls.prefix, remapped)
            state.check_loaded(model, config, adapter_name, own, layers, cls.prefix, remapped)
            if pending != {} or any(la.deltas[adapter_name].training_only for la in layers.values()):
                folder = callers.folder_read()
                remapped = cls._completed(model, config, adapter_name, remapped, folder, pending)
            remapped = state.in_dtypes_of(own, cls.prefix, remapped)
        except (OSError, ValueError):
            if tuner is not None and tuner._before_loading is not None:
                tuner._before_loading.restore()
            raise
        finally:
            if tuner is not None:
                tuner._before_loading = tuner._apart = None
        return state.with_aliases(model, cls.tuner_layer_cls, remapped)

    @classmethod
    def _completed(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        loaded: dict[str, Tensor],
        folder: Path | None,
        pending: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Tensors by key in the model, with those that the file in a folder leaves out."""
        layers = lean.layers_by_key(model, cls.tuner_layer_cls, adapter_name)
        updates = {saved: layer.deltas[adapter_name] for (_, saved), layer in layers.items()}
        own: dict[str, Tensor] = {}
        tensors = lean.by_start((start for start, _ in layers), loaded)
        for start, saved in layers:  # PEFT does not rename what has no place in the model
            extra = updates[saved].training_only
            own |= {f"{saved}{n}": t for n, t in tensors[start].items()}
            own |= {f"{saved}{n}": loaded[f"{saved}{n}"] for n in extra if f"{saved}{n}" in loaded}
        if folder is None:
            apart.drop_unfilled(updates, own)
        else:
            found = pending
            if found is None:  # of an adapter that the model has already
                of_file = type(config).from_pretrained(folder) if (folder / CONFIG_NAME).is_file() else config
                if of_file.frozen and of_file.for_inference:
                    for update in updates.values():
                        update.drop_training_buffers()
                found = apart.read_apart(updates, folder, of_file.frozen_file)
            by_key = {saved: layer for (_, saved), layer in layers.items()}
            own = apart.complete(by_key, adapter_name, config, own, found, new=pending is not None)
        whole = lean.by_start(updates, apart.confine(updates, own))
        return loaded | {f"{start}{n}": t for start, saved in layers for n, t in whole[saved].items()}
