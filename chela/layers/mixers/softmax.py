"""Softmax attention, the transformer's own (arXiv 1706.03762)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.layers.multi_head import MultiHead
from chela.layers.padding import zero_padding
from chela.layers.rotary import rotate


class SoftmaxAttention(MultiHead):
    """Multi-head softmax attention (arXiv 1706.03762, section 3.2), rotary positions (2104.09864) on queries and keys.

    Per head::

        o_i = Σ_j softmax_j(q_i·k_j / √Z) v_j

    O(L²·V) time, O(L·V) memory through the fused kernel (O(B·L²) when causal with a mask). Learned positions are the
    backbone's: ``model.positions=learned model.mixer.rotary=false``. See ``MultiHead`` for the other arguments.

    Args:
        d_model: Width D.
        heads: Attention heads H.
        d_value: Width V of queries, keys and values, all heads together; None is D.
        rotary: Turn queries and keys by their position; the width of a head must then be even.
        causal: No position sees a later one.

    >>> SoftmaxAttention(16)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    def __init__(
        self, d_model: int, *, heads: int = 4, d_value: int | None = None, rotary: bool = True, causal: bool = False
    ) -> None:
        super().__init__(d_model, heads=heads, d_value=d_value, causal=causal)
        if rotary and self.head_width % 2:
            raise ValueError(
                f"rotary: expected an even width of a head, got {self.head_width}; change d_value or heads"
            )
        self.rotary = rotary

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x: (B, L, D)`` to what is attended with, ``(B, L, H, Z)`` each."""
        q, k, v = self.split(x)
        return (rotate(q), rotate(k), v) if self.rotary else (q, k, v)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over real tokens; ``mask: (B, L)`` bool, True = real."""
        q, k, v = (t.transpose(1, 2) for t in self.queries_keys_values(zero_padding(x, mask)))
        seen = None if mask is None else self._seen(mask)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.causal and mask is None)
        return self.merge(o.transpose(1, 2), mask)

    def _seen(self, mask: Tensor) -> Tensor:
        """Say which keys each query sees; one that would see none (its output is never read) sees more: no NaN."""
        if not self.causal:
            return (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        before = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
        itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        return (mask[:, None, :] & before | itself)[:, None]

    def state_size(self, length: int) -> int:
        """Count the keys and values that ``length`` tokens leave behind."""
        return 2 * self.d_value * length
