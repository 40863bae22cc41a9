"""The short depthwise convolution as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from chela.ops.short_conv import short_conv

__all__ = ["ShortConv"]


class ShortConv(nn.Module):
    """Depthwise convolution of a few taps.

    Args:
        d_model: Number of channels C.
        taps: Kernel size, 2–31.
        causal: Whether output t sees inputs up to t only.
        silu: Whether SiLU follows.
    """

    def __init__(self, d_model: int, taps: int, *, causal: bool = False, silu: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model, taps))
        self.causal, self.silu = causal, silu
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the taps from U(−1/√K, 1/√K), as PyTorch's own convolutions do."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x `(B, L, C)`."""
        return short_conv(x, self.weight, causal=self.causal, silu=self.silu)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.weight.shape[0]}, taps={self.weight.shape[1]}, causal={self.causal}, silu={self.silu}"
