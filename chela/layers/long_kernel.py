"""Long convolution kernels, each built for ``l_max``: SGConv's multi-scale one, and sums of exponentials as in MEGA.

Lag 0 belongs to the forward kernel. The back kernel starts at lag −1; a causal one has none.
Shapes: B batch, L length, C channels, D directions (1 or 2), S scales of k parameters, N exponentials (modes).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.param_groups import mark
from chela.layers.stages import Factor
from chela.layers.state import State, detached
from chela.ops.backend import accumulation_dtype
from chela.ops.fft_conv import fft_conv

ALL = slice(None)
KERNEL_LR = 1e-3
"""The learning rate of long kernels and state matrices, smaller than the model's (arXiv 2210.09298, section 4)."""
PIECE = 1024
"""Tokens that a sum of exponentials takes at once, so that its memory stays bounded."""

T = TypeVar("T")


class Cached(nn.Module):
    """A module that caches what it computes from its parameters, in eval mode without gradients.

    The cache is dropped when a parameter is written to. A write to ``data`` is not noticed: call ``eval()`` after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cache: dict[Hashable, Any] = {}
        self._versions: list[tuple[int, int]] = []

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return ``make()``, or its cached result for this key."""
        if not self.may_cache():
            return make()
        tensors = itertools.chain(self.parameters(), self.buffers())
        versions = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors]
        if self._versions != versions:
            self._cache, self._versions = {}, versions
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]  # type: ignore[no-any-return]

    def may_cache(self) -> bool:
        """Whether results may be cached now."""
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and drop the cache."""
        self._cache = {}
        return super().train(mode)


class LongKernel(Cached):
    """What the variants share: sizes. A variant marks the learning rate of its parameters for ``chela.param_groups``.

    Args:
        d_model: Number of channels C.
        l_max: Length the kernel is built for.
        causal: Without the back kernel.
    """

    def __init__(self, d_model: int, l_max: int, *, causal: bool = False) -> None:
        super().__init__()
        if l_max < 1:
            raise ValueError(f"{type(self).__name__}: expected l_max >= 1, got {l_max}")
        self.d_model, self.l_max, self.directions = d_model, l_max, 1 if causal else 2

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.directions, self.d_model, *shape))


class MultiscaleKernel(LongKernel):
    """SGConv's kernel: few parameters near, the same number stretched over twice the length further out, and weaker.

    S = 1 + ⌈log2(l_max/k)⌉ pieces of k free parameters from N(0, 1); piece i is stretched ×1, 1, 2, 4 … by linear
    interpolation, scaled by 2^−i, and follows piece i − 1. The whole is divided by the L2 norm, per channel, that the
    uncropped kernel had at construction: a buffer, saved with the weights, not a function of them.

    Args:
        scale_size: Parameters k of a piece; what comes before it is as in ``LongKernel``.
        initial_scale: Stretch all pieces 2^n times more, and have n fewer.
        decay_min: A piece is so many times weaker than the one before it, in the first channel.
        decay_max: The same in the last channel; between them evenly spaced.

    Source: arXiv 2210.09298, section 3.2. Stretching is a product with a constant ``(k, length)`` matrix, several times
    faster forward and backward than calling the interpolation.

    >>> kernel = MultiscaleKernel(8, 100)
    >>> (kernel.pieces()[0].flatten(1) @ kernel.near(100)).shape
    torch.Size([8, 100])
    """

    norm: Tensor
    weaker: Tensor
    stretch: Tensor
    mirrored: Tensor

    def __init__(
        self,
        d_model: int,
        l_max: int,
        *,
        causal: bool = False,
        scale_size: int = 16,
        initial_scale: int = 0,
        decay_min: float = 2.0,
        decay_max: float = 2.0,
    ) -> None:
        super().__init__(d_model, l_max, causal=causal)
        scales = 1 + max(0, math.ceil(math.log2(l_max / scale_size)) - initial_scale)
        self.weight = self._parameter(scales, scale_size)
        mark(self, lr=KERNEL_LR)
        self.register_buffer("norm", torch.ones(self.directions, d_model, 1, 1))
        weaker = torch.linspace(decay_min, decay_max, d_model)[:, None] ** -torch.arange(scales)
        self.register_buffer("weaker", weaker[..., None], persistent=False)
        unit, first = torch.eye(scale_size)[None], 1 << initial_scale
        factors = [first, *(first << i for i in range(scales - 1))]
        stretch = [F.interpolate(unit, scale_factor=float(factor), mode="linear")[0] for factor in factors]
        self.register_buffer("stretch", torch.cat(stretch, dim=1), persistent=False)  # (k, L): lags side by side
        self.register_buffer("mirrored", self.stretch.flip(1), persistent=False)
        self.ends = [scale_size * total for total in itertools.accumulate(factors)]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the pieces from N(0, 1) and take the norm of the kernel they make."""
        nn.init.normal_(self.weight)
        pieces, spans = self.weight * self.weaker, itertools.pairwise([0, *self.ends])
        whole = torch.cat([pieces[:, :, i] @ self.stretch[:, a:b] for i, (a, b) in enumerate(spans)], dim=2)
        self.norm.copy_(whole.norm(dim=2)[..., None, None])

    def pieces(self, channels: slice = ALL) -> Tensor:
        """Return the parameters ``(D, C, S, k)`` of the channels, divided by the norm, each piece times its decay."""
        if channels == ALL:
            return self.weight * (self.weaker / self.norm)
        return self.weight[:, channels] * (self.weaker[channels] / self.norm[:, channels])

    def near(self, lags: int) -> Tensor:
        """Return the constant matrix ``(S·k, lags)`` that turns all parameters of a direction into its first lags."""
        ends = [min(end, lags) for end in (0, *self.ends)]
        pieces = (self.stretch[:, a:b] for a, b in itertools.pairwise(ends))
        matrix: Tensor = torch.block_diag(*pieces)  # type: ignore[no-untyped-call]
        return F.pad(matrix, (0, lags - matrix.shape[1]))

    def far(self, direction: int, length: int, beyond: int) -> Iterator[Factor]:
        """Yield what the lags of a direction from ``beyond`` to ``length`` are made of, in the order of lags.

        For each scale: its columns of all parameters ``(C, D·S·k)``, the matrix that turns them into lags, and which
        lags these are. A length beyond ``l_max`` is a ValueError.
        """
        if length > self.l_max:
            raise ValueError(
                f"{type(self).__name__}: expected a length up to l_max={self.l_max}, got {length}; "
                "build the layer with a larger l_max or cut the sequence"
            )
        scales, size = self.weight.shape[2:]
        zero = 0 if self.directions == 1 else length - 1
        for i in reversed(range(scales)) if direction else range(scales):
            start = max(self.ends[i - 1] if i else 0, beyond - direction)
            stop = min(self.ends[i], length - direction)
            if start < stop:
                first = (direction * scales + i) * size
                matrix = self.mirrored[:, -stop : -start or None] if direction else self.stretch[:, start:stop]
                lags = slice(zero - stop, zero - start) if direction else slice(zero + start, zero + stop)
                yield Factor(slice(first, first + size), matrix, lags)


