"""S4D: a diagonal state space model as a long convolution (arXiv 2206.11893).

Shapes: B batch, L length, D model width (one system per channel), N state size, of which N/2 conjugate pairs are kept.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.long_kernel import KERNEL_LR, ExponentialKernel
from chela.layers.param_groups import mark
from chela.layers.state import State, expect_causal
from chela.ops.fft_conv import fft_conv
from chela.ops.padding import zero_padding
from chela.ops.sequence_parallel import extent


class S4D(nn.Module):
    """Diagonal state spaces, GELU, then a gated linear unit over channels (arXiv 2206.11893, section 3).

    Per channel, A diagonal and complex, discretised by zero-order hold::

        s_t = Ā s_{t−1} + B̄ x_t,   y_t = 2 Re(C s_t) + D x_t,   Ā = exp(Δ A),  B̄ = (Ā − 1) / A
        h = a ⊙ σ(b),   [a, b] = W GELU(y)

    ``forward`` convolves with the kernel 2 Re Σ_n C_n B̄_n Ā_n^t, O(D·L·log L + D·N·L) time and O(D·(L + N√L)) memory;
    ``step`` is the recurrence. When bidirectional a second C makes the kernel that looks ahead.

    Args:
        d_model: Width D.
        l_max: Longest sequence expected; the kernel itself is defined for any length.
        causal: No position sees a later one.
        d_state: Real state size N per channel, even.
        dt_min: Smallest initial step Δ, about one over the longest memory in tokens (1e-4 for Path-X).
        dt_max: Largest initial step.

    >>> S4D(16, l_max=100)(torch.randn(2, 50, 16)).shape
    torch.Size([2, 50, 16])
    """

    in_pieces = True

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        causal: bool = False,
        d_state: Annotated[int, {"ge": 2, "le": 4096}] = 64,
        dt_min: Annotated[float, {"gt": 0, "le": 1}] = 1e-3,
        dt_max: Annotated[float, {"gt": 0, "le": 1}] = 1e-1,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.kernel = S4DKernel(d_model, l_max, causal=causal, d_state=d_state, dt_min=dt_min, dt_max=dt_max)
        self.skip = nn.Parameter(torch.empty(d_model))
        self.out = nn.Linear(d_model, 2 * d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw D from N(0, 1); the submodules draw their own."""
        nn.init.normal_(self.skip)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over the tokens that are True in ``mask: (B, L)``."""
        length, channels = extent(x)
        forward, back = self.kernel(length, channels)
        y = fft_conv(zero_padding(x, mask), forward, kernel_back=back, skip=self.skip[channels])
        return zero_padding(self._out(y), mask)

    def start(self, batch: int) -> State:
        """Return ``modes (B, D, N/2, 2)``, pairs of real and imaginary parts."""
        expect_causal(self)
        return self.kernel.start(batch)

    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed ``x: (B, L, D)``."""
        y, state = self.kernel.prefill(x, state, lambda length: self.kernel(length)[0])
        return self._out(torch.addcmul(y, self.skip, x).to(x.dtype)), state

    @torch.no_grad()
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token ``x: (B, D)``."""
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def _out(self, y: Tensor) -> Tensor:
        return F.glu(self.out(F.gelu(y)), dim=-1)

    def state_size(self, length: int) -> int:
        """Count the real numbers of the modes."""
        return 2 * self.kernel.frequency.numel()


class S4DKernel(ExponentialKernel):
    """The impulse response of S4D, K_t = 2 Re Σ_n C_n B̄_n Ā_n^t, from the S4D-Lin start A_n = −½ + iπn.

    A and Δ (shared by the two directions) learn at the rate of kernels without decay, C at the model's rate.

    Source: arXiv 2206.11893, sections 3.2 (kernel) and 4 (S4D-Lin).
    """

    def __init__(self, d_model: int, l_max: int, *, causal: bool, d_state: int, dt_min: float, dt_max: float) -> None:
        super().__init__(d_model, l_max, causal=causal)
        if d_state % 2 or dt_min > dt_max:
            raise ValueError(f"s4d: expected an even d_state and dt_min <= dt_max, got {d_state}, {dt_min}, {dt_max}")
        self.dt_range = dt_min, dt_max
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_damping = nn.Parameter(torch.empty(d_model, d_state // 2))
        self.frequency = nn.Parameter(torch.empty(d_model, d_state // 2))
        self.output_matrix = nn.Parameter(torch.empty(self.directions, d_model, d_state // 2, 2))
        mark(self, "log_dt", "log_damping", "frequency", lr=KERNEL_LR, weight_decay=0.0)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw Δ log-uniformly from its range and C from complex N(0, 1); set A to that of S4D-Lin."""
        low, high = self.dt_range
        nn.init.uniform_(self.log_dt, math.log(low), math.log(high))
        nn.init.constant_(self.log_damping, math.log(0.5))
        self.frequency.copy_(math.pi * torch.arange(self.frequency.shape[1]).expand_as(self.frequency))
        nn.init.normal_(self.output_matrix, std=math.sqrt(0.5))

    def exponentials(self) -> tuple[Tensor, Tensor]:
        """Return log Ā ``(1, D, N/2)`` and 2·C·B̄ ``(directions, D, N/2)``, complex."""
        a = torch.complex(-torch.exp(self.log_damping), self.frequency)
        log_transition = a * torch.exp(self.log_dt)[:, None]
        output_matrix = torch.view_as_complex(self.output_matrix)
        return log_transition[None], 2 * output_matrix * (torch.expm1(log_transition) / a)


MIXER = S4D
