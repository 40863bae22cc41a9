"""CHELA's convolution: a short kernel for what is near, then one as long as the sequence.

Shapes: B batch, L length, C channels.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.long_kernel import LONG_KERNELS
from chela.ops.fft_conv import fft_conv
from chela.ops.short_conv import short_conv

__all__ = ["ConvMode", "ShortConv", "ShortLongConv"]

ConvMode = Literal["short-long", "short", "long", "none"]


class ShortConv(nn.Module):
    """Depthwise convolution of a few taps, as a module.

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


class ShortLongConv(nn.Module):
    """`u = SiLU(short * x)`, `c = SiLU(long * u + skip ⊙ u)`, depthwise.

    Padding is absent: x is zeroed there before the short convolution, u before the long one, c after it.

    Args:
        d_model: Number of channels C.
        l_max: Longest sequence the long kernel is built for.
        causal: Whether output t sees inputs up to t only.
        short_kernel: Taps of the short convolution; odd unless causal.
        long_kernel: A name in `chela.layers.long_kernel.LONG_KERNELS`.
        mode: Which of the two stages there are; "none" passes x through.
        kernel_lr: Learning rate of the long kernel's parameters; None leaves them at the model's.
        kernel_weight_decay: Weight decay of the long kernel's parameters.

    Raises:
        ValueError: An unknown mode or kernel, or a short kernel that is even without being causal.

    Source: arXiv 2406.08128; the kernels are SGConv's, Long Convs' and MEGA's (see `chela.layers.long_kernel`).

    >>> c = ShortLongConv(8, l_max=100)(torch.randn(2, 50, 8), torch.arange(50) < torch.tensor([[50], [30]]))
    >>> tuple(c.shape), c[1, 30:].abs().max().item()
    ((2, 50, 8), 0.0)
    """

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        causal: bool = False,
        short_kernel: int = 5,
        long_kernel: str = "multiscale",
        mode: ConvMode = "short-long",
        kernel_lr: float | None = 1e-3,
        kernel_weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in get_args(ConvMode):
            raise ValueError(f"ShortLongConv: expected mode in {get_args(ConvMode)}, got {mode!r}")
        if long_kernel not in LONG_KERNELS:
            raise ValueError(f"ShortLongConv: expected long_kernel in {sorted(LONG_KERNELS)}, got {long_kernel!r}")
        if not causal and short_kernel % 2 == 0:
            raise ValueError(f"ShortLongConv: expected an odd short_kernel when not causal, got {short_kernel}")
        self.causal, self.mode = causal, mode
        self.short = ShortConv(d_model, short_kernel, causal=causal, silu=True) if "short" in mode else None
        self.long = None
        if "long" in mode:
            self.long = LONG_KERNELS[long_kernel](
                d_model, l_max, causal=causal, lr=kernel_lr, weight_decay=kernel_weight_decay
            )
            self.skip = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the skip from N(0, 1); the stages draw their own."""
        if self.long is not None:
            nn.init.normal_(self.skip)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve x.

        Args:
            x: `(B, L, C)`.
            mask: `(B, L)` bool, True on real tokens; None means all are.

        Returns:
            `(B, L, C)`, 0 at padding.
        """
        x = _zero_padding(x, mask)
        if self.short is not None:
            x = _zero_padding(self.short(x), mask)
        if self.long is not None:
            x = _zero_padding(F.silu(self._long_stage(x)), mask)
        return x

    def _long_stage(self, u: Tensor) -> Tensor:
        assert self.long is not None
        forward, back = self.long(u.shape[1])
        return fft_conv(u, forward, kernel_back=back, skip=self.skip)

    def extra_repr(self) -> str:
        """Show the mode."""
        return f"mode={self.mode!r}, causal={self.causal}"


def _zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)
