"""The causal long convolution token by token: block-wise online FFT convolution, in pages.

README.md says how the sum is cut into tiles so that a token costs O(log² K) for ever, in bounded memory.

Shapes: B batch, C channels, L new tokens, K taps, P tokens in a page.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.backend import accumulation_dtype

BLOCK = 64
"""Tokens in a block; within it earlier tokens are summed directly. A power of two."""


def page_size(taps: int) -> int:
    """Return P, the smallest power of two that is at least the number of taps and a block."""
    return 1 << (max(taps, BLOCK) - 1).bit_length()


def room(tokens: int, taps: int) -> int:
    """Return how many inputs a state has room for after so many tokens: it doubles, up to a page."""
    return min(page_size(tokens), page_size(taps))


class FFTConvState(NamedTuple):
    """What a causal long convolution remembers of the tokens so far, and what it owes to those to come.

    Attributes:
        inputs: ``(B, C, R)``, token t at t mod P, the last P of them at most; R is ``room(t, K)`` after t tokens.
        pending: ``(B, C, R)``, what earlier blocks add to each output of this page; R = 0: not worked out yet.
        position: ``(B,)`` int64 on the CPU, tokens seen, the same in all rows.
    """

    inputs: Tensor
    pending: Tensor
    position: Tensor

    @classmethod
    def start(cls, like: Tensor, batch: int) -> FFTConvState:
        """Return the state before the first token, for a kernel like ``(C, K)`` in dtype and device."""
        inputs = like.new_zeros(batch, like.shape[0], BLOCK, dtype=accumulation_dtype(like.dtype))
        return cls(inputs, torch.zeros_like(inputs), torch.zeros(batch, dtype=torch.int64))


class StepKernel:
    """A causal kernel made ready for ``fft_conv_step``; spectra are worked out when they are first needed.

    Args:
        kernel: ``(C, K)``, copied.
        skip: ``(C,)``, added to lag 0.
    """

    @torch.no_grad()
    def __init__(self, kernel: Tensor, *, skip: Tensor | None = None) -> None:
        self.kernel = kernel.detach().to(accumulation_dtype(kernel.dtype), copy=True)
        if skip is not None:
            self.kernel[:, 0] += skip
        near = self.kernel[:, :BLOCK]
        self.near = F.pad(near, (0, BLOCK - near.shape[1])).flip(1)  # the last lags of a block come first
        self.spectra: dict[int, Tensor] = {}

    def tile(self, inputs: Tensor) -> Tensor:
        """Return what n inputs ``(B, C, n)`` add to the n outputs after them, by one FFT of size 2n."""
        size = inputs.shape[2]
        if size not in self.spectra:
            self.spectra[size] = torch.fft.rfft(self.kernel[:, : 2 * size], n=2 * size)
        both: Tensor = torch.fft.irfft(torch.fft.rfft(inputs, n=2 * size) * self.spectra[size], n=2 * size)
        return both[:, :, size:]


@torch.no_grad()
def fft_conv_step(u: Tensor, state: FFTConvState, kernel: StepKernel) -> tuple[Tensor, FFTConvState]:
    """Feed one token to the causal long convolution.

    Equal to the same position of ``fft_conv`` on the whole sequence. O(C·log² K) a token on average; the token after a
    block of n pays for a tile of size n ≤ P, at worst O(C·K log K).

    Args:
        u: ``(B, C)``.
        state: As ``FFTConvState.start``, ``fft_conv_prefill`` or the previous step returned it; its tensors may be
            written to.
        kernel: The kernel, the same at each step.

    Returns:
        The output ``(B, C)`` in the dtype of u, and the new state.

    Raises:
        ValueError: A shape other than the state's.

    >>> kernel = torch.tensor([[1.0, 2.0, 3.0]])
    >>> state, ready = FFTConvState.start(kernel, batch=1), StepKernel(kernel)
    >>> for x in (1.0, 0.0, 1.0, 0.0, 0.0):
    ...     y, state = fft_conv_step(torch.tensor([[x]]), state, ready)
    ...     print(y.item())
    1.0
    2.0
    4.0
    2.0
    3.0
    """
    inputs, pending, position = state
    if u.shape != inputs.shape[:2]:
        raise ValueError(f"fft_conv_step: expected u of shape {tuple(inputs.shape[:2])}, got {tuple(u.shape)}")
    taps, t = kernel.kernel.shape[1], int(position[0])
    at = t % page_size(taps)
    inputs = _padded(inputs, room(t + 1, taps))
    if pending.shape[2] == 0:
        pending = _pending(inputs, t, kernel)
    elif t and at == 0:
        pending = kernel.tile(inputs).contiguous()  # a state is no part of a larger tensor
    elif at and at % BLOCK == 0:
        pending = _padded(pending, inputs.shape[2])
        _add_tile(pending, inputs, at, kernel)
    inputs[:, :, at] = u
    start = at - at % BLOCK
    near = inputs[:, :, start : at + 1] * kernel.near[:, start - at - 1 :]
    y = pending[:, :, at] + near.sum(2)
    return y.to(u.dtype), FFTConvState(inputs, pending, position + 1)


def fft_conv_prefill(
    u: Tensor, state: FFTConvState, kernel: Tensor, *, taps: int | None = None
) -> tuple[Tensor, FFTConvState]:
    """Feed many tokens at once; equal to the same positions of ``fft_conv`` on the whole sequence.

    O(C·(L + K) log(L + K)). Gradients flow to u and the kernel.

    Args:
        u: ``(B, L, C)``.
        state: As for ``fft_conv_step``; it is not changed.
        kernel: ``(C, K)``, or as many of its first lags as these tokens and those before them have.
        taps: K, where the kernel has fewer lags.

    Returns:
        The outputs ``(B, L, C)`` in the dtype of u, and the new state, without gradients.

    >>> kernel = torch.tensor([[1.0, 2.0, 3.0]])
    >>> y, state = fft_conv_prefill(torch.tensor([[[1.0], [0.0]]]), FFTConvState.start(kernel, 1), kernel)
    >>> y, state = fft_conv_prefill(torch.tensor([[[1.0], [0.0]]]), state, kernel)
    >>> y.flatten().round().tolist()
    [4.0, 2.0]
    """
    from chela.ops.fft_conv import fft_conv  # which imports this file

    taps = kernel.shape[1] if taps is None else taps
    page, t = page_size(taps), int(state.position[0])
    end = t + u.shape[1]
    past = state.inputs[:, :, :t] if t <= state.inputs.shape[2] else state.inputs.roll(-(t % page), 2)
    heard = past[:, :, max(0, past.shape[2] - taps + 1) :]
    y = fft_conv(torch.cat([heard.mT.to(u.dtype), u], dim=1), kernel)[:, heard.shape[2] :]
    inputs = torch.cat([past, u.detach().mT.to(past.dtype)], dim=2)[:, :, -page:]
    inputs = _padded(inputs, room(end, taps)) if end <= page else inputs.roll(end % page, 2)
    return y, FFTConvState(inputs, inputs.new_empty(*inputs.shape[:2], 0), state.position + u.shape[1])


def _pending(inputs: Tensor, t: int, kernel: StepKernel) -> Tensor:
    """Work out what the tokens before t add to each output of the page, but for those of the block of t."""
    page = page_size(kernel.kernel.shape[1])
    at = t % page
    if t < page:
        pending = torch.zeros_like(inputs)
    else:
        before = inputs.clone()  # this page adds by its own tiles
        before[:, :, :at] = 0
        pending = kernel.tile(before).contiguous()
    place = 0
    for bit in reversed(range(BLOCK.bit_length() - 1, at.bit_length())):
        if at >> bit & 1:
            place += 1 << bit
            _add_tile(pending, inputs, place, kernel)
    return pending


def _add_tile(pending: Tensor, inputs: Tensor, at: int, kernel: StepKernel) -> None:
    """Add the last n inputs before ``at``, n the largest power of two dividing it, to the next n outputs."""
    size = at & -at
    pending[:, :, at : at + size] += kernel.tile(inputs[:, :, at - size : at])


def _padded(x: Tensor, size: int) -> Tensor:
    return x if x.shape[2] == size else F.pad(x, (0, size - x.shape[2]))
