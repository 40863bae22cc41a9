"""Long kernels that are sums of exponentials, so that their past is of constant size; MEGA's moving average is one.

Shapes: B batch, L length, C channels, N exponentials (modes) a channel, D directions (1 or 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.long_kernel import ALL, Kept, LongKernel
from chela.layers.state import State, settled
from chela.ops.backend import accumulation_dtype
from chela.ops.fft_conv import fft_conv

PIECE = 1024
"""Tokens that a sum of exponentials takes at once, so that its memory stays bounded."""


class ExponentialKernel(LongKernel):
    """A kernel that is a sum of exponentials, ``kernel[t] = Re Σ_n weight_n · exp(t · log_base_n)``, of any length.

    The past is N modes a channel, ``h_t = exp(log_base) h_{t−1} + u_t``: constant memory for any number of tokens.
    """

    extends_beyond_l_max = True

    def __init__(self, d_model: int, l_max: int, *, causal: bool = False) -> None:
        super().__init__(d_model, l_max, causal=causal)
        self._kept_powers = Kept()

    def exponentials(self) -> tuple[Tensor, Tensor]:
        """Return log_base ``(D or 1, C, N)`` and weight ``(D, C, N)``, real or complex."""
        raise NotImplementedError

    def build(self, length: int, channels: slice = ALL) -> Tensor:
        """Sum the exponentials."""
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            log_base, weight = self.exponentials()
            return self.sum_of_powers(log_base[:, channels], weight[:, channels], length)

    def sum_of_powers(self, log_base: Tensor, weight: Tensor, length: int) -> Tensor:
        """Return the real part of ``Σ_n weight_n · exp(t · log_base_n)`` for t < length.

        It is ``(D, C, L)``, of log_base ``(…, C, N)`` and weight ``(D, C, N)``, real or complex: a product of two
        matrices, of t = 0, m, 2m, … with the weights, and of t < m, where m ≈ √L. While compiling, the length may be a
        symbol, which has no root: then m ≈ √l_max. O(C·N·L) time, O(C·(L + N√L)) memory.
        """
        stride = max(1, math.isqrt(self.l_max if torch.compiler.is_compiling() else length))
        coarse = torch.arange(-(-length // stride), device=weight.device) * stride
        far = torch.exp(log_base[..., None] * coarse) * weight[..., None]  # (D, C, N, ⌈L/m⌉)
        near = torch.exp(log_base[..., None] * torch.arange(stride, device=weight.device))  # (…, C, N, m)
        if far.is_complex():
            kernel = far.real.transpose(2, 3) @ near.real - far.imag.transpose(2, 3) @ near.imag
        else:
            kernel = far.transpose(2, 3) @ near
        return kernel.flatten(2)[..., :length]

    def start(self, batch: int, heard: int = 0) -> State:
        """Return ``modes`` of all but the last R = ``heard`` tokens, complex ones as pairs, and these: ``recent``."""
        log_base, parameter = self.exponentials()[0][0], next(self.parameters())
        like = parameter.new_empty(0, dtype=accumulation_dtype(parameter.dtype))
        state = {"modes": like.new_zeros(batch, *log_base.shape, *((2,) if log_base.is_complex() else ()))}
        return state | ({"recent": like.new_zeros(batch, heard, self.d_model)} if heard else {})

    def prefill(
        self, u: Tensor, state: State, lags: Callable[[int], Tensor], gain: Tensor | float = 1.0
    ) -> tuple[Tensor, State]:
        """Convolve the tokens ``u: (B, L, C)`` that follow those of ``state``, in pieces of 1,024.

        ``lags(n)`` is all of the kernel, ``(C, n)``; from lag R + 1 on it is ``gain`` times this one. Time
        O(L·C·(log + N)), memory O(B·C·(L + √1024·N)).
        """
        modes, outputs = state["modes"], []
        recent = state.get("recent", modes.new_empty(len(modes), 0, self.d_model))
        modes = torch.view_as_complex(modes) if modes.ndim == 4 else modes
        old = recent.shape[1]
        with torch.autocast(u.device.type, enabled=False):
            log_base, once, heard = self._powers(old + 1)
            for new in torch.split(u.to(recent.dtype), PIECE, dim=1):
                known, length = torch.cat([recent, new], dim=1), new.shape[1]
                kernel = lags(known.shape[1])
                if length == 1:
                    near = (known * kernel.flip(1).T).sum(1, keepdim=True)
                    far = (modes * heard).real.sum(-1)[:, None]
                    modes = modes * once + known[:, 0, :, None]
                else:
                    near = fft_conv(known, kernel)[:, old:]
                    far = self.sum_of_powers(log_base, modes * heard, length).mT
                    modes = _advanced(modes, log_base, known[:, :length])
                outputs.append(near + far * gain)
                recent = known[:, length:]
        modes = torch.view_as_real(modes) if modes.is_complex() else modes
        return torch.cat(outputs, dim=1).to(u.dtype), settled(
            modes=modes, **{name: recent for name in state if name == "recent"}
        )

    def _powers(self, lag: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return log_base, its exponential, and what a mode adds to the output ``lag`` tokens later: ``(C, N)``."""

        def make() -> tuple[int, Tensor, Tensor, Tensor]:
            log_base, weight = (part[0] for part in self.exponentials())
            return lag, log_base, torch.exp(log_base), weight * torch.exp(log_base * lag)

        return self._kept_powers.of(self, make, lambda kept: kept[0] == lag)[1:]


