"""What systems of attention by heads share.

Shapes: B batch, L length, D model width, V width over all heads, H heads, Z width of a head.
"""

from __future__ import annotations

from typing import Annotated

from einops import rearrange
from torch import Tensor, nn

from chela.core.options import checked
from chela.layers.attention import Attended, columns
from chela.ops.padding import zero_padding

Heads = Annotated[int, {"ge": 1, "le": 256}]
Width = Annotated[int | None, {"ge": 1, "le": 16384}]


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

    @checked
    def __init__(self, d_model: int, *, heads: Heads = 4, d_value: Width = None, causal: bool = False) -> None:
        super().__init__()
        d_value = d_model if d_value is None else d_value
        if d_value % heads:
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        self.heads, self.d_value, self.causal = heads, d_value, causal
        self.head_width = d_value // heads
        self.qkv = nn.Linear(d_model, 3 * d_value)
        self.out = nn.Linear(d_value, d_model)
        self.attended = Attended()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x: (..., D)`` to queries, keys and values ``(..., H, Z)``."""
        q, k, v = (rearrange(t, "... (h z) -> ... h z", h=self.heads) for t in columns(self.qkv(x), [self.d_value] * 3))
        return q, k, v

    def merge(self, o: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map ``o: (..., H, Z)`` to ``(..., D)``, 0 at padding; a system may gate it by the input ``x: (..., D)``."""
        return zero_padding(self.out(o.flatten(-2)), mask)
