"""Bidirectional linear attention without decay: every token sees the same state, so it is two matrix products.

The products read the tensors where they lie, `(L, D)` slices of `(B, L, H, D)`, one batch row at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops.linear_attention.recurrent import accumulation_dtype


def _row(x: Tensor, b: int, absent: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return batch row b of x `(B, L, H, ·)` as `(H, L, ·)`, zero where absent, without a copy where none is needed."""
    row = x[b].transpose(0, 1).to(dtype)
    return row if absent is None else row.masked_fill(absent[b, None, :, None], 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the normaliser, nothing, and the state `(1, 1, B, H, D, E + normalize)`."""
    B, L, H, D = q.shape
    E = v.shape[-1]
    dtype = accumulation_dtype(v.dtype)
    absent = None if mask is None else ~mask
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    total = torch.empty((B, L, H) if normalize else (0,), dtype=dtype, device=v.device)
    saved = torch.empty(1, 1, B, H, D, E + normalize, dtype=dtype, device=v.device)
    for b in range(B):
        q_, k_, v_ = (_row(x, b, absent, dtype) for x in (q, k, v))
        S = saved[0, 0, b, ..., :E]
        S.copy_(k_.transpose(1, 2) @ v_)
        o = q_ @ S
        if normalize:
            saved[0, 0, b, ..., E] = k_.sum(1)
            t = (q_ @ saved[0, 0, b, ..., E:])[..., 0]
            total[b] = t.T
            o /= (t + eps)[..., None]
        out[b] = o.transpose(0, 1)
    return out, total, saved.new_empty(0), saved


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    saved: Tensor,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; nothing for decays and state."""
    E, dtype = v.shape[-1], saved.dtype
    absent = None if mask is None else ~mask
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for b in range(q.shape[0]):
        q_, k_, v_, do = (_row(x, b, absent, dtype) for x in (q, k, v, d_out))
        S = saved[0, 0, b, ..., :E]
        if normalize:
            scale = 1 / (total[b].T + eps)[..., None]
            d_total = -(do * out[b].transpose(0, 1)).sum(-1, keepdim=True) * scale
            do = do * scale
        dS = q_.transpose(1, 2) @ do
        dq_, dk_ = do @ S.transpose(1, 2), v_ @ dS.transpose(1, 2)
        if normalize:
            dq_ += d_total * saved[0, 0, b, ..., E][:, None]
            dk_ += (q_ * d_total).sum(1, keepdim=True)
        if absent is not None:
            dk_.masked_fill_(absent[b, None, :, None], 0)
            dq_.masked_fill_(absent[b, None, :, None], 0)
        dq[b], dk[b], dv[b] = dq_.transpose(0, 1), dk_.transpose(0, 1), (k_ @ dS).transpose(0, 1)
    nothing = saved.new_empty(0)
    return dq, dk, dv, nothing, nothing.clone(), nothing.clone()
