"""A depthwise convolution of a few taps, with SiLU after it, and its state.

Shapes: B batch, L length, C channels, K taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from chela.layers.state import State, detached
from chela.ops.backend import accumulation_dtype
from chela.ops.short_conv import short_conv, short_conv_step


class ShortConv(nn.Module):
    """Depthwise convolution of a few taps, with SiLU after it.

    Args:
        d_model: Number of channels C.
        taps: Kernel size K, 2–31.
        causal: Output t sees the inputs t − K + 1 … t; else t − ⌊(K − 1)/2⌋ … t + ⌊K/2⌋, so that an even K looks one
            further ahead than back.

    O(B·L·C·K). Inside ``sequence_parallel`` the inputs around a piece come from its neighbours.

    >>> ShortConv(8, 4)(torch.randn(2, 10, 8)).shape
    torch.Size([2, 10, 8])
    """

    def __init__(self, d_model: int, taps: int, *, causal: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model, taps))
        self.causal = causal
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the taps from U(−1/√K, 1/√K), as PyTorch's own convolutions do."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x ``(B, L, C)``."""
        return short_conv(x, self.weight, causal=self.causal, silu=True)

    def start(self, batch: int) -> State:
        """Return the state before the first token: the ``recent`` K inputs ``(B, K, C)``."""
        channels, taps = self.weight.shape
        return {"recent": self.weight.new_zeros(batch, taps, channels, dtype=accumulation_dtype(self.weight.dtype))}

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Convolve the tokens ``x: (B, L, C)`` that follow those of ``state``."""
        taps = self.weight.shape[1]
        known = torch.cat([state["recent"].to(x.dtype), x], dim=1)
        return self(known[:, 1:])[:, taps - 1 :], detached(recent=known[:, -taps:].to(state["recent"].dtype))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Convolve one token ``x: (B, C)``."""
        x, recent = short_conv_step(x, self.weight, state["recent"], silu=True)
        return x, {"recent": recent}
