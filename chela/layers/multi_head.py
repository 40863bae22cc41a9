"""What every multi-head attention shares: queries, keys and values from one projection, and the way back.

Shapes: B batch, L length, D model width, V width over all heads, H heads, Z = V / H.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from chela.layers.padding import zero_padding
from chela.layers.recurrence import expect_causal
from chela.ops.linear_attention import LinearAttentionState
from chela.ops.linear_attention.recurrent import accumulation_dtype


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

    def __init__(self, d_model: int, *, heads: int = 4, d_value: int | None = None, causal: bool = False) -> None:
        super().__init__()
        d_value = d_model if d_value is None else d_value
        if d_value % heads:
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        self.heads, self.d_value, self.causal = heads, d_value, causal
        self.qkv = nn.Linear(d_model, 3 * d_value)
        self.out = nn.Linear(d_value, d_model)

    @property
    def head_width(self) -> int:
        """Z, the width of one head."""
        return self.d_value // self.heads

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x: (..., D)`` to queries, keys and values ``(..., H, Z)``."""
        q, k, v = rearrange(self.qkv(x), "... (three h z) -> three ... h z", three=3, h=self.heads)
        return q, k, v

    def no_sums(self, batch: int) -> LinearAttentionState:
        """Return the state of linear attention before the first token; refuse it to a layer that looks ahead."""
        expect_causal(self)
        like, width = self.out.weight, self.head_width
        dtype = accumulation_dtype(like.dtype)
        return LinearAttentionState.zeros(batch, self.heads, width, width, device=like.device, dtype=dtype)

    def merge(self, o: Tensor, mask: Tensor | None) -> Tensor:
        """Map ``o: (..., H, Z)`` to ``(..., D)``, 0 at padding."""
        return zero_padding(self.out(o.flatten(-2)), mask)

    def extra_repr(self) -> str:
        """Show what no submodule shows."""
        return f"heads={self.heads}, causal={self.causal}"
