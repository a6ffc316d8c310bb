"""Layers and model of MoS: what the pools need because they lie outside the layers.

PEFT finds an adapter's tensors in its layers and in the tuner object. The pools are in neither: they are
children of the adapted model's root module, so that they stay when the tuner object is thrown away, as
`inject_adapter_in_model` and the `add_adapter` of transformers do. Each method below adds the pools to what
PEFT does for the layers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.core.linalg import local_generator
from peft_subspace.core.shapes import WeightShape
from peft_subspace.methods.mos.config import MoSConfig
from peft_subspace.methods.mos.delta import MoSDelta
from peft_subspace.methods.mos.pools import PoolDict, Pools
from peft_subspace.methods.mos.sharing import Share, allot
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.model import SubspaceModel

_PREFIX = "moshards_"


_POOLS = f"{_PREFIX}pools"


class MoSLayer(SubspaceLayer):
    """Layer with MoS adapters.

    All that transformers and diffusers do with an adapter, they do layer by layer; the layers therefore
    switch and delete the pools as well.
    """

    prefix = _PREFIX
    delta_cls = MoSDelta

    def __init__(self, base_layer: nn.Module, **backend_kwargs: Any) -> None:
        super().__init__(base_layer, **backend_kwargs)
        # A tuple, so that torch does not take the pools for a part of the layer.
        self._pools: tuple[PoolDict, ...] = ()

    def attach(self, pools: PoolDict, adapter_name: str) -> None:
        """Tell the layer, and the delta of its new adapter, where the pools are."""
        self._pools = (pools,)
        self.deltas[adapter_name].attach(pools[adapter_name])
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; their pools train, unless in inference mode, and the others' do not."""
        super().set_adapter(adapter_names, inference_mode)
        self._train_pools(lambda name: not inference_mode and name in self.active_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        super().enable_adapters(enabled)
        if not enabled:
            self._train_pools(lambda name: False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self._train_pools(lambda name: requires_grad if name in names else None)

    def requires_grad_(self, requires_grad: bool = True) -> MoSLayer:
        """Let all that belongs to the layer train, or freeze it."""
        super().requires_grad_(requires_grad)
        self._train_pools(lambda name: requires_grad)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with its pools; the group's other layers are about to lose it too."""
        if self._pools and adapter_name in self._pools[0]:
            del self._pools[0][adapter_name]
        super().delete_adapter(adapter_name)

    def _train_pools(self, decide: Callable[[str], bool | None]) -> None:
        for name, delta in self.deltas.items():
            trains = decide(name)
            for pool in delta.pool_parameters():
                if trains is not None and pool.is_leaf:
                    pool.requires_grad_(trains)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move the indices to the base layer's device, and pools off the host if the layer is."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        target = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for pool in self.deltas[adapter_name].pool_parameters() if adapter_name in self.deltas else ():
            if pool.device.type == "cpu" and target.type not in ("cpu", "meta"):
                pool.data = pool.data.to(target)


class MoSLinear(MoSLayer):
    """Linear layer with MoS adapters."""


class MoSModel(SubspaceModel):
    """Model with MoS adapters."""

    prefix = _PREFIX
    tuner_layer_cls = MoSLayer
    linear_layer_cls = MoSLinear

    @classmethod
    def ranks(cls, config: MoSConfig, shapes: dict[str, WeightShape]) -> dict[str, Share]:
        """Form groups among the targeted modules and give each module its share."""
        return allot(config, shapes)

    @classmethod
    def expected_state(cls, model: nn.Module, plan: dict[str, Any]) -> dict[str, Tensor]:
        """Indices and pools that a saved adapter must hold."""
        shares = [delta.share for delta in plan.values()]
        with torch.device("meta"):
            pools = Pools(shares).state_dict()
        expected = super().expected_state(model, plan)
        return {**expected, **{f"base_model.model.{_POOLS}.{name}": pool for name, pool in pools.items()}}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; if that fails, take its pools away again."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for _, pools in _pool_dicts(model):
                if adapter_name in pools:
                    del pools[adapter_name]
            raise

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key not in self._ranks:
            raise ValueError(
                f"{current_key} is in the state dict but not among target_modules, and pools are shared by "
                "all of these; make target_modules match the state dict"
            )
        pools = self._pools_for(adapter_name, peft_config)
        super()._create_and_replace(
            peft_config, adapter_name, target, target_name, parent, current_key, parameter_name
        )
        parent.get_submodule(target_name).attach(pools, adapter_name)

    def _pools_for(self, adapter_name: str, config: MoSConfig) -> PoolDict:
        """The root's pools, with those of a new adapter among them."""
        if not hasattr(self.model, _POOLS):
            self.model.add_module(_POOLS, PoolDict())
        pools = self.model.get_submodule(_POOLS)
        if adapter_name not in pools:
            shares = list(self._ranks.values())
            pools[adapter_name] = Pools(shares)
            for group in {share.group: None for share in shares}:
                generator = local_generator(config.seed, group, adapter_name)
                pools[adapter_name].reset_parameters(group, config.init_weights, generator)
        return pools

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        trained = [
            pool for _, pools in _pool_dicts(model) for pool in pools.parameters() if pool.requires_grad
        ]
        super()._mark_only_adapters_as_trainable(model)
        for pool in trained:
            pool.requires_grad_(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the pools in fp32, or give them the base model's dtype if PEFT is asked not to cast."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        dtype = torch.float32
        if not autocast_adapter_dtype:
            layer = next(
                m for m in self.model.modules() if isinstance(m, MoSLayer) and adapter_name in m.deltas
            )
            dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1] or dtype
        for _, pools in _pool_dicts(self.model):
            if adapter_name in pools:
                pools[adapter_name].to(dtype)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        if hasattr(model, _POOLS):
            delattr(model, _POOLS)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        starts = tuple(f"{name}.{adapter_name}." for name, _ in _pool_dicts(model))
        return {**state, **{key: tensor for key, tensor in state_dict.items() if key.startswith(starts)}}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        start = "base_model.model."
        keys = {}
        for name, pools in _pool_dicts(model):
            for pool in pools[adapter_name].state_dict() if adapter_name in pools else ():
                saved = f"{name.removeprefix(start)}.{pool}"
                keys[saved] = keys[start + saved] = f"{name}.{adapter_name}.{pool}"
        renamed = {keys.get(key, key): tensor for key, tensor in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)

    def _check_combination(self, adapters: Sequence[str], *args: Any) -> None:
        super()._check_combination(adapters, *args)
        raise ValueError(
            f"adapters={list(adapters)} of {type(self).__name__} cannot be concatenated: their pools belong "
            "to all modules at once; export each with peft_subspace.lora_state_dict and combine those"
        )


def _pool_dicts(model: nn.Module) -> Iterator[tuple[str, PoolDict]]:
    """Pools anywhere in a model, by name; the prefix that FSDP puts before names is left out."""
    for name, module in model.named_modules():
        if isinstance(module, PoolDict):
            yield name.removeprefix("_fsdp_wrapped_module."), module
