"""CHELA's convolution: a short kernel, then one as long as the sequence.

Shapes: B batch, L length, C channels, J branches.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.long_kernel import ALL, Cached, DampedEMAKernel, ExponentialKernel, LongKernel, MultiscaleKernel
from chela.layers.param_groups import mark
from chela.layers.short_conv import ShortConv
from chela.layers.stages import Factor, convolved, own_backward
from chela.layers.state import State, expect_causal, nested, part
from chela.ops.fft_conv import FFTConvState, StepKernel, convolve_in_order, fft_conv_prefill, fft_conv_step
from chela.ops.fft_conv.step import room
from chela.ops.padding import zero_padding
from chela.ops.sequence_parallel import current, extent

LONG_KERNELS: dict[str, type[LongKernel]] = {"multiscale": MultiscaleKernel, "ema": DampedEMAKernel}

NEAR = 128
"""Lags below this, in both directions, are made by one product."""
SHORT_DEVIATION = 0.3
"""Standard deviation of what the short stage gives at the start for white inputs: of SiLU(x), x ~ N(0, 1/3)."""


class LongConv(Cached):
    """Parallel convolutions of one input: a long kernel with a skip, and short ones.

    ``y = Σ_j g_j ⊙ (w_j * u) + b``, where w_0 is the long kernel with the skip on lag 0. This is structural
    re-parameterisation without norms between: the sum is linear in u, so it is one kernel and one bias at all times, in
    training too. Other re-parameterised networks have batch norms between, whose statistics over positions would leak
    the future. What they give at the start, the gains g do: every branch has unit variance for white inputs.

    Args:
        kernel: The long kernel.
        branches: Sizes of the parallel short kernels.
        deviation: Standard deviation of u at the start.
    """

    gain_of: Tensor
    lags_of: Tensor

    def __init__(self, kernel: LongKernel, branches: tuple[int, ...] = (), *, deviation: float = 1.0) -> None:
        super().__init__()
        self.kernel, self.causal, self.deviation = kernel, kernel.directions == 1, deviation
        self.heard = max((taps - 1 for taps in branches), default=0)  # inputs back that the short branches hear
        self.skip = nn.Parameter(torch.empty(kernel.d_model))
        self.branches = nn.ParameterList(nn.Parameter(torch.empty(kernel.d_model, taps)) for taps in branches)
        self.gain = nn.Parameter(torch.empty(1 + len(branches), kernel.d_model))
        self.bias = nn.Parameter(torch.empty(kernel.d_model))
        mark(self, "gain", weight_decay=0.0)
        gain_of, lags_of = _gains_and_lags(branches, self.causal, kernel)
        self.register_buffer("gain_of", gain_of, persistent=False)
        self.register_buffer("lags_of", lags_of, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the skip from N(0, 1) and the short taps; set each gain by the norm of its branch."""
        nn.init.normal_(self.skip)
        nn.init.zeros_(self.bias)
        for taps in self.branches:
            nn.init.kaiming_uniform_(taps, a=math.sqrt(5))
        self.gain.zero_()[0] = 1
        back, forward = self.lags(self.kernel.l_max).tensor_split([-self.kernel.l_max], dim=1)
        long = forward.square().sum(1) + back.flip(1).square().sum(1)
        energies = [long, *(taps.square().sum(1) for taps in self.branches)]
        self.gain.copy_(torch.stack(energies).rsqrt() / self.deviation)

    def forward(self, u: Tensor) -> Tensor:
        """Convolve ``u: (B, L, C)``, 0 at padding; the output there is not 0."""
        length, channels = extent(u)
        if isinstance(self.kernel, MultiscaleKernel) and own_backward(u, self.skip) and current() is None:
            y = convolved(u, self.learned(), self.factors(length))
        else:
            y = convolve_in_order(u, self.lags(length, channels))
        return y.add_(self.bias.to(u.dtype))

    def lags(self, length: int, channels: slice = ALL) -> Tensor:
        """Return these channels' one kernel, its lags in order: ``(C, 2·length − 1)``; if causal ``(C, length)``."""
        learned = self.learned(channels)
        with torch.autocast(self.skip.device.type, enabled=False):
            lags = torch.cat([learned[:, columns] @ matrix for columns, matrix, _ in self.factors(length)], dim=1)
            if isinstance(self.kernel, MultiscaleKernel):
                return lags
            forward, back = self.kernel(length, channels)
            whole = forward if back is None else torch.cat([back.flip(1), forward], dim=1)
            beyond = max(length - NEAR, 0)
            return whole * self.gain[0, channels, None] + F.pad(lags, (0 if self.causal else beyond, beyond))

    def factors(self, length: int) -> list[Factor]:
        """Return what makes the lags, in order: columns of ``learned`` (near lag 0 all), a matrix, and which lags."""
        reach, zero = min(NEAR, length), 0 if self.causal else length - 1
        near, middle = zero if self.causal else reach - 1, self.lags_of.shape[1] - NEAR
        factors = [Factor(ALL, self.lags_of[:, middle - near : middle + reach], slice(zero - near, zero + reach))]
        if isinstance(self.kernel, MultiscaleKernel):
            back = [] if self.causal else self.kernel.far(1, length, NEAR)
            factors = [*back, *factors, *self.kernel.far(0, length, NEAR)]
        return factors

    def learned(self, channels: slice = ALL) -> Tensor:
        """Return all parameters times their gains, ``(C, P)``: a multi-scale kernel's pieces, skip, branches."""
        with torch.autocast(self.skip.device.type, enabled=False):
            gains, skip, branches = self.gain.T, self.skip[:, None], list(self.branches)
            if channels != ALL:
                gains, skip, *branches = (x[channels] for x in (gains, skip, *branches))
            learned = [skip, *branches]
            if isinstance(self.kernel, MultiscaleKernel):
                learned = [*self.kernel.pieces(channels).flatten(2).unbind(), *learned]
            return torch.cat(learned, dim=1) * (gains @ self.gain_of)

    def start(self, batch: int) -> State:
        """Return the state before the first token: of a sum of exponentials, or of a filter of l_max taps."""
        if isinstance(self.kernel, ExponentialKernel):
            return self.kernel.start(batch, self.heard)
        return FFTConvState.start(self.bias[:, None], batch)._asdict()

    def prefill(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """Convolve the tokens ``u: (B, L, C)``; beyond l_max of them a filter of l_max taps drops the oldest."""
        if isinstance(self.kernel, ExponentialKernel):
            y, state = self.kernel.prefill(u, state, self.lags, self.gain[0])
        else:
            past, taps = FFTConvState(**state), self.kernel.l_max
            kernel = self.lags(min(taps, int(past.position[0]) + u.shape[1]))
            y, after = fft_conv_prefill(u, past, kernel, taps=taps)
            state = after._asdict()
        return y + self.bias.to(y.dtype), state

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """Convolve one token ``u: (B, C)``, with the kernel as it is now; in eval mode it is built once."""
        if isinstance(self.kernel, ExponentialKernel):
            first = self.cached("first lags", lambda: self.lags(self.heard + 1))
            y, state = self.kernel.prefill(u[:, None], state, lambda _: first, self.gain[0])
            y = y[:, 0]
        else:
            kernel = self.cached("kernel", lambda: StepKernel(self.lags(self.kernel.l_max)))
            y, after = fft_conv_step(u, FFTConvState(**state), kernel)
            state = after._asdict()
        return y + self.bias.to(y.dtype), state

    def state_size(self, length: int) -> int:
        """Count the numbers of a sequence that the state of ``length`` tokens holds, beside its position, at most."""
        if isinstance(self.kernel, ExponentialKernel):
            return sum(tensor.numel() for tensor in self.start(1).values())
        return 2 * self.kernel.d_model * room(length, self.kernel.l_max)


def _gains_and_lags(branches: tuple[int, ...], causal: bool, kernel: LongKernel) -> tuple[Tensor, Tensor]:
    """Return where the P numbers of a channel in ``LongConv.learned`` belong.

    Returns:
        Constant matrices: to which gain each belongs, ``(1 + J, P)``, and which lags near 0 it makes,
        ``(P, 2·NEAR − 1)`` with lag 0 in the middle, if causal ``(P, NEAR)`` from lag 0 on.
    """
    lags, gains, before = [0], [0], 0 if causal else NEAR - 1
    for j, size in enumerate(branches):
        left = size - 1 if causal else (size - 1) // 2
        lags += [left - tap for tap in range(size)]
        gains += [1 + j] * size
    lags_of = [torch.eye(before + NEAR)[[before + lag for lag in lags]]]
    if isinstance(kernel, MultiscaleKernel):
        near = kernel.near(NEAR)
        back = [] if causal else [F.pad(near[:, :-1].flip(1), (0, NEAR))]
        lags_of = [F.pad(near, (before, 0)), *back, *lags_of]
        gains = [0] * kernel.directions * len(near) + gains
    return torch.eye(1 + len(branches))[gains].T, torch.cat(lags_of)


class ShortLongConv(nn.Module):
    """``u = SiLU(short * x)``, ``c = SiLU(long * u + b)``, depthwise; see ``LongConv`` for what is in the long kernel.

    Padding is absent: x is zeroed there before the short convolution, u before the long one, c after it.

    Args:
        d_model: Number of channels C.
        l_max: Longest sequence the long kernel is built for.
        causal: Whether output t sees inputs up to t only.
        short_kernel: Taps of the short convolution; odd unless causal.
        long_kernel: A name in ``LONG_KERNELS``.
        kernel_options: Further arguments of that kernel's constructor.
        mode: Which of the two stages there are; "none" passes x through.
        branches: Sizes of the short kernels that are trained beside the long one; they are one kernel when it runs.

    Raises:
        ValueError: An unknown mode or kernel, or a short kernel or branch that is even without being causal.

    Source: arXiv 2406.08128; the kernels are SGConv's and MEGA's (see ``chela.layers.long_kernel``).

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
        long_kernel: Literal["multiscale", "ema"] = "multiscale",
        kernel_options: dict[str, Any] | None = None,
        mode: Literal["short-long", "short", "long", "none"] = "short-long",
        branches: tuple[int, ...] = (5, 31),
    ) -> None:
        super().__init__()
        even = [taps for taps in (short_kernel, *branches) if taps % 2 == 0]
        if even and not causal:
            raise ValueError(f"ShortLongConv: expected odd numbers of taps when not causal, got {even[0]}")
        self.d_model, self.causal = d_model, causal
        self.short = ShortConv(d_model, short_kernel, causal=causal) if "short" in mode else None
        self.long = None
        if "long" in mode:
            kernel = LONG_KERNELS[long_kernel](d_model, l_max, causal=causal, **(kernel_options or {}))
            self.long = LongConv(kernel, branches, deviation=1.0 if self.short is None else SHORT_DEVIATION)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map ``x: (B, L, C)`` to c ``(B, L, C)``, 0 where ``mask: (B, L)`` is False; None: all tokens are real."""
        return zero_padding(self.stages(zero_padding(x, mask), mask)[1], mask)

    def stages(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x: (B, L, C)``, 0 at padding, to u and c; without a short stage both are c.

        At padding c means nothing, but it is finite.
        """
        u = x if self.short is None else zero_padding(self.short(x), mask)
        c = u if self.long is None else F.silu(self.long(u))
        return c if self.short is None else u, c

    def start(self, batch: int) -> State:
        """Return the state before the first token, ``short.…`` and ``long.…``."""
        expect_causal(self)
        short = {} if self.short is None else nested("short", self.short.start(batch))
        return short | ({} if self.long is None else nested("long", self.long.start(batch)))

    def advance(self, form: Literal["prefill", "step"], x: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Map the tokens ``x: (B, L, C)`` after those of ``state``, or one token ``(B, C)``, to u, c and the new state.

        A step takes O(C·log² K) time on average for a long kernel of K taps.
        """
        u, after = x, State()
        if self.short is not None:
            u, end = getattr(self.short, form)(x, part("short", state))
            after |= nested("short", end)
        c = u
        if self.long is not None:
            y, end = getattr(self.long, form)(u, part("long", state))
            c, after = F.silu(y), after | nested("long", end)
        return c if self.short is None else u, c, after

    def state_size(self, length: int) -> int:
        """Count the numbers of a sequence that the state of ``length`` tokens holds, beside its position, at most."""
        short = 0 if self.short is None else self.short.weight.numel()
        return short + (0 if self.long is None else self.long.state_size(length))
