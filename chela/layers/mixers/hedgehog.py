"""Hedgehog: linear attention whose features learn to be as spiky as softmax (arXiv 2402.04347)."""

from __future__ import annotations

from torch import Tensor

from chela.layers.feature_map import HedgehogFeatureMap
from chela.layers.multi_head import MultiHead
from chela.layers.padding import zero_padding
from chela.layers.rotary import rotate
from chela.ops.linear_attention import linear_attention


class HedgehogAttention(MultiHead):
    """Normalised linear attention with a learned feature map of its own for queries and for keys.

    Per head (arXiv 2402.04347, section 4.1)::

        φ(x) = softmax([W x + b, −W x − b])            W = 1 and b = 0 at the start
        o_i = Σ_j (φ_q(q_i)·φ_k(k_j)) v_j / Σ_j φ_q(q_i)·φ_k(k_j)

    O(L·V·(D + Z)) time, O(L·V) memory. To take over the weights of a trained softmax layer, see
    ``chela.layers.distill``.

    Args:
        d_model: Width D.
        heads: Attention heads H.
        d_value: Width V of queries, keys and values, all heads together; None is D.
        rotary: Turn queries and keys by their position before the map, as a converted transformer's need it.
        causal: No position sees a later one.

    >>> import torch
    >>> HedgehogAttention(16)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    def __init__(
        self, d_model: int, *, heads: int = 4, d_value: int | None = None, rotary: bool = False, causal: bool = False
    ) -> None:
        super().__init__(d_model, heads=heads, d_value=d_value, causal=causal)
        if rotary and self.head_width % 2:
            raise ValueError(
                f"rotary: expected an even width of a head, got {self.head_width}; change d_value or heads"
            )
        self.rotary = rotary
        self.query_map = HedgehogFeatureMap(heads, self.head_width)
        self.key_map = HedgehogFeatureMap(heads, self.head_width)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x: (B, L, D)`` to φ(q), φ(k) ``(B, L, H, 2Z)`` and v ``(B, L, H, Z)``."""
        q, k, v = self.split(x)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        return self.query_map(q), self.key_map(k), v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over real tokens; ``mask: (B, L)`` bool, True = real."""
        q, k, v = self.features(zero_padding(x, mask))
        return self.merge(linear_attention(q, k, v, causal=self.causal, mask=mask, normalize=True), mask)

    def state_size(self, length: int) -> int:
        """Count the numbers that the causal form remembers of ``length`` tokens: S and z for 2Z features."""
        return 2 * self.d_value * (self.head_width + 1)
