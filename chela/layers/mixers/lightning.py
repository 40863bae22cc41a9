"""Lightning Attention-2 in TransNormerLLM's block (arXiv 2401.04658, 2405.17381)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.decay import alibi_slopes
from chela.layers.multi_head import MultiHead
from chela.layers.norm import LayerNorm
from chela.layers.padding import zero_padding
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step


class LightningAttention(MultiHead):
    """Causal linear attention with a fixed decay per head and no denominator (arXiv 2401.04658, section 3).

    Per head, SiLU on q, k and v::

        o_t = Σ_{s≤t} λ^(t−s) (q_t·k_s) v_s,     λ_h = exp(−slope_h · (1 − layer/(depth − 1) + 1e-5))
        h = W_o (norm(o) ⊙ σ(W_2 W_1 x))

    with ALiBi's slopes, so that deeper layers look further back; the factor is 1 when there is one layer. W_1 and W_2
    pass through the width of one head. O(L·V·(D + Z)) time, O(L·V) memory, a state of about V·Z numbers.

    Args:
        d_model: Width D.
        heads: Attention heads H.
        d_value: Width V of queries, keys and values, all heads together; None is D.
        layer: Index of the layer, from 0.
        depth: Number of layers.
        causal: Must be True: the definition has no other form.

    Raises:
        ValueError: ``causal=False``, or V no multiple of H.

    >>> LightningAttention(16, heads=4)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    log_decay: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 8,
        d_value: int | None = None,
        layer: int = 0,
        depth: int = 1,
        causal: bool = True,
    ) -> None:
        if not causal:
            raise ValueError("lightning: expected causal=True, the only form it is defined in, got causal=False")
        super().__init__(d_model, heads=heads, d_value=d_value, causal=True)
        factor = 1.0 if depth == 1 else 1 - layer / (depth - 1) + 1e-5
        self.register_buffer("log_decay", -factor * torch.tensor(alibi_slopes(heads)), persistent=False)
        self.norm = LayerNorm(self.d_value)
        self.gate = nn.Sequential(
            nn.Linear(d_model, self.head_width, bias=False), nn.Linear(self.head_width, self.d_value, bias=False)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over real tokens; ``mask: (B, L)`` bool, True = real."""
        x = zero_padding(x, mask)
        q, k, v = (F.silu(t) for t in self.split(x))
        o = linear_attention(q, k, v, causal=True, log_decay=self.log_decay, mask=mask)
        return self._combine(o, x, mask)

    def start(self, batch: int) -> LinearAttentionState:
        """Return the state before the first token, for ``step``."""
        return self.no_sums(batch)

    def step(self, x: Tensor, state: LinearAttentionState) -> tuple[Tensor, LinearAttentionState]:
        """Feed one token ``x: (B, D)``; return its output ``(B, D)`` and the new state."""
        q, k, v = (F.silu(t) for t in self.split(x))
        o, state = linear_attention_step(q, k, v, state, log_decay=self.log_decay)
        return self._combine(o, x, None), state

    def _combine(self, o: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        gated = self.norm(o.flatten(-2)) * torch.sigmoid(self.gate(x))
        return self.merge(gated.view_as(o), mask)

    def state_size(self, length: int) -> int:
        """Count the numbers that ``step`` remembers of ``length`` tokens."""
        return self.d_value * (self.head_width + 1)
