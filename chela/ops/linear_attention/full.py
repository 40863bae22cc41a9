"""Bidirectional linear attention without decay: every token sees the same state, so it is two matrix products.

Each batch row is read where it lies, as `(H, T, ·)` slices of `(B, L, H, ·)`, T tokens at a time, so that what a product
writes is still in the cache when it is divided and copied to its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chela.ops.linear_attention.recurrent import accumulation_dtype
from chela.ops.linear_attention.segments import Workspace

# Elements of a slice: 1 MiB of float32.
SLICE_ELEMENTS = 2**18


class Slices:
    """The slices of one batch row."""

    def __init__(self, q: Tensor, E: int, mask: Tensor | None, dtype: torch.dtype) -> None:
        _, self.L, self.H, self.D = q.shape
        self.absent = None if mask is None else ~mask
        self.T = max(1, SLICE_ELEMENTS // (self.H * max(self.D, E)))
        self.buffer = Workspace(dtype, q.device)
        self.b, self.tokens = 0, slice(0)

    def __call__(self, b: int) -> Iterator[None]:
        """Go through the slices of batch row b; ``read`` and ``write`` then work on the one at hand."""
        self.b = b
        for start in range(0, self.L, self.T):
            self.tokens = slice(start, min(start + self.T, self.L))
            yield

    def read(self, name: str, x: Tensor) -> Tensor:
        """Return `(H, T, ·)` of x, zero where absent; a view of x where that is all it takes."""
        part = x[self.b, self.tokens].transpose(0, 1)
        if self.absent is None and x.dtype == self.buffer.dtype:
            return part
        part = self.buffer(name, *part.shape).copy_(part)
        return part if self.absent is None else part.masked_fill_(self.absent[self.b, self.tokens, None], 0)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b `(H, T, ·)`, to be used before the next product."""
        return torch.bmm(a, b, out=self.buffer("product", *a.shape[:2], b.shape[-1]))

    def write(self, y: Tensor, x: Tensor) -> None:
        """Copy y `(H, T, ·)` to its place in x, zero where absent."""
        if self.absent is not None:
            y.masked_fill_(self.absent[self.b, self.tokens, None], 0)
        x[self.b, self.tokens] = y.transpose(0, 1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the normaliser, nothing, and the state `(1, 1, B, H, D, E + normalize)`."""
    B, L, H, D = q.shape
    E = v.shape[-1]
    dtype = accumulation_dtype(v.dtype)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    total = torch.empty((B, L, H) if normalize else (0,), dtype=dtype, device=v.device)
    saved = torch.zeros(1, 1, B, H, D, E + normalize, dtype=dtype, device=v.device)
    x = Slices(q, E, mask, dtype)
    for b in range(B):
        S, z = torch.zeros(H, D, E, dtype=dtype, device=v.device), saved[0, 0, b, ..., E:]
        for _ in x(b):
            k_ = x.read("k", k)
            S.baddbmm_(k_.mT, x.read("v", v))
            if normalize:
                z += k_.sum(1)[..., None]
        saved[0, 0, b, ..., :E] = S
        for _ in x(b):
            q_ = x.read("q", q)
            o = x.product(q_, S)
            if normalize:
                t = q_ @ z
                x.write(t, total[..., None])
                o /= t + eps
            x.write(o, out)
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
    (B, _, H, D), E = q.shape, v.shape[-1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    x = Slices(q, E, mask, saved.dtype)
    for b in range(B):
        S, z = saved[0, 0, b, ..., :E].mT, saved[0, 0, b, ..., E:].mT
        dS, dz = saved.new_zeros(H, D, E), saved.new_zeros(H, 1, D)
        for _ in x(b):
            q_, do = x.read("q", q), x.read("do", d_out)
            if normalize:
                scale = 1 / (x.read("total", total[..., None]) + eps)
                d_total = (do * x.read("out", out)).sum(-1, keepdim=True).mul_(scale).neg_()
                do = torch.mul(do, scale, out=x.buffer("scaled", *do.shape))
                dz += d_total.mT @ q_
            dS.baddbmm_(q_.mT, do)
            dq_ = x.product(do, S)
            if normalize:
                dq_ += d_total * z
            x.write(dq_, dq)
        for _ in x(b):
            dk_ = x.product(x.read("v", v), dS.mT)
            if normalize:
                dk_ += dz
            x.write(dk_, dk)
            x.write(x.product(x.read("k", k), dS), dv)
    nothing = saved.new_empty(0)
    return dq, dk, dv, nothing, nothing.clone(), nothing.clone()
