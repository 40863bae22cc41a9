"""Attention by heads: queries, keys and values of each, and rotary positions.

Shapes: B batch, L length, D model width, V width over all heads, H heads, Z width of a head.
"""

from __future__ import annotations

from typing import Annotated

import torch
from einops import rearrange
from torch import Tensor, nn

from chela.core.options import checked
from chela.layers.attention import Attended, columns
from chela.ops.padding import zero_padding
from chela.ops.sequence_parallel import first_position


class MultiHead(nn.Module):
    """``[q, k, v] = W x`` per head, and ``h = W_o o``.

    Args:
        d_model: Width D.
        heads: Attention heads H.
        d_value: Width V of queries, keys and values, all heads together; None is D.
        causal: No position sees a later one.

    Raises:
        ValueError: V is no multiple of H.
    """

    rotary = False

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        heads: Annotated[int, {"ge": 1, "le": 256}] = 4,
        d_value: Annotated[int | None, {"ge": 1, "le": 16384}] = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        d_value = d_model if d_value is None else d_value
        if d_value % heads:
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        self.heads, self.d_value, self.causal = heads, d_value, causal
        self.head_width = d_value // heads
        self.qkv = nn.Linear(d_model, 3 * d_value)
        self.out = nn.Linear(d_value, d_model)
        self.attended = Attended()

    def set_rotary(self, rotary: bool) -> None:
        """Say whether ``split`` turns queries and keys by their position, which needs an even width of a head."""
        width = self.head_width
        if rotary and width % 2:
            raise ValueError(f"rotary: expected an even width of a head, got {width}; change d_value or heads")
        self.rotary = rotary

    def split(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x: (..., D)`` to queries, keys and values ``(..., H, Z)``, turned by position if ``rotary``.

        ``start`` is the position of the first token; x is ``(B, L, D)`` if it is turned.
        """
        q, k, v = (rearrange(t, "... (h z) -> ... h z", h=self.heads) for t in columns(self.qkv(x), self.d_value))
        start += first_position()
        return (rotate(q, start), rotate(k, start), v) if self.rotary else (q, k, v)

    def merge(self, o: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map ``o: (..., H, Z)`` to ``(..., D)``, 0 at padding; a system may gate it by the input ``x: (..., D)``."""
        return zero_padding(self.out(o.flatten(-2)), mask)


def rotate(x: Tensor, start: int = 0, base: float = 10_000.0) -> Tensor:
    """Turn each pair of features, i and i + Z/2, by an angle that grows with the position (arXiv 2104.09864).

    ``x: (B, L, H, Z)`` has an even Z, its first token the position ``start``; the slowest pair turns by about 1/base a
    position. Angles are computed in at least float32.
    """
    length, heads, width = x.shape[1:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rates = base ** (-torch.arange(0, width, 2, device=x.device, dtype=dtype) / width)
    angles = torch.arange(start, start + length, device=x.device, dtype=dtype)[:, None, None] * rates
    # One factor for each number of a record, so that a product is one long loop.
    cos = torch.cat([angles.cos()] * 2, dim=-1).expand(-1, heads, -1).contiguous().to(x.dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).expand(-1, heads, -1).contiguous().to(x.dtype)
    return torch.addcmul(x * cos, x.roll(width // 2, dims=-1), sin)
