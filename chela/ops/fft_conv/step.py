"""The causal long convolution one token at a time: block-wise online FFT convolution.

README.md says how the sum is cut into tiles so that L tokens cost O(L log² L).

Shapes: B batch, C channels, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.precision import accumulation_dtype

BLOCK = 64
"""Tokens in a block; within it earlier tokens are summed directly. A power of two."""


@dataclass
class FFTConvState:
    """What a causal long convolution remembers of the tokens so far, and what it owes to those to come.

    Made by ``start``; ``fft_conv_step`` updates it in place. After t tokens it holds O(B·C·t) numbers.

    Attributes:
        kernel: ``(C, K)``, with the skip on lag 0.
        inputs: ``(B, C, capacity)``, the tokens so far.
        pending: ``(B, C, capacity)``, what earlier blocks add to each output.
        position: Tokens seen.
        spectra: By tile size P, the transform of the kernel's first 2P lags, ``(C, P + 1)`` complex.
    """

    kernel: Tensor
    inputs: Tensor
    pending: Tensor
    position: int = 0
    spectra: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def start(cls, kernel: Tensor, batch: int, *, skip: Tensor | None = None) -> FFTConvState:
        """Return the state before the first token.

        Args:
            kernel: ``(C, K)``; up to K tokens can follow.
            batch: B.
            skip: ``(C,)``, added to lag 0.
        """
        dtype = accumulation_dtype(kernel.dtype)
        kernel = kernel.detach().to(dtype, copy=True)
        if skip is not None:
            kernel[:, 0] += skip
        inputs = kernel.new_zeros(batch, kernel.shape[0], BLOCK)
        return cls(kernel, inputs, torch.zeros_like(inputs))


@torch.no_grad()
def fft_conv_step(u: Tensor, state: FFTConvState) -> tuple[Tensor, FFTConvState]:
    """Feed one token to the causal long convolution.

    Equal to the same position of ``fft_conv`` on the whole sequence. O(C·log² L) a token on average over L tokens; the
    token that completes a block of P pays for a tile of size P, at worst O(C·L log L).

    Args:
        u: ``(B, C)``.
        state: As ``FFTConvState.start`` or the previous step returned it; updated in place.

    Returns:
        The output ``(B, C)`` in the dtype of u, and the state.

    Raises:
        ValueError: More tokens than the kernel has taps, or a shape other than the state's.

    >>> state = FFTConvState.start(torch.tensor([[1.0, 2.0, 3.0]]), batch=1)
    >>> [fft_conv_step(torch.tensor([[x]]), state)[0].item() for x in (1.0, 0.0, 1.0)]
    [1.0, 2.0, 4.0]
    """
    if u.shape != state.inputs.shape[:2]:
        raise ValueError(f"fft_conv_step: expected u of shape {tuple(state.inputs.shape[:2])}, got {tuple(u.shape)}")
    t = state.position
    if t >= state.kernel.shape[1]:
        raise ValueError(
            f"fft_conv_step: expected at most K={t} tokens, one for each tap, got one more; take more taps"
        )
    state.inputs[:, :, t] = u
    start = t - t % BLOCK
    recent = state.inputs[:, :, start : t + 1]
    y = state.pending[:, :, t] + (recent * state.kernel[:, : t + 1 - start].flip(1)).sum(2)
    state.position = t + 1
    if state.position % BLOCK == 0 and state.position < state.kernel.shape[1]:
        _add_tile(state)
    return y.to(u.dtype), state


def _add_tile(state: FFTConvState) -> None:
    """Add the last P inputs, P the largest power of two dividing the position, to the next P outputs."""
    t = state.position
    size = t & -t
    if t == state.inputs.shape[2]:  # full, and t a power of two times BLOCK: double the room
        state.inputs, state.pending = (F.pad(x, (0, t)) for x in (state.inputs, state.pending))
    if size not in state.spectra:
        state.spectra[size] = torch.fft.rfft(state.kernel[:, : 2 * size], n=2 * size)
    spectrum = torch.fft.rfft(state.inputs[:, :, t - size : t], n=2 * size) * state.spectra[size]
    state.pending[:, :, t : t + size] += torch.fft.irfft(spectrum, n=2 * size)[:, :, size:]
