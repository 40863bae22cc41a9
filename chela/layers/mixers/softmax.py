"""Softmax attention, the transformer's own (arXiv 1706.03762)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention: O(L²·D) time, O(L·D) memory through the fused kernel.

    ``o_i = Σ_j softmax_j(q_i·k_j / √Z) v_j`` per head, rotary positions (arXiv 2104.09864) on queries and keys.

    Args:
        d_model: Width D.
        heads: Attention heads H; D must be a multiple, and D / H even for rotary positions.
        rotary: Turn queries and keys by their position.
        causal: No position sees a later one.
    """

    def __init__(self, d_model: int, *, heads: int = 4, rotary: bool = True, causal: bool = False) -> None:
        super().__init__()
        if d_model % heads or (rotary and d_model // heads % 2):
            raise ValueError(
                f"softmax: expected an even d_model / heads, got {d_model} / {heads}; change one of the two"
            )
        self.heads, self.rotary, self.causal = heads, rotary, causal
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over real tokens; ``mask: (B, L)`` bool, True = real."""
        q, k, v = rearrange(self.qkv(x), "b l (three h z) -> three b h l z", three=3, h=self.heads)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        allowed = None
        if mask is not None:
            allowed = mask[:, None, None, :]
            if self.causal:
                allowed = allowed & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            # a row with no allowed key would be NaN: let padding look at itself, its output is never read
            allowed = allowed | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=self.causal and mask is None)
        out: Tensor = self.out(rearrange(o, "b h l z -> b l (h z)"))
        return out if mask is None else out * mask.unsqueeze(-1)


def rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn each pair of features of ``x: (B, H, L, Z)`` by an angle that grows with the position (arXiv 2104.09864)."""
    length, width = x.shape[-2:]
    rates = base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
