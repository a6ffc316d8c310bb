"""Strengths of adapters at run time, by the names that PEFT and diffusers call them."""

from __future__ import annotations


class ScaledAdapters:
    """Part of a tuner layer: the factor before the update of each adapter, and what it was at first."""

    scaling: dict[str, float]
    initial_scaling: dict[str, float]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set one adapter's scaling to its initial value times `scale`."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by `scale`."""
        for name in self.active_here():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`, or reset it to its initial value."""
        for name in self.active_here():
            self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def active_here(self) -> list[str]:
        """Active adapters that the layer has."""
        raise NotImplementedError
