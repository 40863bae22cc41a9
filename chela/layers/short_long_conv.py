"""CHELA's convolution: a short kernel for what is near, then one as long as the sequence.

Shapes: B batch, L length, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.long_kernel import LONG_KERNELS
from chela.layers.long_stage import LongStage
from chela.layers.padding import zero_padding
from chela.layers.short_conv import ShortConv
from chela.ops.fft_conv.streaming import FFTConvState, fft_conv_step

__all__ = ["CONV_MODES", "ShortLongConv", "ShortLongConvState"]

CONV_MODES = ("short-long", "short", "long", "none")


@dataclass
class ShortLongConvState:
    """What the causal form remembers between steps; a step updates it in place.

    Attributes:
        recent: `(B, K, C)`, the last inputs of the short stage, or None without it.
        long: The state of the long stage, or None without it.
        bias: `(C,)`, the bias of the folded long stage.
    """

    recent: Tensor | None
    long: FFTConvState | None
    bias: Tensor | None


class ShortLongConv(nn.Module):
    """`u = SiLU(short * x)`, `c = SiLU(long * u + skip ⊙ u)`, depthwise.

    Padding is absent: x is zeroed there before the short convolution, u before the long one, c after it.

    Args:
        d_model: Number of channels C.
        l_max: Longest sequence the long kernel is built for.
        causal: Whether output t sees inputs up to t only.
        short_kernel: Taps of the short convolution; odd unless causal.
        long_kernel: A name in `chela.layers.long_kernel.LONG_KERNELS`.
        kernel_options: Further arguments of the long kernel, e.g. its own `lr` and `weight_decay`.
        mode: Which of the two stages there are; "none" passes x through.
        reparam: Train the long stage as parallel branches with batch norms, which `merge` folds into one kernel.
        branches: Sizes of the short branches beside the long kernel when `reparam`.

    Raises:
        ValueError: An unknown mode or kernel, or a short kernel or branch that is even without being causal.

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
        kernel_options: dict[str, Any] | None = None,
        mode: str = "short-long",
        reparam: bool = False,
        branches: tuple[int, ...] = (5, 31),
    ) -> None:
        super().__init__()
        if mode not in CONV_MODES:
            raise ValueError(f"ShortLongConv: expected mode in {CONV_MODES}, got {mode!r}")
        if long_kernel not in LONG_KERNELS:
            raise ValueError(f"ShortLongConv: expected long_kernel in {sorted(LONG_KERNELS)}, got {long_kernel!r}")
        if not causal and short_kernel % 2 == 0:
            raise ValueError(f"ShortLongConv: expected an odd short_kernel when not causal, got {short_kernel}")
        self.d_model, self.causal, self.mode = d_model, causal, mode
        self.short = ShortConv(d_model, short_kernel, causal=causal, silu=True) if "short" in mode else None
        self.long = None
        if "long" in mode:
            kernel = LONG_KERNELS[long_kernel](d_model, l_max, causal=causal, **(kernel_options or {}))
            self.long = LongStage(kernel, branches if reparam else ())

    def forward(self, x: Tensor, mask: Tensor | None = None, *, zeroed: bool = False) -> Tensor:
        """Convolve x.

        Args:
            x: `(B, L, C)`.
            mask: `(B, L)` bool, True on real tokens; None means all are.
            zeroed: x is 0 at padding already, which saves a pass over it.

        Returns:
            `(B, L, C)`, 0 at padding.
        """
        x = x if zeroed else zero_padding(x, mask)
        if self.short is not None:
            x = zero_padding(self.short(x), mask)
        if self.long is not None:
            x = zero_padding(F.silu(self.long(x, mask)), mask)
        return x

    def merge(self, *, keep_training_form: bool = True) -> None:
        """Fold the long stage into one kernel and one bias at `l_max`, equal to eval mode; see `LongStage.merge`."""
        self._long_stage("merge").merge(keep_training_form=keep_training_form)

    def unmerge(self) -> None:
        """Bring the training form of the long stage back; see `LongStage.unmerge`."""
        self._long_stage("unmerge").unmerge()

    def _long_stage(self, purpose: str) -> LongStage:
        if self.long is None:
            raise RuntimeError(f"ShortLongConv: expected a long stage to {purpose}, but mode is {self.mode!r}")
        return self.long

    @torch.no_grad()
    def start(self, batch: int) -> ShortLongConvState:
        """Return the state before the first token, for `step`; the kernel is the one of now.

        Raises:
            ValueError: The layer sees later tokens.
            RuntimeError: It is training, with batch statistics.
        """
        if not self.causal:
            raise ValueError("ShortLongConv.step: expected causal=True; a bidirectional layer needs later tokens")
        recent = long = bias = None
        if self.short is not None:
            recent = self.short.weight.new_zeros(batch, self.short.weight.shape[1], self.d_model)
        if self.long is not None:
            if self.training and self.long.merged is None and len(self.long.norms):
                raise RuntimeError("ShortLongConv.step: expected eval mode, where batch norm has fixed statistics")
            kernel, _, bias = self.long.fold()
            long = FFTConvState.start(kernel, batch)
        return ShortLongConvState(recent, long, bias)

    @torch.no_grad()
    def step(self, x: Tensor, state: ShortLongConvState | None) -> tuple[Tensor, ShortLongConvState]:
        """Feed one token to the causal form; equal to the same position of `forward` in eval mode.

        O(C·log² L) a token on average over L tokens, without gradients.

        Args:
            x: `(B, C)`.
            state: As `start` or the previous step returned it, updated in place; None before the first token.

        Returns:
            The output `(B, C)`, and the state.

        Raises:
            ValueError: More than `l_max` tokens.
        """
        state = self.start(x.shape[0]) if state is None else state
        if state.recent is not None:
            assert self.short is not None
            state.recent = torch.cat([state.recent[:, 1:], x[:, None].to(state.recent)], dim=1)
            x = F.silu((state.recent * self.short.weight.T).sum(1)).to(x.dtype)
        if state.long is not None:
            u, state.long = fft_conv_step(x, state.long)
            x = F.silu(u if state.bias is None else u + state.bias).to(x.dtype)
        return x, state

    def extra_repr(self) -> str:
        """Show the mode."""
        return f"mode={self.mode!r}, causal={self.causal}"