def _advanced(modes: Tensor, log_base: Tensor, u: Tensor) -> Tensor:
    """Add ``u: (B, L, C)`` to the modes ``(B, C, N)``, in √L stretches of √L tokens."""
    length = u.shape[1]
    size = max(1, math.isqrt(length))
    stretches = F.pad(u.mT, (-length % size, 0)).reshape(len(u), u.shape[2], -1, size)  # (B, C, A, m)
    back = torch.arange(max(size, stretches.shape[2]) - 1, -1, -1, device=u.device)[:, None]
    powers = log_base[:, None]
    sums = stretches.to(log_base.dtype) @ torch.exp(powers * back[-size:])  # (B, C, A, N)
    sums = (sums * torch.exp(powers * (size * back[-stretches.shape[2] :]))).sum(2)
    return sums.addcmul(torch.exp(log_base * length), modes)


class DampedEMAKernel(ExponentialKernel):
    """MEGA's damped multi-dimensional exponential moving average, written as a kernel.

    ``kernel[t] = Σ_n p_n β_n γ_n q_n^t / √N``, p = σ(δ), q = 1 − p·σ(α), N moving averages a channel. The formula
    gives any length, also beyond ``l_max``. Here the back kernel starts at lag −1. In MEGA both directions have lag 0;
    the layer's skip makes up for the difference.

    Source: arXiv 2209.10655, section 3.1 (initial values as in its code). See ``sum_of_powers`` for the cost.
    """

    def __init__(self, d_model: int, l_max: int, *, causal: bool = False, averages: int = 16) -> None:
        super().__init__(d_model, l_max, causal=causal)
        self.delta, self.alpha = self._parameter(averages), self._parameter(averages)
        self.beta, self.gamma = self._parameter(averages), self._parameter(averages)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw δ and α from N(0, 0.2²), β from ±1 in turn plus N(0, 0.02²), γ from N(0, 1)."""
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        self.beta[..., 0::2] += 1
        self.beta[..., 1::2] -= 1
        nn.init.normal_(self.gamma)

    def exponentials(self) -> tuple[Tensor, Tensor]:
        """Return log q and p·β·γ / √N, each ``(D, C, N)``."""
        p = torch.sigmoid(self.delta)
        log_q = torch.log1p(-p * torch.sigmoid(self.alpha))
        return log_q, p * self.beta * self.gamma / math.sqrt(p.shape[2])
