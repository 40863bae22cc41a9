"""Rotary positions (arXiv 2104.09864): queries and keys turned by their place, so that q·k sees only the distance."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn each pair of features by an angle that grows with the position; pair i is features i and i + Z/2.

    Args:
        x: ``(B, L, H, Z)``, Z even.
        base: The slowest pair turns by about 1/base a position.

    Returns:
        ``(B, L, H, Z)`` in the dtype of x; angles are computed in at least float32.
    """
    length, width = x.shape[1], x.shape[3]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rates = base ** (-torch.arange(0, width, 2, device=x.device, dtype=dtype) / width)
    angles = torch.arange(length, device=x.device, dtype=dtype)[:, None, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
