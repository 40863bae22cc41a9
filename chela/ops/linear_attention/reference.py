"""The definition of linear attention, written as it stands: every weight of the L × L matrix M.

O(L² (D + E)) time and O(L²) memory. Every other backend is held to it; for long sequences use those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops.linear_attention.operator import Call
from chela.ops.padding import zero_padding


def lowest_log_decay(dtype: torch.dtype) -> float:
    """Return a finite log decay whose exp is 0 in ``dtype``; it stands for all below it, −inf too."""
    return -750.0 if dtype == torch.float64 else -110.0


def log_decays(log_decay: Tensor | None, like: Tensor, mask: Tensor | None) -> Tensor:
    """Return the log decay of every edge, ``(B, H, L)`` float64: 0 without decay and for the edge of a masked token."""
    B, L, H, _ = like.shape
    if log_decay is None:
        return torch.zeros(B, H, L, dtype=torch.float64, device=like.device)
    edges = log_decay.double().clamp(min=lowest_log_decay(torch.float64)).expand(B, L, H).transpose(1, 2)
    return edges if mask is None else edges.masked_fill(~mask[:, None, :], 0)


def weights(
    q: Tensor, *, causal: bool, log_decay: Tensor | None, log_decay_back: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Return M ``(B, H, L, L)``, the weight of token j (last axis) in the output of token i, in float64."""
    above = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)  # j > i
    ahead = log_decays(log_decay, q, mask).cumsum(-1)
    M = (ahead[..., :, None] - ahead[..., None, :]).masked_fill(above, 0).exp()
    if causal:
        return M.masked_fill(above, 0)
    back = log_decays(log_decay_back, q, mask).cumsum(-1)
    return torch.where(above, (back[..., None, :] - back[..., :, None]).masked_fill(~above, 0).exp(), M)


def heads_first(c: Call, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v ``(B, H, L, ·)`` in the dtype of sums unless given, v with its column of ones; padding is 0."""
    tensors = [c.q, c.k, torch.cat([c.v, torch.ones_like(c.v[..., :1])], -1) if c.ones else c.v]
    if c.mask is not None:
        tensors = [zero_padding(x.flatten(2), c.mask).view(x.shape) for x in tensors]
    q, k, v = (x.to(dtype or c.sum_dtype).transpose(1, 2) for x in tensors)
    return q, k, v


def divided(sums: Tensor, c: Call) -> Tensor:
    """Return the output ``(B, L, H, E)`` of the sums ``(B, H, L, E + ones)``: divided by the last column if asked."""
    E = c.v.shape[-1]
    out = sums[..., :E]
    if c.normalize:
        total = c.eps + sums[..., E:]
        out = out / (total if c.mask is None else total.masked_fill(~c.mask[:, None, :, None], 1))
    return out.transpose(1, 2).to(c.v.dtype)


def linear_attention_reference(c: Call) -> tuple[Tensor, Tensor]:
    """Return the output and the last state of a call; the chunk size has no meaning here."""
    q, k, v = heads_first(c)
    M = weights(c.q, causal=c.causal, log_decay=c.log_decay, log_decay_back=c.log_decay_back, mask=c.mask)
    edges = log_decays(c.log_decay, c.q, c.mask)
    ahead, over = edges.cumsum(-1), edges.sum(-1, keepdim=True)
    sums = ((q @ k.mT) * M.to(q.dtype)) @ v
    end = (k * (over - ahead).exp().to(k.dtype)[..., None]).mT @ v
    if c.state is not None:
        state = c.state.to(q.dtype)
        sums = sums + (q * ahead.exp().to(q.dtype)[..., None]) @ state
        end = end + state * over.exp().to(k.dtype)[..., None]
    return divided(sums, c), end
