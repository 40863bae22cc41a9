"""Bidirectional linear attention without decay, on every device: all tokens see one state, so it is two products.

Shapes: N = B·H, tokens ``(N, L, ·)``, the state S = Σ k vᵀ ``(N, D, E)``, its sum of keys z ``(N, D, 1)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chela.ops.backend import accumulation_dtype
from chela.ops.linear_attention.operator import Call
from chela.ops.padding import may_look, padding_rows


def attend_undecayed(c: Call) -> tuple[Tensor, None]:
    """Return the output ``(B, L, H, E)`` of a call; there is no last state."""
    return _TwoProducts.apply(c.q, c.k, c.v, c.mask, c.normalize, c.eps), None  # type: ignore[no-untyped-call]


def factor_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which inputs like x are multiplied: that of sums, but for bfloat16 on tensor cores.

    In float16 the state, which is a factor too, would overflow.
    """
    on_tensor_cores = x.dtype == torch.bfloat16 and x.device.type == "cuda" and torch.version.hip is None
    return x.dtype if on_tensor_cores else accumulation_dtype(x.dtype)


class _Heads:
    """Takes the heads of ``(B, L, H, ·)`` apart."""

    def __init__(self, like: Tensor, mask: Tensor | None) -> None:
        self.shape, self.mask, self.dtype = like.shape[:3], mask, factor_dtype(like)

    def apart(self, x: Tensor) -> Tensor:
        """Return ``(N, L, ·)``, 0 where absent."""
        y = x.transpose(1, 2).to(self.dtype)
        if self.mask is not None:
            y = self.fill_(y.clone(memory_format=torch.contiguous_format), 0)
        return y.flatten(0, 1)

    def fill_(self, y: Tensor, value: float) -> Tensor:
        """Set ``(N, L, ·)`` to a value where tokens are absent, in place."""
        if self.mask is not None:
            B, L, H = self.shape
            whole = y.view(B, H, L, -1)
            if may_look(y):
                batch, token = torch.unravel_index(padding_rows(self.mask), (B, L))
                whole[batch, :, token] = value
            else:
                whole.masked_fill_(~self.mask[:, None, :, None], value)
        return y

    def together(self, y: Tensor, like: Tensor) -> Tensor:
        """Return ``(N, L, ·)`` as ``(B, L, H, ·)``."""
        return y.view(self.shape[0], self.shape[2], *y.shape[1:]).transpose(1, 2).to(like.dtype).contiguous()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b with factors of ``dtype``, in the dtype of sums."""
        if self.dtype == torch.bfloat16:
            return torch.bmm(a.to(self.dtype), b.to(self.dtype), out_dtype=torch.float32)
        return torch.bmm(a, b)


class _TwoProducts(torch.autograd.Function):
    """Keeps its inputs and results, and takes heads apart again in the backward pass.

    To normalise, each token has one more value, −1, so that the last of the sums is minus that of the weights.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, normalize: bool, eps: float) -> Tensor:
        heads, total = _Heads(q, mask), None
        values = heads.apart(v)
        S = heads.product(heads.apart(k).mT, F.pad(values, (0, 1), value=-1.0) if normalize else values)
        sums = heads.product(heads.apart(q), S)
        if normalize:
            total = heads.fill_(eps - sums[..., -1:], 1)
            sums = sums[..., :-1] / total
        out = heads.together(sums, v)
        ctx.save_for_backward(q, k, v, mask, S, total, out if normalize else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, S, total, out = ctx.saved_tensors
        heads = _Heads(q, mask)
        g, values = heads.apart(d_out), heads.apart(v)
        if total is not None:  # out = sums / total
            of_total = (g * heads.apart(out)).sum(-1, keepdim=True)
            g, values = torch.cat([g, of_total], dim=-1) / total, F.pad(values, (0, 1), value=-1.0)
        dS = heads.product(heads.apart(q).mT, g)
        dk = heads.product(values, dS.mT)
        if total is not None:
            heads.fill_(dk, 0)  # −1 stands where tokens are absent, too
        dv = heads.product(heads.apart(k), dS[..., : v.shape[-1]])
        gradients = ((heads.product(g, S.mT), q), (dk, k), (dv, v))
        return *(heads.together(x, like) for x, like in gradients), None, None, None
