"""Linear attention by chunks, for a CPU; it runs on any device. Called ``backend="chunked"``.

It is the algorithm of ``plain.py``, for causal attention and for bidirectional attention with decay; without, see
``undecayed.py``. A few batch rows at a time are laid out by chunks and walked in segments, short enough that what is
computed from one stays in the cache; unless causal, a second time for what comes from the right. The forward pass saves
the states at the borders of segments; the backward pass walks the other way and computes all others again.

Shapes: n chunks of C tokens, ``(n, B, H, C, ·)``, so that products are batched products over contiguous memory, also
those of some chunks; states ``(n, B, H, D, E)``, the one that reaches each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.backend import in_huge_pages
from chela.ops.linear_attention.operator import Call, Gradients, Outputs, define
from chela.ops.linear_attention.reference import log_decays

# Elements of one tensor of a segment: 512 KiB of float32, so that the busy ones fit L2 and all of them L3.
SEGMENT_ELEMENTS = 2**17
# Up to so many tokens are one chunk: their L × L weights take less time than states.
ONE_CHUNK = 96


def chunk_tokens(c: Call) -> int:
    """Return the tokens of a chunk where there are many: fewer where states are small."""
    return c.chunk or (32 if max(c.q.shape[-1], c.v.shape[-1]) <= 64 else 64)


def segment_chunks(c: Call) -> int:
    """Return the chunks of a segment: as many whatever the length, so that a graph needs no guard."""
    return max(4, min(32, SEGMENT_ELEMENTS // (c.q.shape[2] * max(c.q.shape[-1], c.v.shape[-1]) * chunk_tokens(c))))


def saved_shape(c: Call) -> tuple[int, ...]:
    """Return the shape of the states at segment borders: from the left and, when bidirectional, from the right."""
    tokens = chunk_tokens(c) * segment_chunks(c)
    return (1 if c.causal else 2, (c.q.shape[1] + tokens - 1) // tokens, *c.state_shape)


class Block:
    """Some batch rows of a call, laid out by chunks. Way 0 is rightward, way 1 leftward.

    Attributes:
        gone: Indices of the rows of an ``(n, B, H, C, ·)`` that are masked or beyond the end; None if there are none.
        shared: Whether all chunks and rows have the same decays.
        sums: For each way, Σ of log decays from a chunk's first edge to each token's own, ``(n, B, H, C)`` float64, n
            and B being 1 where they are shared. Only differences of them are rounded.
    """

    def __init__(self, c: Call, rows: slice, before: Block | None) -> None:
        self.c, self.rows, (_, L, H, _) = c, rows, c.q.shape
        C = min(L, chunk_tokens(c) if c.chunk or L > ONE_CHUNK else L)
        self.shape = n, B, _, _ = -(-L // C), rows.stop - rows.start, H, C
        self.gone: Tensor | None = None
        if c.mask is not None or L % C:
            real = torch.zeros(B, n * C, dtype=torch.bool, device=c.q.device)
            real[:, :L] = True if c.mask is None else c.mask[rows]
            absent = ~real.view(B, n, 1, C).transpose(0, 1).expand(-1, -1, H, -1)
            self.gone = absent.flatten().nonzero().squeeze(1)
        self.q, self.k, self.v = self.load(c.q), self.load(c.k), self.load(c.v, ones=c.ones)
        self.has_states = n > 1 or (c.causal and c.ones)  # without a column of ones nobody asks for the last one
        self.shared = c.log_decay is None or (c.log_decay.ndim == 1 and not (c.causal and c.ones))
        if self.shared and c.log_decay is not None and c.mask is not None:
            # Absent tokens at the end may decay like others where nobody asks what comes after them.
            self.shared = bool((c.mask[:, 1:] <= c.mask[:, :-1]).all())
        self.sums: list[Tensor] = before.sums if before is not None and self.shared else self._sums()
        self.M: Tensor | None = before.M if before is not None and self.shared else None

    def _sums(self) -> list[Tensor]:
        c, (n, B, H, C) = self.c, self.shape
        decays = (c.log_decay,) if c.causal else (c.log_decay, c.log_decay_back)
        if self.shared:
            return [log_decays(x, c.q[:1, :C], None)[None].cumsum(-1) for x in decays]
        like, mask = c.q[self.rows], None if c.mask is None else c.mask[self.rows]
        edges = [log_decays(x[self.rows] if x is not None and x.ndim == 3 else x, like, mask) for x in decays]
        edges = [F.pad(x, (0, n * C - x.shape[-1])).view(B, H, n, C) for x in edges]
        return [x.permute(2, 0, 1, 3).cumsum(-1) for x in edges]

    def load(self, x: Tensor, *, ones: bool = False, fill: float = 0) -> Tensor:
        """Copy x ``(B, L, H, ·)``, with a value where tokens are absent; one more column is ones."""
        y = x.new_empty(*self.shape, x.shape[-1] + ones, dtype=self.c.sum_dtype)
        for place, mine in self._places(x, y[..., : x.shape[-1]]):
            mine.copy_(place)
        if ones:
            y[..., -1] = 1
        return self.fill(y, fill)

    def fill(self, y: Tensor, value: float) -> Tensor:
        """Set y ``(n, B, H, C, ·)`` to a value where tokens are absent, in place."""
        return y if self.gone is None else y.view(-1, y.shape[-1]).index_fill_(0, self.gone, value).view_as(y)

    def store(self, y: Tensor, x: Tensor) -> None:
        """Copy y ``(n, B, H, C, ·)`` to its place in x ``(B, L, H, ·)``."""
        for place, mine in self._places(x, y):
            place.copy_(mine)

    def _places(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair x ``(B, L, H, ·)`` with y ``(n, B, H, C, ·)``: whole chunks, then a ragged one."""
        x, C = x[self.rows], self.shape[3]
        whole, rest = divmod(x.shape[1], C)
        yield x[:, : whole * C].view(len(x), whole, C, *x.shape[2:]).permute(1, 0, 3, 2, 4), y[:whole]
        if rest:
            yield x[:, whole * C :].transpose(1, 2), y[whole, :, :, :rest]

    def segments(self, *, back: bool) -> Iterator[tuple[int, slice]]:
        """Go through the chunks of each segment, in order or back."""
        step = segment_chunks(self.c)
        starts = list(enumerate(range(0, self.shape[0], step)))
        return ((index, slice(start, start + step)) for index, start in (starts[::-1] if back else starts))

    def within(self, part: slice) -> Tensor:
        """Return M inside some chunks, ``(n, B, H, C, C)`` or what broadcasts to it."""
        if self.M is None or not self.shared:
            found = []
            for sums in (x if self.shared else x[part] for x in self.sums):
                M: Tensor = self.q.new_empty(*sums.shape, sums.shape[-1])
                torch.sub(sums[..., :, None], sums[..., None, :], out=M)
                found.append(M.clamp_(max=0).exp_().tril_())
            right, *left = found  # the diagonal is 1 in both directions and counts once
            self.M = right + left[0].tril(-1).mT if left else right
        return self.M

    def to_borders(self, way: int, part: slice) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the decays between the tokens of some chunks and the borders of their chunks.

        From each token to the border over which it leaves ``(n, B, H, C, 1)``, from that over which states come in to
        each token, and from one to the other ``(n, B, H, 1, 1)``; None without decay.
        """
        if self.c.log_decay is None:
            return None, None, None
        sums = self.sums[way] if self.shared else self.sums[way][part]
        enter, leave = (x.exp().to(self.q.dtype)[..., None] for x in (sums, sums[..., -1:] - sums))
        return *((enter, leave) if way else (leave, enter)), enter[..., -1:, :]


def blocks(c: Call) -> Iterator[Block]:
    """Cut a call into blocks of batch rows whose segments have ``SEGMENT_ELEMENTS``, or a row each."""
    B, L, H, D = c.q.shape
    rows = SEGMENT_ELEMENTS // (H * max(D, c.v.shape[-1]) * min(L, chunk_tokens(c) * segment_chunks(c)))
    block = None
    for start in range(0, B, max(1, rows)):
        block = Block(c, slice(start, min(start + max(1, rows), B)), block)
        yield block


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b over all leading axes, as one batched product."""
    out = a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
    return out


