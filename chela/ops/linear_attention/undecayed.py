"""Bidirectional linear attention without decay, on every device: all tokens see one state, so it is two products.

Shapes: N = B·H, tokens ``(N, L, ·)``, the state S = Σ k vᵀ ``(N, D, E)``, its sum of keys z ``(N, D, 1)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chela.ops.linear_attention.operator import Call
from chela.ops.padding import fill_rows_, may_look, rows_where
from chela.ops.precision import accumulation_dtype


def attend_undecayed(c: Call) -> tuple[Tensor, None]:
    """Return the output ``(B, L, H, E)`` of a call; there is no last state."""
    return _TwoProducts.apply(c.q, c.k, c.v, c.mask, c.normalize, c.eps), None  # type: ignore[no-untyped-call]


def factor_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which inputs like x are multiplied: that of sums, but for bfloat16 on tensor cores.

    In float16 the state, which is a factor too, would overflow.
    """
    on_tensor_cores = x.dtype == torch.bfloat16 and x.device.type == "cuda" and torch.version.hip is None
    return x.dtype if on_tensor_cores else accumulation_dtype(x.dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b with factors of that dtype, in the dtype of sums."""
    if dtype == torch.bfloat16:
        return torch.bmm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    return torch.bmm(a, b)


class _Heads:
    """Takes the heads of ``(B, L, H, ·)`` apart."""

    def __init__(self, like: Tensor, mask: Tensor | None) -> None:
        self.shape, self.dtype = like.shape[:3], factor_dtype(like)
        self.absent = None if mask is None else (~mask)[:, None].expand(-1, like.shape[2], -1).flatten(0, 1)
        self.rows = rows_where(self.absent) if self.absent is not None and may_look(like) else None

    def apart(self, x: Tensor) -> Tensor:
        """Return ``(N, L, ·)``, 0 where absent."""
        y = x.transpose(1, 2).to(self.dtype)
        return y.flatten(0, 1) if self.absent is None else self.fill_(y.clone(memory_format=torch.contiguous_format), 0)

    def fill_(self, y: Tensor, value: float) -> Tensor:
        """Set ``(N, L, ·)`` to a value where tokens are absent, in place."""
        y = y.view(-1, self.shape[1], y.shape[-1])
        if self.rows is not None:
            return fill_rows_(y, self.rows, value)
        return y if self.absent is None else y.masked_fill_(self.absent[..., None], value)

    def together(self, y: Tensor, like: Tensor) -> Tensor:
        """Return ``(N, L, ·)`` as ``(B, L, H, ·)``."""
        B, L, H = self.shape
        return y.view(B, H, L, -1).transpose(1, 2).to(like.dtype).contiguous()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b."""
        return product(a, b, self.dtype)


class _TwoProducts(torch.autograd.Function):
    """Keeps its inputs and results, and takes heads apart again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, normalize: bool, eps: float) -> Tensor:
        heads = _Heads(q, mask)
        q_, k_, z, total = heads.apart(q), heads.apart(k), None, None
        S = heads.product(k_.mT, heads.apart(v))
        sums = heads.product(q_, S)
        if normalize:
            z = k_.sum(1, dtype=S.dtype)[..., None]
            total = heads.fill_(heads.product(q_, z).add_(eps), 1)
            sums /= total
        out = heads.together(sums, v)
        ctx.save_for_backward(q, k, v, mask, S, z, total, out if normalize else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, S, z, total, out = ctx.saved_tensors
        heads = _Heads(q, mask)
        q_, g, d_total = heads.apart(q), heads.apart(d_out), None
        if total is not None:  # out = sums / total
            d_total = (g * heads.apart(out).to(S.dtype)).sum(-1, keepdim=True).div_(total).neg_()
            g = g / total
        dS = heads.product(q_.mT, g)
        dq, dk = heads.product(g, S.mT), heads.product(heads.apart(v), dS.mT)
        if d_total is not None:
            dq.addcmul_(d_total, z.mT)
            dk = heads.fill_(dk.add_(heads.product(d_total.mT, q_)), 0)
        dv = heads.product(heads.apart(k), dS)
        return *(heads.together(x, like) for x, like in ((dq, q), (dk, k), (dv, v))), None, None, None
