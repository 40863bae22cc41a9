"""What the step-by-step forms share: only a causal layer has one."""

from __future__ import annotations

from torch import nn


def expect_causal(layer: nn.Module) -> None:
    """Refuse to step through a layer that looks ahead.

    Raises:
        RuntimeError: The layer was built with ``causal=False``.
    """
    if not layer.causal:
        raise RuntimeError(f"{type(layer).__name__}.step: expected causal=True; a two-sided layer needs later tokens")
