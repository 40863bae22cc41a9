"""LION: linear attention in both directions, in three equal forms (arXiv 2502.16249)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chela.layers.decay import HeadDecay, TokenDecay, from_previous
from chela.layers.feature_map import elu_plus_one, shifted_silu
from chela.layers.multi_head import MultiHead
from chela.layers.padding import zero_padding
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step

EPS = 1e-6


class LIONState(NamedTuple):
    """The past of the causal form: sums, and log λ ``(B, H)`` of the last token, which decays the next edge."""

    sums: LinearAttentionState
    log_decay: Tensor | None


class LION(MultiHead):
    """LION-LIT, LION-D and LION-S (arXiv 2502.16249, sections 3 and 4), told apart by ``decay``.

    Per head, with φ(x) = (SiLU(x) + ½) / ‖SiLU(x) + ½‖::

        o_i = Σ_j M_ij (φ(q_i)·φ(k_j)) v_j / (ε + Σ_j M_ij φ(q_i)·φ(k_j)),     M_ii = 1
        LIT  M_ij = 1
        D    M_ij = λ^|i−j|                                    λ learned per head
        S    M_ij = λ_j ⋯ λ_{i−1} for j < i,  λ_{i+1} ⋯ λ_j for j > i,     λ_t = σ(W x_t + b) per head

    ``forward`` takes the chunked form, O(L·V·(D + Z)) time and O(L·V) memory; ``recurrent`` the two recurrences; the
    full form is ``backend="reference"`` of the op. With ``causal=True`` M_ij = 0 for j > i, and there is ``step``.

    Args:
        d_model: Width D.
        heads: Attention heads H.
        d_value: Width V of queries, keys and values, all heads together; None is D.
        decay: "none" (LIT), "head" (D) or "token" (S).
        feature_map: "shifted_silu" (the paper's) or "elu" (elu + 1, what its code does for LIT).
        causal: No position sees a later one.

    >>> x = torch.randn(2, 10, 16)
    >>> lion = LION(16, decay="token")
    >>> torch.allclose(lion(x), lion.recurrent(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        d_value: int | None = None,
        decay: str = "token",
        feature_map: str = "shifted_silu",
        causal: bool = False,
    ) -> None:
        super().__init__(d_model, heads=heads, d_value=d_value, causal=causal)
        _expect("decay", decay, ("none", "head", "token"))
        _expect("feature_map", feature_map, ("shifted_silu", "elu"))
        self.feature_map = elu_plus_one if feature_map == "elu" else shifted_silu
        self.head_decay = HeadDecay(heads) if decay == "head" else None
        self.token_decay = TokenDecay(d_model, heads) if decay == "token" else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over real tokens; ``mask: (B, L)`` bool, True = real."""
        x = zero_padding(x, mask)
        q, k, v = self._features(x)
        forth, back = self._edges(x, mask)
        o = linear_attention(
            q,
            k,
            v,
            causal=self.causal,
            log_decay=forth,
            log_decay_back=None if self.causal else back,
            mask=mask,
            normalize=True,
            eps=EPS,
        )
        return self.merge(o, mask)

    def recurrent(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Do the same token by token, O(V·Z) memory beside inputs and outputs (arXiv 2502.16249, section 3.3).

        One recurrence runs forth and one back; both hold the diagonal, so it is taken off once; numerators and
        denominators are added before the one division.
        """
        x = zero_padding(x, mask)
        q, k, v = self._features(x)
        k, v = zero_padding(k.flatten(2), mask).view_as(k), torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        forth, back = (self._per_token(edge, q, mask) for edge in self._edges(x, mask))
        total = _sweep(q, k, v, forth)
        if not self.causal:
            total = total + _sweep(q.flip(1), k.flip(1), v.flip(1), from_previous(back.flip(1))).flip(1)
            total = total - (q * k).sum(-1, keepdim=True) * v
        return self.merge(total[..., :-1] / (EPS + total[..., -1:]), mask)

    def start(self, batch: int) -> LIONState:
        """Return the state before the first token, for ``step``."""
        sums = self.no_sums(batch)
        return LIONState(sums, None if self.token_decay is None else sums.S.new_zeros(batch, self.heads))

    def step(self, x: Tensor, state: LIONState) -> tuple[Tensor, LIONState]:
        """Feed one token ``x: (B, D)`` to the causal form; return its output ``(B, D)`` and the new state."""
        q, k, v = self._features(x)
        edge = state.log_decay if self.head_decay is None else self.head_decay()
        o, sums = linear_attention_step(q, k, v, state.sums, log_decay=edge, normalize=True, eps=EPS)
        return self.merge(o, None), LIONState(sums, None if self.token_decay is None else self.token_decay(x))

    def state_size(self, length: int) -> int:
        """Count the numbers that ``step`` remembers of ``length`` tokens."""
        return self.d_value * (self.head_width + 1) + (0 if self.token_decay is None else self.heads)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.split(x)
        return self.feature_map(q), self.feature_map(k), v

    def _edges(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return log λ of the edges t−1 → t and t → t−1, each ``(H,)`` or ``(B, L, H)``; None is no decay."""
        if self.head_decay is not None:
            return self.head_decay(), self.head_decay()
        if self.token_decay is not None:
            log_decay = self.token_decay(x)
            return from_previous(log_decay, mask), log_decay
        return None, None

    def _per_token(self, edge: Tensor | None, like: Tensor, mask: Tensor | None) -> Tensor:
        """Write an edge's decay as ``(B, L, H)``, none at padding."""
        edge = like.new_zeros(like.shape[:3]) if edge is None else edge.expand(like.shape[:3])
        return zero_padding(edge, mask)


def _sweep(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Run one recurrence over ``(B, L, H, ·)``."""
    state = LinearAttentionState.zeros(len(q), k.shape[2], k.shape[3], v.shape[3], device=q.device)
    outputs = []
    for t in range(q.shape[1]):
        o, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state, log_decay=log_decay[:, t])
        outputs.append(o)
    return torch.stack(outputs, dim=1)


def _expect(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")
