"""S4D: a diagonal state space model as a long convolution (arXiv 2206.11893).

Shapes: B batch, L length, D model width (one system per channel), N state size, of which N/2 conjugate pairs are kept.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.expect import checked, expect_causal
from chela.layers.long_kernel import KERNEL_LR, LongKernel
from chela.layers.padding import zero_padding
from chela.layers.param_groups import mark
from chela.ops.fft_conv import fft_conv


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

    def forward(self, x: Tensor, mask: Tensor | None = None, stream: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over the tokens that are True in ``mask: (B, L)``; ``stream`` is not needed."""
        forward, back = self.kernel(x.shape[1])
        y = fft_conv(zero_padding(x, mask), forward, kernel_back=back, skip=self.skip)
        return zero_padding(self._out(y), mask)

    def start(self, batch: int) -> Tensor:
        """Return the state before the first token, for ``step``: zeros ``(B, D, N/2)``, complex."""
        expect_causal(self)
        return torch.view_as_complex(self.kernel.output_matrix.new_zeros(batch, *self.kernel.frequency.shape, 2))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Feed one token ``x: (B, D)`` to the recurrence; return its output ``(B, D)`` and the new state."""
        log_transition, input_matrix, output_matrix = self.kernel.discretised()
        state = torch.exp(log_transition) * state + input_matrix * x[..., None]
        y = 2 * (output_matrix[0] * state).real.sum(-1) + self.skip * x
        return self._out(y.to(x.dtype)), state

    def _out(self, y: Tensor) -> Tensor:
        return F.glu(self.out(F.gelu(y)), dim=-1)

    def state_size(self, length: int) -> int:
        """Count the real numbers that ``step`` remembers of ``length`` tokens."""
        return 2 * self.kernel.frequency.numel()


class S4DKernel(LongKernel):
    """The impulse response of S4D, K_t = 2 Re Σ_n C_n B̄_n Ā_n^t, from the S4D-Lin start A_n = −½ + iπn.

    A and Δ (shared by the two directions) learn at the rate of kernels without decay, C at the model's rate.

    Source: arXiv 2206.11893, sections 3.2 (kernel) and 4 (S4D-Lin).
    """

    extends_beyond_l_max = True

    def __init__(self, d_model: int, l_max: int, *, causal: bool, d_state: int, dt_min: float, dt_max: float) -> None:
        super().__init__(d_model, l_max, causal=causal)
        if d_state < 2 or d_state % 2 or not 0 < dt_min <= dt_max:
            raise ValueError(
                f"s4d: expected an even d_state and 0 < dt_min <= dt_max, got {d_state}, {dt_min} and {dt_max}"
            )
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

    def discretised(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log Ā and B̄ ``(D, N/2)``, and C ``(directions, D, N/2)``, all complex."""
        a = torch.complex(-torch.exp(self.log_damping), self.frequency)
        log_transition = a * torch.exp(self.log_dt)[:, None]
        return log_transition, torch.expm1(log_transition) / a, torch.view_as_complex(self.output_matrix)

    def build(self, length: int) -> Tensor:
        """Sum the damped oscillations."""
        with torch.autocast(self.log_dt.device.type, enabled=False):
            log_transition, input_matrix, output_matrix = self.discretised()
            return 2 * self.sum_of_powers(log_transition, output_matrix * input_matrix, length)


MIXER = S4D
