"""Modules whose files, and whose form to be run only, go without what only further training needs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peft_subspace.core.trained import TrainedModule

UNLOADED = (
    "has a config that was read from a file, and none of the tensors that belong to it",
    "load these, or set config.initialized = False before, for a new adapter",
)
"""What an update awaits whose tensors are neither made nor there yet."""


class LeanModule(TrainedModule):
    """A module that can do without some of its buffers when nothing trains.

    Args:
        for_inference: Whether it is only to be run.

    Attributes:
        training_only: Names of the buffers that only further training needs; None where the module is lean.
    """

    training_only: tuple[str, ...] = ()

    def __init__(self, *, for_inference: bool) -> None:
        super().__init__()
        self._for_inference = for_inference

    def register_frozen(self, name: str, tensor: Tensor, *, training_only: bool) -> None:
        """Register a buffer; files, and adapters that are only run, go without what only training needs."""
        self.training_only += (name,) if training_only else ()
        self.register_buffer(name, None if training_only and self._for_inference else tensor)

    @property
    def frozen_in_files(self) -> set[str]:
        """Names of the frozen tensors that the update is made of, which no file goes without."""
        there = {name for name, tensor in self._buffers.items() if tensor is not None}
        return there - {*self.training_only, "fingerprint"}

    @property
    def lean(self) -> bool:
        """Whether the buffers are missing that only training needs, so that nothing may train."""
        return any(getattr(self, name) is None for name in self.training_only)

    def inference_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that make the same update without those for training, given all by name."""
        return {name: tensor for name, tensor in state.items() if name not in self.training_only}

    def make_lean(self) -> None:
        """Forget what only training needs; the update stays what it is, bit for bit."""
        self.load_state_dict(self.inference_state(self.state_dict()), strict=False)
        self.drop_training_buffers()

    def drop_training_buffers(self) -> None:
        """Make room for the tensors of a lean update."""
        for name in self.training_only:
            setattr(self, name, None)