class ExponentialKernel(LongKernel):
    """A kernel that is a sum of exponentials, ``kernel[t] = Re Σ_n weight_n · exp(t · log_base_n)``, of any length.

    The past is N modes a channel, ``h_t = exp(log_base) h_{t−1} + u_t``: constant memory for any number of tokens.
    """

    def exponentials(self) -> tuple[Tensor, Tensor]:
        """Return log_base ``(D or 1, C, N)`` and weight ``(D, C, N)``, real or complex."""
        raise NotImplementedError

    def forward(self, length: int, channels: slice = ALL) -> tuple[Tensor, Tensor | None]:
        """Return the forward kernel ``(C, length)`` and the back one ``(C, length - 1)``, or None when causal.

        ``channels`` are one process's, where a sequence is spread over several.
        """
        longest = self.l_max + 1  # MEGA leaves out the back kernel's first lag
        if self.may_cache() and channels == ALL and length <= longest:
            kernels = self.cached("kernels", lambda: self.build(longest))[..., :length]
        else:
            kernels = self.build(length, channels)
        return kernels[0], kernels[1, :, : length - 1] if self.directions == 2 else None

    def build(self, length: int, channels: slice = ALL) -> Tensor:
        """Sum the exponentials: ``(D, C, length)``."""
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
            log_base, once, heard = self.cached(("lag", old + 1), lambda: self._powers(old + 1))
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
        after = {"modes": torch.view_as_real(modes) if modes.is_complex() else modes}
        after |= {"recent": recent} if "recent" in state else {}
        return torch.cat(outputs, dim=1).to(u.dtype), detached(**after)

    def _powers(self, lag: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return log_base, its exponential, and what a mode adds to the output ``lag`` tokens later: ``(C, N)``."""
        log_base, weight = (part[0] for part in self.exponentials())
        return log_base, torch.exp(log_base), weight * torch.exp(log_base * lag)


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
