"""Hedgehog: linear attention with features that learn to imitate softmax (arXiv 2402.04347)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chela.core.options import checked
from chela.layers.mixers.linear import LinearAttention
from chela.layers.multi_head import Heads, Taps, Width
from chela.layers.param_groups import mark


class HedgehogAttention(LinearAttention):
    """Normalised linear attention with a learned feature map of its own for queries and for keys.

    Per head (arXiv 2402.04347, section 4.1)::

        φ(x) = softmax([W x + b, −W x − b])            W = 1 and b = 0 at the start
        o_i = Σ_j (φ_q(q_i)·φ_k(k_j)) v_j / Σ_j φ_q(q_i)·φ_k(k_j)

    O(L·V·(D + Z)) time, O(L·V) memory; see ``MultiHead`` for the arguments.

    >>> HedgehogAttention(16)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    features_per_width = 2

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        heads: Heads = 4,
        d_value: Width = None,
        short: Taps = 0,
        causal: bool = False,
    ) -> None:
        super().__init__(d_model, heads=heads, d_value=d_value, short=short, causal=causal)
        self.query_map = HedgehogFeatureMap(heads, self.head_width)
        self.key_map = HedgehogFeatureMap(heads, self.head_width)

    def features(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map the projection ``y: (..., 3V)`` to φ(q), φ(k) ``(..., H, 2Z)`` and v ``(..., H, Z)``."""
        q, k, v = self.split(y)
        return self.query_map(q), self.key_map(k), v


class HedgehogFeatureMap(nn.Module):
    """Hedgehog's learned map, φ(x) = softmax([W x + b, −W x − b]) per head (arXiv 2402.04347, section 4.1).

    There is no weight decay: it would pull all tokens to the same features.

    >>> phi = HedgehogFeatureMap(2, 4)(torch.randn(3, 10, 2, 4))
    >>> tuple(phi.shape), bool((phi > 0).all())
    ((3, 10, 2, 8), True)
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width, width))
        self.bias = nn.Parameter(torch.empty(heads, width))
        mark(self, "weight", "bias", weight_decay=0.0)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from the identity."""
        self.weight.copy_(torch.eye(self.weight.shape[-1]).expand_as(self.weight))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x: (..., H, Z)`` to positive features ``(..., H, 2Z)`` that sum to 1."""
        y = torch.einsum("...hz,hyz->...hy", x, self.weight) + self.bias
        return torch.cat([y, -y], dim=-1).softmax(-1)


MIXER = HedgehogAttention
