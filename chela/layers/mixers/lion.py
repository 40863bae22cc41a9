"""LION: linear attention in both directions, in three equal forms (arXiv 2502.16249)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.mixers.linear import LinearAttention
from chela.layers.multi_head import Heads, Taps, Width
from chela.layers.state import State, detached
from chela.ops.sequence_parallel import current


class LION(LinearAttention):
    """LION-LIT, LION-D and LION-S (arXiv 2502.16249, sections 3 and 4), told apart by ``decay``.

    Per head, with φ(x) = (SiLU(x) + ½) / ‖SiLU(x) + ½‖::

        o_i = Σ_j M_ij (φ(q_i)·φ(k_j)) v_j / (ε + Σ_j M_ij φ(q_i)·φ(k_j)),     M_ii = 1
        LIT  M_ij = 1
        D    M_ij = λ^|i−j|                                    λ learned per head
        S    M_ij = λ_j ⋯ λ_{i−1} for j < i,  λ_{i+1} ⋯ λ_j for j > i,     λ_t = σ(W x_t + b) per head

    ``forward`` takes the chunked form, O(L·V·(D + Z)) time and O(L·V) memory; the full form is ``backend="reference"``
    of the op. With ``causal=True`` M_ij = 0 for j > i, and ``step`` is the recurrence. See ``MultiHead`` for the other
    arguments.

    Args:
        decay: Of the attention weights: "none" is LION-LIT, "head" LION-D, "token" LION-S.

    >>> LION(16, decay="token")(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        heads: Heads = 4,
        d_value: Width = None,
        short: Taps = 0,
        decay: Literal["none", "head", "token"] = "token",
        causal: bool = False,
    ) -> None:
        super().__init__(d_model, heads=heads, d_value=d_value, short=short, causal=causal)
        self.head_decay = HeadDecay(heads) if decay == "head" else None
        self.token_decay = TokenDecay(d_model, heads) if decay == "token" else None

    def feature_map(self, x: Tensor) -> Tensor:
        """Return (SiLU(x) + ½) / ‖SiLU(x) + ½‖ over the last dimension, positive."""
        return F.normalize(F.silu(x) + 0.5, dim=-1)

    def start(self, batch: int) -> State:
        """Return the sums; LION-S has log λ ``(B, H)`` of the last token too."""
        state = super().start(batch)
        last = {} if self.token_decay is None else {"log_decay": state["S"].new_zeros(batch, self.heads)}
        return state | last

    def onward(self, x: Tensor, state: State) -> tuple[Tensor | None, State]:
        """Return log λ of the edges into ``x: (B, L, D)``; for LION-S the first one has that of the token before."""
        if self.token_decay is None:
            return super().onward(x, state)
        log_decay = self.token_decay(x)
        before = state["log_decay"][:, None].to(log_decay.dtype)
        last = detached(log_decay=log_decay[:, -1].to(state["log_decay"].dtype))
        return torch.cat([before, log_decay[:, :-1]], dim=1), last

    def state_size(self, length: int) -> int:
        """Count the sums, and the last token's decay."""
        return super().state_size(length) + (0 if self.token_decay is None else self.heads)

    def edges(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return log λ forth and back: none, learned, or of the token that an edge leaves."""
        if self.head_decay is not None:
            return self.head_decay(), self.head_decay()
        if self.token_decay is not None:
            log_decay = self.token_decay(x)
            return from_previous(log_decay, mask), log_decay
        return None, None


def from_previous(log_decay: Tensor, mask: Tensor | None = None) -> Tensor:
    """Shift ``log_decay: (B, L, H)`` by one real token, so that the edge t−1 → t has the λ of token t−1.

    Padding, where ``mask: (B, L)`` is False, is stepped over; there is 0 where there is no token before.
    """
    length, piece = log_decay.shape[1], current()
    if mask is None and piece is None:
        return F.pad(log_decay[:, :-1], (0, 0, 1, 0))
    place = torch.arange(1, 1 + length, device=log_decay.device).expand(len(log_decay), -1)
    place = place if mask is None else place.masked_fill(~mask, 0)
    latest = F.pad(place, (1, 0)).cummax(1).values[..., None].expand(-1, -1, log_decay.shape[2])  # 0: none
    known = F.pad(log_decay, (0, 0, 1, 0))
    if piece is not None:
        last = torch.cat([known.gather(1, latest[:, -1:]), (latest[:, -1:, :1] > 0).to(known)], dim=-1)
        before = piece.gather(last)[: piece.rank]  # of the pieces before, (p, B, 1, H + 1)
        first = before.sum(0)[..., :-1] * 0
        for row in before:
            first = torch.where(row[..., -1:] > 0, row[..., :-1], first)
        known = torch.cat([first, log_decay], dim=1)
    return known.gather(1, latest[:, :length])


class HeadDecay(nn.Module):
    """A learned decay per head, log λ = −softplus(a) ≤ 0, with the heads' initial reach spread from near to far."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spread the heads' reach 1 / (1 − λ) over about 4 to 1,000 tokens, on a log scale."""
        with torch.no_grad():
            self.raw.copy_(torch.log(torch.expm1(_spread(self.raw.numel()))))

    def forward(self) -> Tensor:
        """Return log λ ``(H,)``."""
        return -F.softplus(self.raw)


class TokenDecay(nn.Linear):
    """A decay per token and head, λ = σ(W x + b); the biases start spread as those of ``HeadDecay``, W ~ N(0, 0.1²)."""

    def reset_parameters(self) -> None:
        """Draw W and set the biases."""
        nn.init.normal_(self.weight, std=0.1)
        with torch.no_grad():
            self.bias.copy_(-torch.log(torch.expm1(_spread(self.bias.numel()))))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x: (..., D)`` to log λ ``(..., H)``."""
        return F.logsigmoid(super().forward(x))


def _spread(heads: int) -> Tensor:
    """Return −log λ from 10^−0.6 to 10^−3, log-spaced."""
    return torch.logspace(-0.6, -3, heads)


MIXER = LION
