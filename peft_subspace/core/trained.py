"""A module that knows its parameters also where others have put plain tensors in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TrainedModule(nn.Module):
    """Module with parameters that `nn.DataParallel`, FSDP and `torch.func` may take away while they run it.

    Attributes:
        trained_shapes: Shapes of the parameters, whole, by name.
    """

    _original: tuple[Any, ...] = ()  # a tuple hides a module from torch

    def __init__(self) -> None:
        super().__init__()
        self.trained_shapes: dict[str, torch.Size] = {}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, and remember that there is one of this name and shape."""
        super().register_parameter(name, param)
        if param is not None:
            self.trained_shapes.setdefault(name, param.shape)

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters by name, as they are now; `named_parameters` does not know plain tensors."""
        return {name: getattr(self, name) for name in self.trained_shapes}

    @property
    def is_fetched(self) -> bool:
        """Whether the parameters are those of this call only, after which their memory may be freed."""
        names, parameters = self.trained_shapes, self._parameters
        return bool(self._forward_hooks) or any(type(parameters.get(n)) is not nn.Parameter for n in names)

    @property
    def weight(self) -> Tensor | None:
        """One of the parameters, by which PEFT's policy for FSDP makes them a unit."""
        return next(iter(self.trained.values()), None)

    @property
    def original(self) -> Any:
        """The module itself; for a replica of `nn.DataParallel`, what it was made of."""
        return self._original[0] if self._original else self

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        replica._original = (self.original,)
        return replica