def add_product(to: Tensor, a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Add a @ b in place, weighted; return the product, or without a weight the sum."""
    if weight is None:
        to.view(-1, *to.shape[-2:]).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
        return to
    found = product(a, b)
    to.addcmul_(found, weight)
    return found


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return x, weighted if there is a weight."""
    return x if weight is None else x * weight


def states(a: Tensor, b: Tensor, carry: Tensor, over: Tensor | None, *, leftward: bool) -> tuple[Tensor, Tensor]:
    """Return the states that reach each of some chunks, and the one that leaves them.

    Each chunk adds aᵀ b; ``carry`` ``(B, H, D, E)`` comes in. One addition a chunk, each to what is still in the cache,
    is faster than one product of all of them with a triangle of decays, and than ``cumsum``.
    """
    borders = carry.new_empty(len(a) + 1, *carry.shape)
    reached, added = (borders[1:], borders[:-1]) if leftward else (borders[:-1], borders[1:])
    product(a.mT, b, added)
    rows, decays = list(borders), [None] * len(a) if over is None else list(over.expand(len(a), -1, -1, -1, -1))
    if leftward:
        rows, decays = rows[::-1], decays[::-1]
    rows[0].copy_(carry)
    for before, row, decay in zip(rows[:-1], rows[1:], decays, strict=True):
        row.add_(before) if decay is None else row.addcmul_(before, decay)
    return reached, rows[-1]


def forward(c: Call) -> Outputs:
    """Return the output, the normaliser, the last state and the states at segment borders."""
    E, (out, total, end) = c.v.shape[-1], c.new_outputs()
    in_huge_pages(out)
    saved = c.new(*saved_shape(c)).zero_()
    for b in blocks(c):
        sums = torch.empty_like(b.v)
        for way in (0,) if c.causal else (0, 1):
            carry = torch.zeros_like(saved[0, 0, b.rows]) if c.state is None else c.state[b.rows].to(saved.dtype)
            for index, part in b.segments(back=way == 1):
                q, k, v = b.q[part], b.k[part], b.v[part]
                if way == 0:
                    product(product(q, k.mT).mul_(b.within(part)), v, sums[part])
                if b.has_states:
                    saved[way, index, b.rows] = carry
                    send, receive, over = b.to_borders(way, part)
                    S, carry = states(weighted(k, send), v, carry, over, leftward=way == 1)
                    add_product(sums[part], weighted(q, receive), S)
            if c.causal:
                end[b.rows] = carry
        if c.normalize:
            b.store(sums[..., E:], total.mT[..., None])
            sums[..., :E] /= b.fill(sums[..., E:] + c.eps, 1)
        b.store(sums[..., :E], out)
    return out, total, end, saved


def before_division(b: Block, d_out: Tensor, out: Tensor, total: Tensor) -> Tensor:
    """Return the gradient of the sums, in the shape of v."""
    g = b.load(d_out, ones=b.c.ones)
    if b.c.normalize:
        g[..., -1:] = b.load(out).mul_(g[..., :-1]).sum(-1, keepdim=True).neg_()
        g /= b.load(total.mT[..., None], fill=1).add_(b.c.eps)
    elif b.c.ones:
        g[..., -1] = 0
    return g


def backward(
    c: Call, d_out: Tensor, d_end: Tensor | None, out: Tensor, total: Tensor, saved: Tensor, decay_grad: bool
) -> Gradients:
    """Return the gradients of q, k, v, both log decays and the first state; empty where there is none.

    The gradient of log decays is that of their sums, added up in float64 from what flows between tokens: so what does
    not cross an edge cancels, and a small gradient keeps its digits.
    """
    gradients = c.new_gradients(decay_grad)
    *d_inputs, d_decay, d_back, d_state = gradients
    in_huge_pages(*d_inputs)
    for b in blocks(c):
        d_sum = before_division(b, d_out, out, total)
        d_block = [torch.empty_like(x) for x in (b.q, b.k, b.v)]
        decayed = decay_grad and c.log_decay is not None
        d_sums = [torch.zeros(b.shape, dtype=torch.float64, device=c.q.device) for _ in b.sums if decayed]
        for way in (0,) if c.causal else (0, 1):
            carry = torch.zeros_like(saved[0, 0, b.rows]) if d_end is None else d_end[b.rows].to(saved.dtype)
            for index, part in b.segments(back=way == 0):
                q, k, v, g, dq, dk, dv = (x[part] for x in (b.q, b.k, b.v, d_sum, *d_block))
                if way == 0:
                    M = b.within(part)
                    P, G = product(q, k.mT).mul_(M), product(g, v.mT)
                    if decayed:
                        flow = (P * G).sum((0, 1), keepdim=True) if b.shared else P * G
                        for d, crossing in zip(d_sums, (flow.double(), flow.mT.double()), strict=False):
                            crossing = crossing.tril(-1)
                            (d[:1, :1] if b.shared else d[part]).add_(crossing.sum(-1) - crossing.sum(-2))
                    product(P.mT, g, dv)
                    product(G.mul_(M), k, dq)
                    product(G.mT, q, dk)
                if b.has_states:
                    send, receive, over = b.to_borders(way, part)
                    q, k = weighted(q, receive), weighted(k, send)
                    S, _ = states(k, v, saved[way, index, b.rows], over, leftward=way == 1)
                    R, carry = states(q, g, carry, over, leftward=way == 0)
                    received, sent = add_product(dq, g, S.mT, receive), add_product(dk, v, R.mT, send)
                    add_product(dv, k, R)
                    if decayed and over is not None:
                        flows = [received.mul_(q).sum(-1), sent.mul_(k).sum(-1)]
                        enter, leave = flows[::-1] if way else flows
                        d = d_sums[way][part].add_(enter).sub_(leave)
                        d[..., -1] += leave.double().sum(-1) + (S * R).sum((-1, -2)) * over[..., 0, 0]
            if c.causal:
                d_state[b.rows] = carry
        for x, to in zip(d_sums, (d_decay, d_back), strict=False):
            d_edges = x.flip(-1).cumsum(-1).flip(-1)[..., None]
            d_edges = d_edges if b.shared else b.fill(d_edges, 0)
            b.store(d_edges, to[..., None]) if to.ndim == 3 else to.add_(d_edges.sum((0, 1, 3, 4)))
        for x, to in zip(d_block, d_inputs, strict=True):
            b.store(x[..., : to.shape[-1]], to)
    return gradients


linear_attention_chunked = define("linear_attention_chunked", forward, backward, saved_shape)
