"""The linear transformer (arXiv 2006.16236)."""

from __future__ import annotations

from torch import Tensor

from chela.layers.feature_map import elu_plus_one
from chela.layers.multi_head import MultiHead
from chela.layers.padding import zero_padding
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
        q, k, v = self.split(zero_padding(x, mask))
        o = linear_attention(elu_plus_one(q), elu_plus_one(k), v, causal=self.causal, mask=mask, normalize=True)
        return self.merge(o, mask)

    def start(self, batch: int) -> LinearAttentionState:
        """Return the state before the first token, for ``step``."""
        return self.no_sums(batch)

    def step(self, x: Tensor, state: LinearAttentionState) -> tuple[Tensor, LinearAttentionState]:
        """Feed one token ``x: (B, D)``; return its output ``(B, D)`` and the new state."""
        q, k, v = self.split(x)
        o, state = linear_attention_step(elu_plus_one(q), elu_plus_one(k), v, state, normalize=True)
        return self.merge(o, None), state

    def state_size(self, length: int) -> int:
        """Count the numbers that ``step`` remembers of ``length`` tokens."""
        return self.d_value * (self.head_width + 1)
