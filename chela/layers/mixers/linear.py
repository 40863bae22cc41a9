"""The linear transformer (arXiv 2006.16236)."""

from __future__ import annotations

from torch import Tensor

from chela.layers.feature_map import elu_plus_one
from chela.layers.multi_head import MultiHead
from chela.layers.recurrence import expect_causal
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step


class LinearAttention(MultiHead):
    """Linear attention with elu + 1 features, normalised (arXiv 2006.16236, section 3.2).

    Per head, with φ(x) = elu(x) + 1::

        o_i = Σ_j (φ(q_i)·φ(k_j)) v_j / Σ_j φ(q_i)·φ(k_j)

    O(L·V·(D + Z)) time, O(L·V) memory; see ``MultiHead`` for the arguments and letters.

    >>> import torch
    >>> LinearAttention(16)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over real tokens; ``mask: (B, L)`` bool, True = real."""
        q, k, v = self.split(x)
        o = linear_attention(elu_plus_one(q), elu_plus_one(k), v, causal=self.causal, mask=mask, normalize=True)
        return self.merge(o, mask)

    def step(self, x: Tensor, state: LinearAttentionState | None = None) -> tuple[Tensor, LinearAttentionState]:
        """Feed one token ``x: (B, D)``; ``state`` is what the last call returned, None before the first token."""
        expect_causal(self)
        q, k, v = self.split(x)
        if state is None:
            state = LinearAttentionState.zeros(len(x), self.heads, self.head_width, self.head_width, device=x.device)
        o, state = linear_attention_step(elu_plus_one(q), elu_plus_one(k), v, state, normalize=True)
        return self.merge(o, None), state

    def state_size(self, length: int) -> int:
        """Count the numbers that ``step`` remembers of ``length`` tokens."""
        return self.d_value * (self.head_width + 1)
