"""What systems of attention by heads share.

Shapes: B batch, L length, D model width, V width over all heads, H heads, Z width of a head.
"""

from __future__ import annotations

from typing import Annotated, Literal

from einops import rearrange
from torch import Tensor, nn

from chela.core.options import checked
from chela.layers.attention import Attended, columns
from chela.layers.short_conv import ShortConv
from chela.layers.state import State, expect_causal, nested, part
from chela.ops.padding import zero_padding

Heads = Annotated[int, {"ge": 1, "le": 256}]
Width = Annotated[int | None, {"ge": 1, "le": 16384}]
Taps = Annotated[int, {"ge": 0, "le": 31, "neutral": 0}]


class MultiHead(nn.Module):
    """``[q, k, v] = short * (W x)`` per head, and ``h = W_o o``.

    The short convolution, with SiLU, is the one that linear attention has in zoology (arXiv 2312.04927) and in later
    systems; the papers of the systems here do without. It takes padding for zeros.

    Args:
        d_model: Width D.
        heads: Attention heads H.
        d_value: Width V of queries, keys and values, all heads together; None is D.
        short: Taps of a depthwise convolution of queries, keys and values; 0 is none. See ``ShortConv``: causal as the
            layer is; else it is centred, and 4 taps see one token back and two ahead.
        causal: No position sees a later one.

    Raises:
        ValueError: V is no multiple of H, or there is one tap.
    """

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        heads: Heads = 4,
        d_value: Width = None,
        short: Taps = 0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        d_value = d_model if d_value is None else d_value
        if d_value % heads:
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        if short == 1:
            raise ValueError("short: expected 0, or 2 to 31 taps, got 1")
        self.heads, self.d_value, self.causal = heads, d_value, causal
        self.head_width = d_value // heads
        self.qkv = nn.Linear(d_model, 3 * d_value)
        self.short = ShortConv(3 * d_value, short, causal=causal) if short else None
        self.out = nn.Linear(d_value, d_model)
        self.attended = Attended()

    def project(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map ``x: (B, L, D)`` to queries, keys and values side by side, ``(B, L, 3V)``."""
        y: Tensor = self.qkv(x)
        if self.short is not None:
            y = self.short(zero_padding(y, mask))
        return y

    def advance(self, form: Literal["prefill", "step"], x: Tensor, state: State) -> tuple[Tensor, State]:
        """Project the tokens ``x: (B, L, D)`` after those of ``state``, or one token ``(B, D)``."""
        y = self.qkv(x)
        if self.short is None:
            return y, {}
        y, after = getattr(self.short, form)(y, part("short", state))
        return y, nested("short", after)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``y: (..., 3V)`` into queries, keys and values ``(..., H, Z)``."""
        sizes = [self.d_value] * 3
        q, k, v = (rearrange(t, "... (h z) -> ... h z", h=self.heads) for t in columns(y, sizes))
        return q, k, v

    def merge(self, o: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map ``o: (..., H, Z)`` to ``(..., D)``, 0 at padding; a system may gate it by the input ``x: (..., D)``."""
        return zero_padding(self.out(o.flatten(-2)), mask)

    def start(self, batch: int) -> State:
        """Return the short convolution's state, ``short.recent (B, K, 3V)``."""
        expect_causal(self)
        return {} if self.short is None else nested("short", self.short.start(batch))

    def state_size(self, length: int) -> int:
        """Count the short convolution's inputs."""
        return 0 if self.short is None else self.short.weight.numel()
