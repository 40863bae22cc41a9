"""The linear transformer (arXiv 2006.16236)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from chela.layers.feature_map import elu_plus_one
from chela.ops.linear_attention import linear_attention


class LinearAttention(nn.Module):
    """Linear attention with elu + 1 features, normalised (arXiv 2006.16236, section 3.2): O(L) time and memory.

    ``o_i = Σ_j (φ(q_i)·φ(k_j)) v_j / Σ_j φ(q_i)·φ(k_j)`` per head.

    Args:
        d_model: Width D.
        heads: Attention heads H; D must be a multiple.
        causal: No position sees a later one.
    """

    def __init__(self, d_model: int, *, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"linear: expected d_model to be a multiple of heads, got {d_model} and {heads}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over real tokens; ``mask: (B, L)`` bool, True = real."""
        q, k, v = rearrange(self.qkv(x), "b l (three h z) -> three b l h z", three=3, h=self.heads)
        o = linear_attention(elu_plus_one(q), elu_plus_one(k), v, causal=self.causal, mask=mask, normalize=True)
        out: Tensor = self.out(rearrange(o, "b l h z -> b l (h z)"))
        return out if mask is None else out * mask.unsqueeze(-1)
