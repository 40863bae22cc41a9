"""The chunked algorithm made fast on a CPU; it runs on any device. Called ``backend="chunked"``.

It is the algorithm of ``plain.py``, for causal attention and for bidirectional attention with decay; without, see
``attend_undecayed``. It takes some batch rows at a time, segment by segment, each short enough that everything computed
from it stays in the cache, in buffers that the next one uses again. The forward pass saves the states at the borders of
segments; the backward pass goes the other way and recomputes all others.

Shapes: n chunks of C tokens, ``(n, B, H, C, ·)``, so that all products are batched products over contiguous memory;
states ``(n, B, H, D, E)``, the one that reaches each chunk. Way 0 is rightward, way 1 leftward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from chela.ops.linear_attention.operator import Call, Gradients, Outputs, define, edge_gradient
from chela.ops.linear_attention.reference import lowest_log_decay
from chela.ops.memory import Workspace, in_huge_pages
from chela.ops.padding import fill_rows_, rows_where

# Elements of one buffer of a segment: 512 KiB of float32, so that the busy ones fit L2 and all of them L3.
SEGMENT_ELEMENTS = 2**17
# Up to so many tokens are one chunk if no state precedes them: their L × L weights take less time than states.
ONE_CHUNK = 96


def tokens_per_chunk(c: Call) -> int:
    """Return the tokens of a chunk where there are many: fewer where states are small."""
    return c.chunk or (32 if max(c.q.shape[-1], c.v.shape[-1]) <= 64 else 64)


def tokens_per_segment(c: Call) -> int:
    """Return the tokens of a segment of one batch row: whatever the length, so that a graph needs no guard."""
    C = tokens_per_chunk(c)
    return C * max(4, min(32, SEGMENT_ELEMENTS // (c.q.shape[2] * max(c.q.shape[-1], c.v.shape[-1]) * C)))


def is_one_chunk(c: Call) -> bool:
    """Return whether the sequence is so short that its L × L weights take less time than states at borders."""
    return c.state is None and c.q.shape[1] <= (c.chunk or ONE_CHUNK)


def saved_shape(c: Call) -> tuple[int, ...]:
    """Return the shape of the states at segment borders: from the left and, when bidirectional, from the right."""
    tokens = tokens_per_segment(c)
    return (1 if c.causal else 2, (c.q.shape[1] + tokens - 1) // tokens, *c.state_shape)


class Decays:
    """The decays of a segment.

    ``edges`` are the log decays of each way, ``(n, B, H, C, 1)`` float64, n and B being 1 where all agree. Only
    differences of their sums from a chunk's first edge on, ``(n, B, H, C)``, are rounded.
    """

    def __init__(self, c: Call, edges: list[Tensor]) -> None:
        self.none, self.sums, self.like = c.log_decay is None, [x[..., 0].cumsum(-1) for x in edges], c.new(0)
        self.width = c.q.shape[-1] if edges[0].shape[:2] == (1, 1) else 1

    @functools.cached_property
    def within(self) -> Tensor:
        """M inside the chunks, ``(n, B, H, C, C)`` or what broadcasts to it."""
        found = []
        for sums in self.sums:
            M = self.like.new_empty(*sums.shape, sums.shape[-1])
            torch.sub(sums[..., :, None], sums[..., None, :], out=M)
            found.append(M.clamp_(max=0).exp_().tril_())
        M, *left = found  # the diagonal is 1 in both directions and counts once
        return M + left[0].tril(-1).mT if left else M

    @functools.cached_property
    def borders(self) -> list[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """For each way the decays between tokens and the borders of their chunks; None without decay.

        From each token to the border over which it leaves, from that over which states come in to each token, both
        ``(n, B, H, C, 1)`` or as wide as keys, so that a product is one long loop; and from border to border.
        """
        if self.none:
            return [(None, None, None)] * len(self.sums)
        found: list[Any] = []
        for way, sums in enumerate(self.sums):
            to_borders = (x.exp().to(self.like.dtype)[..., None] for x in (sums, sums[..., -1:] - sums))
            enter, leave = (x.expand(*x.shape[:-1], self.width).contiguous() for x in to_borders)
            found.append((enter, leave, enter[..., -1:, :1]) if way else (leave, enter, enter[..., -1:, :1]))
        return found


class Segment:
    """Consecutive tokens of some batch rows as n chunks of C, the last one filled up.

    ``gone`` are the indices of the rows of an ``(n, B, H, C, ·)`` that are masked or beyond the end; None if none are.
    """

    def __init__(self, segments: Segments, rows: slice, index: int) -> None:
        c = self.c = segments.c
        self.buffer, self.rows, self.index = segments.buffer, rows, index
        self.tokens = slice(index * segments.tokens, min((index + 1) * segments.tokens, c.q.shape[1]))
        B, T = rows.stop - rows.start, self.tokens.stop - self.tokens.start
        self.shape = n, _, H, C = -(-T // segments.C), B, c.q.shape[2], segments.C
        self.gone: Tensor | None = None
        if c.mask is not None or T % C:
            real = torch.zeros(B, n * C, dtype=torch.bool, device=c.q.device)
            real[:, :T] = True if c.mask is None else c.mask[rows, self.tokens]
            self.gone = rows_where(~real.view(B, n, 1, C).transpose(0, 1).expand(-1, -1, H, -1))
        self.decays = segments.shared or Decays(c, [self.load(x, x.new_empty(*self.shape, 1)) for x in segments.edges])

    def new(self, name: str, width: int) -> Tensor:
        """Return the buffer of that name as ``(n, B, H, C, width)``."""
        return self.buffer(name, *self.shape, width)

    def load(self, x: Tensor, into: Tensor, fill: float = 0) -> Tensor:
        """Copy x ``(B, L, H, ·)``, with a value where tokens are absent; one more column is ones."""
        width = x.shape[-1]
        for mine, place in self._places(into[..., :width], x):
            mine.copy_(place)
        if into.shape[-1] > width:
            into[..., width:] = 1
        return self.fill(into, fill)

    def fill(self, y: Tensor, value: float) -> Tensor:
        """Set y ``(n, B, H, C, ·)`` to a value where tokens are absent, in place."""
        return y if self.gone is None else fill_rows_(y, self.gone, value)

    def store(self, y: Tensor, x: Tensor) -> None:
        """Copy y ``(n, B, H, C, ·)`` to its place in x ``(B, L, H, ·)``."""
        for mine, place in self._places(y, x):
            place.copy_(mine)

    def _places(self, y: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair y ``(n, B, H, C, ·)`` with its place in x ``(B, L, H, ·)``: whole chunks, then a ragged one."""
        x, C = x[self.rows, self.tokens], self.shape[3]
        whole, rest = divmod(x.shape[1], C)
        yield y[:whole], x[:, : whole * C].view(len(x), whole, C, *x.shape[2:]).permute(1, 0, 3, 2, 4)
        if rest:
            yield y[whole, :, :, :rest], x[:, whole * C :].transpose(1, 2)

    def read(self, name: Literal["q", "k", "v"]) -> Tensor:
        """Return queries, keys or values ``(n, B, H, C, ·)``; one more column of these is ones, where z is needed."""
        x: Tensor = getattr(self.c, name)
        return self.load(x, self.new(name, x.shape[-1] + (self.c.ones and name == "v")))

    def before_division(self, d_out: Tensor, out: Tensor, total: Tensor) -> Tensor:
        """Return the gradient of the sums, in the shape of values."""
        g = self.load(d_out, self.new("g", d_out.shape[-1] + self.c.ones))
        if self.c.normalize:
            o = self.load(out, self.new("out", out.shape[-1]))
            g[..., -1:] = o.mul_(g[..., :-1]).sum(-1, keepdim=True).neg_()
            g /= self.load(total.mT[..., None], self.new("total", 1), fill=1).add_(self.c.eps)
        elif self.c.ones:
            g[..., -1] = 0
        return g

    def weighted(self, name: str, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return x, in a buffer of that name if there is a weight."""
        return x if weight is None else torch.mul(x, weight, out=self.new(name, x.shape[-1]))

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b in the buffer of that name."""
        return product(a, b, self.new(name, b.shape[-1]))

    def add_product(self, name: str, to: Tensor, a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor | None:
        """Add a @ b in place, weighted; return the product if there is a weight."""
        if weight is None:
            to.view(-1, *to.shape[-2:]).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
            return None
        found = self.product(name, a, b)
        to.addcmul_(found, weight)
        return found

    def states(
        self, name: str, a: Tensor, b: Tensor, carry: Tensor, over: Tensor | None, *, leftward: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the states Σ a bᵀ that reach each chunk, and the one that leaves the segment.

        ``carry`` ``(B, H, D, E)`` comes in. One addition a chunk, each to what is still in the cache, is faster than
        one product of all with a triangle of decays, and than ``cumsum``.
        """
        borders = self.buffer(name, len(a) + 1, *carry.shape)
        reached, added = (borders[1:], borders[:-1]) if leftward else (borders[:-1], borders[1:])
        order = -1 if leftward else 1
        rows = borders.unbind()[::order]
        rows[0].copy_(carry)
        product(a.mT, b, added)
        weights = [None] * len(a) if over is None else over.expand(len(a), -1, -1, -1, -1).unbind()[::order]
        for before, row, weight in zip(rows[:-1], rows[1:], weights, strict=True):
            row.add_(before) if weight is None else row.addcmul_(before, weight)
        return reached, rows[-1].clone()


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b over all leading axes, as one batched product."""
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
    return out


class Segments:
    """A call's segments, of so many batch rows at a time that a buffer has ``SEGMENT_ELEMENTS``, or of one."""

    def __init__(self, c: Call, buffer: Workspace) -> None:
        B, L, H, D = c.q.shape
        one, self.tokens = is_one_chunk(c), tokens_per_segment(c)
        self.c, self.buffer, self.C = c, buffer, L if one else min(L, tokens_per_chunk(c))
        width = max(D, c.v.shape[-1], L // 2 if one else 0)
        rows = max(1, SEGMENT_ELEMENTS // (H * width * min(L, self.tokens)))
        self.blocks = [slice(b, min(b + rows, B)) for b in range(0, B, rows)]
        decays = (c.log_decay, c.log_decay_back)[: 1 if c.causal else 2]
        lowest = lowest_log_decay(c.sum_dtype)
        edges = [c.q.new_zeros(1) if x is None else x.detach().clamp(min=lowest) for x in decays]
        self.edges = [x.double().expand(B, L, H)[..., None] for x in edges]
        self.shared = None
        if c.log_decay is None or (c.log_decay.ndim == 1 and self._alike()):
            self.shared = Decays(c, [x[:1, : self.C].transpose(1, 2)[None] for x in self.edges])

    def _alike(self) -> bool:
        """Return whether all chunks decay alike; absent tokens at the end may, where nobody asks what comes after."""
        c = self.c
        if c.causal and c.ones:
            return c.mask is None and c.q.shape[1] % self.C == 0
        return c.mask is None or bool((c.mask[:, 1:] <= c.mask[:, :-1]).all())

    def over(self, rows: slice, *, back: bool = False) -> Iterator[Segment]:
        """Go over the segments of some batch rows, in order or back."""
        indices = range(-(-self.c.q.shape[1] // self.tokens))
        return (Segment(self, rows, index) for index in (reversed(indices) if back else indices))


def forward(c: Call) -> Outputs:
    """Return the output, the normaliser, the last state and the states at segment borders."""
    E, (out, total, end) = c.v.shape[-1], c.new_outputs()
    in_huge_pages(out)
    saved = c.new(*saved_shape(c)).zero_()
    has_states = not is_one_chunk(c) or (c.causal and c.ones)
    with Workspace(c.sum_dtype, c.q.device) as buffer:
        segments = Segments(c, buffer)
        for rows in segments.blocks:
            carry = torch.zeros_like(saved[0, 0, rows])
            for s in segments.over(rows, back=True) if has_states and not c.causal else ():
                saved[1, s.index, rows] = carry
                send, _, over = s.decays.borders[1]
                k = s.weighted("sent", s.read("k"), send)
                _, carry = s.states("S", k, s.read("v"), carry, over, leftward=True)
            carry = torch.zeros_like(carry) if c.state is None else c.state[rows].to(carry.dtype)
            for s in segments.over(rows):
                q, k, v = s.read("q"), s.read("k"), s.read("v")
                sums = s.product("sums", s.product("P", q, k.mT).mul_(s.decays.within), v)
                saved[0, s.index, rows] = carry
                for way, (send, receive, over) in enumerate(s.decays.borders if has_states else ()):
                    sent, came = s.weighted("sent", k, send), saved[way, s.index, rows]
                    S, left = s.states("S", sent, v, came, over, leftward=way == 1)
                    s.add_product("", sums, s.weighted("received", q, receive), S, None)
                    carry = carry if way else left
                if c.normalize:
                    s.store(sums[..., E:], total.mT[..., None])
                    sums[..., :E] /= s.fill(sums[..., E:] + c.eps, 1)
                s.store(sums[..., :E], out)
            if c.causal:
                end[rows] = carry
    return out, total, end, saved


def backward(
    c: Call, d_out: Tensor, d_end: Tensor | None, out: Tensor, total: Tensor, saved: Tensor, decay_grad: bool
) -> Gradients:
    """Return the gradients of q, k, v, both log decays and the first state; empty where there is none."""
    dq, dk, dv, *d_decays, d_state = gradients = c.new_gradients(decay_grad)
    d_decays = d_decays if decay_grad else []
    in_huge_pages(dq, dk, dv)
    has_states = not is_one_chunk(c) or d_end is not None
    with Workspace(c.sum_dtype, c.q.device) as buffer:
        segments = Segments(c, buffer)
        for rows in segments.blocks:
            carry, lefts = torch.zeros_like(saved[0, 0, rows]), []
            for s in segments.over(rows) if has_states and not c.causal else ():
                lefts.append(carry)  # the gradient of what came from the right runs to the right
                _, receive, over = s.decays.borders[1]
                q, g = s.weighted("received", s.read("q"), receive), s.before_division(d_out, out, total)
                _, carry = s.states("R", q, g, carry, over, leftward=False)
            carry = torch.zeros_like(carry) if d_end is None else d_end[rows].to(carry.dtype)
            for s in segments.over(rows, back=True):
                leaving = [carry, *lefts[s.index : s.index + 1]] if has_states else []
                g = s.before_division(d_out, out, total)
                found, carry = _segment_gradients(s, g, saved[:, s.index, rows], leaving, d_decays)
                for x, to in zip(found, (dq, dk, dv), strict=True):
                    s.store(x[..., : to.shape[-1]], to)
            if c.causal:
                d_state[rows] = carry
    return gradients


def _segment_gradients(
    s: Segment, g: Tensor, carries: Tensor, leaving: list[Tensor], d_decays: list[Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the gradients of q, k, v of a segment, and that of the state that enters it from the left.

    ``carries`` are the states that enter, and ``leaving`` the gradients of those that leave, one a way, or none where
    there is but one chunk. Gradients of the log decays are added to ``d_decays``, where somebody asks for them.
    """
    q, k, v, M = s.read("q"), s.read("k"), s.read("v"), s.decays.within
    P, G = s.product("P", q, k.mT).mul_(M), s.product("G", g, v.mT)
    flow = torch.mul(P, G, out=s.new("flow", P.shape[-1])) if d_decays else None
    G.mul_(M)
    dq, dk, dv = s.product("dq", G, k), s.product("dk", G.mT, q), s.product("dv", P.mT, g)
    first = torch.zeros_like(carries[0])
    for way, (send, receive, over) in enumerate(s.decays.borders):
        exchanged = None
        if leaving:
            received, sent = s.weighted("received", q, receive), s.weighted("sent", k, send)
            S, _ = s.states("S", sent, v, carries[way], over, leftward=way == 1)
            R, left = s.states("R", received, g, leaving[way], over, leftward=way == 0)
            first = first if way else left
            by_q = s.add_product("by q", dq, g, S.mT, receive)
            by_k = s.add_product("by k", dk, v, R.mT, send)
            s.add_product("", dv, sent, R, None)
            if flow is not None and by_q is not None and by_k is not None and over is not None:
                through = (S * R).sum((-1, -2)) * over[..., 0, 0]
                exchanged = by_q.mul_(received).sum(-1), by_k.mul_(sent).sum(-1), through
        if flow is not None:
            _add_decay_gradient(s, way, d_decays[way], flow, exchanged)
    return (dq, dk, dv), first


def _add_decay_gradient(
    s: Segment, way: int, to: Tensor, flow: Tensor, exchanged: tuple[Tensor, Tensor, Tensor] | None
) -> None:
    """Add the gradient of one way's log decays.

    ``flow`` ``(n, B, H, C, C)`` goes from token j to token i inside the chunks. ``exchanged`` are what each token
    receives from a border and sends to one ``(n, B, H, C)``, and what passes over each chunk ``(n, B, H)``.
    """
    flow = flow.mT if way else flow
    C = flow.shape[-1]
    before = torch.ones(C, C, dtype=flow.dtype, device=flow.device).triu_(1)
    gradient = (flow.tril(-1) @ before).tril_().sum(-2)  # over each edge, so no difference of two large sums
    if exchanged is not None:
        received, sent, through = exchanged
        gradient = edge_gradient(gradient, *((sent, received) if way else (received, sent)), through)
    gradient = s.fill(gradient[..., None], 0)
    if to.ndim == 1:
        to += gradient.sum((0, 1, 3, 4))
    else:
        s.store(gradient, to[..., None])


linear_attention_chunked = define("linear_attention_chunked", forward, backward, saved_shape)
