"""Bidirectional linear attention without decay: it is two matrix products.

Each batch row is read where it lies, as `(H, T, ·)` slices of `(B, L, H, ·)`, T tokens at a time, so that what a
product writes is still in the cache when it is divided and copied to its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chela.ops.linear_attention.op import Gradients, Problem
from chela.ops.linear_attention.segments import Workspace

# Elements of a slice: 1 MiB of float32.
SLICE_ELEMENTS = 2**18


class Slices:
    """The slices of one batch row."""

    def __init__(self, p: Problem) -> None:
        _, self.L, H, D = p.q.shape
        self.absent = None if p.mask is None else ~p.mask
        self.T = max(1, SLICE_ELEMENTS // (H * max(D, p.v.shape[-1])))
        self.buffer = Workspace(p.sum_dtype, p.q.device, buffers_per_block=2)
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
        return self.fill(part, 0)

    def fill(self, y: Tensor, value: float) -> Tensor:
        """Set y `(H, T, ·)` to a value where absent, in place."""
        return y if self.absent is None else y.masked_fill_(self.absent[self.b, self.tokens, None], value)

    def product(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        """Return a @ b `(H, T, ·)`, in its place in x where the layout allows; elsewhere it lasts until the next."""
        place = x[self.b, self.tokens].transpose(0, 1)
        there = place.is_contiguous() and place.dtype == self.buffer.dtype
        return torch.bmm(a, b, out=place if there else self.buffer("product", *place.shape))

    def write(self, y: Tensor, x: Tensor) -> None:
        """Put y `(H, T, ·)` in its place in x, zero where absent."""
        place, y = x[self.b, self.tokens].transpose(0, 1), self.fill(y, 0)
        if y.data_ptr() != place.data_ptr():
            place.copy_(y)


def saved_shape(p: Problem) -> tuple[int, ...]:
    """Return the shape of the state, all that the backward pass needs beside the inputs."""
    return p.state_shape


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the normaliser, nothing, and the state."""
    (B, _, H, D), E = p.q.shape, p.v.shape[-1]
    out, total, nothing = p.new_outputs()
    saved = p.new(*saved_shape(p))
    x = Slices(p)
    for b in range(B):
        S, z = saved.new_zeros(H, D, E), saved.new_zeros(H, D, int(p.normalize))
        for _ in x(b):
            k_ = x.read("k", p.k)
            S.baddbmm_(k_.mT, x.read("v", p.v))
            if p.normalize:
                z += k_.sum(1)[..., None]
        torch.cat([S, z], -1, out=saved[b])
        for _ in x(b):
            q_ = x.read("q", p.q)
            o = x.product(q_, S, out)
            if p.normalize:
                t = q_ @ z
                x.write(t, total.mT[..., None])
                o /= x.fill(t + p.eps, 1)
            x.write(o, out)
    return out, total, nothing, saved


def backward(p: Problem, d_out: Tensor, out: Tensor, total: Tensor, saved: Tensor) -> Gradients:
    """Return the gradients of q, k and v; nothing for decays and state."""
    (B, _, H, D), E = p.q.shape, p.v.shape[-1]
    dq, dk, dv, d_decay, d_back, d_state = p.new_gradients(False)
    x = Slices(p)
    for b in range(B):
        S, z = saved[b, ..., :E].mT, saved[b, ..., E:].mT
        dS, dz = saved.new_zeros(H, D, E), saved.new_zeros(H, 1, D)
        for _ in x(b):
            q_, do = x.read("q", p.q), x.read("do", d_out)
            if p.normalize:
                scale = 1 / x.fill(x.read("total", total.mT[..., None]) + p.eps, 1)
                d_total = (do * x.read("out", out)).sum(-1, keepdim=True).mul_(scale).neg_()
                do = torch.mul(do, scale, out=x.buffer("scaled", *do.shape))
                dz += d_total.mT @ q_
            dS.baddbmm_(q_.mT, do)
            dq_ = x.product(do, S, dq)
            if p.normalize:
                dq_ += d_total * z
            x.write(dq_, dq)
        for _ in x(b):
            dk_ = x.product(x.read("v", p.v), dS.mT, dk)
            if p.normalize:
                dk_ += dz
            x.write(dk_, dk)
            x.write(x.product(x.read("k", p.k), dS, dv), dv)
    return dq, dk, dv, d_decay, d_back, d_state
