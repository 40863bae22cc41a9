"""CHELA's convolution: a short kernel, then one as long as the sequence.

Shapes: B batch, L length, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.expect import checked, expect_causal
from chela.layers.long_kernel import LONG_KERNELS
from chela.layers.long_stage import LongStage, ShortConv
from chela.layers.padding import zero_padding
from chela.ops.fft_conv.step import FFTConvState, fft_conv_step


@dataclass
class ShortLongConvState:
    """The short stage's last K inputs ``(B, K, C)``, the long one's state and bias ``(C,)``; None without the stage."""

    recent: Tensor | None
    long: FFTConvState | None
    bias: Tensor | None


class ShortLongConv(nn.Module):
    """``u = SiLU(short * x)``, ``c = SiLU(long * u + skip ⊙ u)``, depthwise.

    Padding is absent: x is zeroed there before the short convolution, u before the long one, c after it.

    Args:
        d_model: Number of channels C.
        l_max: Longest sequence the long kernel is built for.
        causal: Whether output t sees inputs up to t only.
        short_kernel: Taps of the short convolution; odd unless causal.
        long_kernel: A name in ``chela.layers.long_kernel.LONG_KERNELS``.
        mode: Which of the two stages there are; "none" passes x through.
        reparam: Train the long stage as parallel branches with batch norms, which ``merge`` folds into one kernel.
        branches: Sizes of the short branches beside the long kernel when ``reparam``.

    Raises:
        ValueError: An unknown mode or kernel, or a short kernel or branch that is even without being causal.

    Source: arXiv 2406.08128; the kernels are SGConv's, Long Convs' and MEGA's (see ``chela.layers.long_kernel``).

    >>> c = ShortLongConv(8, l_max=100)(torch.randn(2, 50, 8), torch.arange(50) < torch.tensor([[50], [30]]))
    >>> tuple(c.shape), c[1, 30:].abs().max().item()
    ((2, 50, 8), 0.0)
    """

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        causal: bool = False,
        short_kernel: int = 5,
        long_kernel: Literal["multiscale", "free", "ema"] = "multiscale",
        mode: Literal["short-long", "short", "long", "none"] = "short-long",
        reparam: bool = False,
        branches: tuple[int, ...] = (5, 31),
    ) -> None:
        super().__init__()
        self.d_model, self.causal, self.mode = d_model, causal, mode
        self.short = ShortConv(d_model, short_kernel, causal=causal, silu=True) if "short" in mode else None
        self.long = None
        if "long" in mode:
            kernel = LONG_KERNELS[long_kernel](d_model, l_max, causal=causal)
            self.long = LongStage(kernel, branches if reparam else ())

    def forward(self, x: Tensor, mask: Tensor | None = None, *, zeroed: bool = False) -> Tensor:
        """Map ``x: (B, L, C)`` to ``(B, L, C)``, 0 where ``mask: (B, L)`` is False; None means all tokens are real.

        ``zeroed`` says that x is 0 at padding already, which saves a pass over it.
        """
        x = x if zeroed else zero_padding(x, mask)
        if self.short is not None:
            x = zero_padding(self.short(x), mask)
        if self.long is not None:
            x = zero_padding(F.silu(self.long(x, mask)), mask)
        return x

    def merge(self, *, keep_training_form: bool = True) -> None:
        """Fold the long stage into one kernel and one bias, equal to eval mode; see ``LongStage.merge``."""
        if self.long is None:
            raise RuntimeError(f"ShortLongConv: expected a long stage to merge, but mode is {self.mode!r}")
        self.long.merge(keep_training_form=keep_training_form)

    def unmerge(self) -> None:
        """Bring the training form of the long stage back; see ``LongStage.unmerge``."""
        if self.long is None:
            raise RuntimeError(f"ShortLongConv: expected a long stage to unmerge, but mode is {self.mode!r}")
        self.long.unmerge()

    @torch.no_grad()
    def start(self, batch: int) -> ShortLongConvState:
        """Return the state before the first token, for ``step``, with the kernel as it is now.

        Raises:
            RuntimeError: The layer sees later tokens, or it is training with batch statistics.
        """
        expect_causal(self)
        recent = long = bias = None
        if self.short is not None:
            recent = self.short.weight.new_zeros(batch, self.short.weight.shape[1], self.d_model)
        if self.long is not None:
            if self.training and self.long.merged is None and len(self.long.norms):
                raise RuntimeError("ShortLongConv.step: expected eval mode, where batch norm has fixed statistics")
            folded = self.long.fold()
            long, bias = FFTConvState.start(folded.forward_kernel, batch), folded.bias
        return ShortLongConvState(recent, long, bias)

    @torch.no_grad()
    def step(self, x: Tensor, state: ShortLongConvState | None) -> tuple[Tensor, ShortLongConvState]:
        """Feed one token ``x: (B, C)`` to the causal form; return its output ``(B, C)`` and the state.

        It equals the same position of ``forward`` in eval mode. O(C·log² L) a token on average over L tokens, without
        gradients. The state is updated in place; None before the first token.

        Raises:
            ValueError: More than ``l_max`` tokens.
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
