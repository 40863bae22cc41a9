"""Bidirectional linear attention without decay: it is two matrix products.

It goes by slices that stay in the cache from one product to the next: a few whole batch rows where sequences are short,
else T tokens of one. Where one row or one head is at hand, ``(B, L, H, ·)`` is read and written where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chela.ops.linear_attention.operator import Call, Gradients, Outputs
from chela.ops.memory import Workspace, in_huge_pages
from chela.ops.padding import fill_rows_, rows_where

# Elements of a slice: 1 MiB of float32.
SLICE_ELEMENTS = 2**18


class Slices:
    """Walks over a call's slices, R batch rows × T tokens, and shows each as ``(R·H, T, ·)``."""

    def __init__(self, c: Call, buffer: Workspace) -> None:
        self.B, self.L, H, D = c.q.shape
        self.absent = None if c.mask is None else (~c.mask)[:, None].expand(-1, H, -1)
        self.T = max(1, SLICE_ELEMENTS // (H * max(D, c.v.shape[-1])))
        self.buffer = buffer
        self.rows, self.tokens, self.gone = slice(0), slice(0), torch.empty(0)

    def blocks(self) -> Iterator[slice]:
        """Go through the batch, some rows at a time."""
        step = max(1, self.T // self.L)
        for start in range(0, self.B, step):
            self.rows = slice(start, min(start + step, self.B))
            yield self.rows

    def along(self) -> Iterator[None]:
        """Go through the tokens of the block; ``read`` and ``write`` then work on the slice at hand."""
        for start in range(0, self.L, self.T):
            self.tokens = slice(start, min(start + self.T, self.L))
            if self.absent is not None:
                self.gone = rows_where(self.absent[self.rows, :, self.tokens])
            yield

    def read(self, name: str, x: Tensor) -> Tensor:
        """Return ``(R·H, T, ·)`` of x, zero where absent; a view of x where possible."""
        part = self._place(x)
        if self.absent is None and x.dtype == self.buffer.dtype and 1 in part.shape[:2]:
            return part.flatten(0, 1)
        return self.fill(self.buffer(name, *part.shape).copy_(part).flatten(0, 1), 0)

    def fill(self, y: Tensor, value: float) -> Tensor:
        """Set y ``(R·H, T, ·)`` to a value where absent, in place."""
        return fill_rows_(y, self.gone, value) if len(self.gone) else y

    def product(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        """Return a @ b ``(R·H, T, ·)``, in its place in x where the layout allows, else in a buffer for the next."""
        place = self._place(x)
        there = 1 in place.shape[:2] and place.dtype == self.buffer.dtype
        return torch.bmm(a, b, out=(place if there else self.buffer("product", *place.shape)).flatten(0, 1))

    def write(self, y: Tensor, x: Tensor) -> None:
        """Put y ``(R·H, T, ·)`` in its place in x, if it is not there already."""
        place = self._place(x)
        if y.data_ptr() != place.data_ptr():
            place.copy_(y.view(place.shape))

    def _place(self, x: Tensor) -> Tensor:
        """Return the slice's view ``(R, H, T, ·)`` of x ``(B, L, H, ·)``."""
        return x[self.rows, self.tokens].transpose(1, 2)


def forward(c: Call, buffer: Workspace) -> Outputs:
    """Return the output, the normaliser, nothing, and the state."""
    E = c.v.shape[-1]
    out, total, nothing = c.new_outputs()
    in_huge_pages(out)
    saved = c.new(*c.state_shape).zero_()
    x = Slices(c, buffer)
    for rows in x.blocks():
        state, z = saved[rows, ..., :E].flatten(0, 1), saved[rows, ..., E:].flatten(0, 1)
        S = torch.zeros_like(state, memory_format=torch.contiguous_format)  # else one product per row and head
        for _ in x.along():
            k_ = x.read("k", c.k)
            S.baddbmm_(k_.mT, x.read("v", c.v))
            if c.normalize:
                z += k_.sum(1)[..., None]
        state.copy_(S)
        for _ in x.along():
            q_ = x.read("q", c.q)
            o = x.product(q_, S, out)
            if c.normalize:
                t = q_ @ z
                x.write(t, total.mT[..., None])
                o /= x.fill(t + c.eps, 1)
            x.write(o, out)
    return out, total, nothing, saved


def backward(c: Call, buffer: Workspace, d_out: Tensor, out: Tensor, total: Tensor, saved: Tensor) -> Gradients:
    """Return the gradients of q, k and v; nothing for decays and state."""
    E = c.v.shape[-1]
    dq, dk, dv, d_decay, d_back, d_state = c.new_gradients(False)
    in_huge_pages(dq, dk, dv)
    x = Slices(c, buffer)
    for rows in x.blocks():
        S, z = saved[rows, ..., :E].flatten(0, 1).mT, saved[rows, ..., E:].flatten(0, 1).mT
        dS, dz = torch.zeros_like(S.mT, memory_format=torch.contiguous_format), S.new_zeros(len(S), 1, S.shape[-1])
        for _ in x.along():
            q_, do = x.read("q", c.q), x.read("do", d_out)
            if c.normalize:
                scale = 1 / x.fill(x.read("total", total.mT[..., None]) + c.eps, 1)
                d_total = (do * x.read("out", out)).sum(-1, keepdim=True).mul_(scale).neg_()
                do = torch.mul(do, scale, out=x.buffer("scaled", *do.shape))
                dz += d_total.mT @ q_
            dS.baddbmm_(q_.mT, do)
            dq_ = x.product(do, S, dq)
            if c.normalize:
                dq_ += d_total * z
            x.write(dq_, dq)
        for _ in x.along():
            dk_ = x.product(x.read("v", c.v), dS.mT, dk)
            if c.normalize:
                x.fill(dk_.add_(dz), 0)
            x.write(dk_, dk)
            x.write(x.product(x.read("k", c.k), dS, dv), dv)
    return dq, dk, dv, d_decay, d_back, d_state
