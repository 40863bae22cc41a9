"""How the CPU backend walks a sequence: in segments of chunks, and their decays.

A segment is a run of tokens of a few batch rows, short enough that everything computed from it stays in the cache.
In it the layout is chunk-major, ``(n, B, H, C, ·)`` with n chunks of C tokens. So every product of the algorithm is one
batched matrix product over contiguous memory.

Sums of log decays are kept in float64 and per chunk, and only differences of them are rounded: a token that decays by
exp(-100) does not cost its neighbours their digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chela.ops.linear_attention.operator import Call
from chela.ops.linear_attention.reference import lowest_log_decay
from chela.ops.padding import fill_rows_, rows_where

# Elements of one buffer of a segment: 512 KiB of float32, so that the busy ones fit L2 and all of them L3.
SEGMENT_ELEMENTS = 2**17
# Most tokens that are one chunk if no state precedes them; and in both directions with one decay a head, where chunks
# need twice as many states.
ONE_CHUNK, ONE_CHUNK_BOTH = 96, 160


def tokens_per_chunk(c: Call) -> int:
    """Return C: what the caller asked for, or what suits the widths, fewer where states are small."""
    return c.chunk or (32 if max(c.q.shape[-1], c.v.shape[-1]) <= 64 else 64)


def tokens_per_segment(c: Call) -> int:
    """Return the tokens of a segment of one batch row: whatever the length, so that a graph needs no guard."""
    C = tokens_per_chunk(c)
    return C * max(4, min(32, SEGMENT_ELEMENTS // (c.q.shape[2] * max(c.q.shape[-1], c.v.shape[-1]) * C)))


def is_one_chunk(c: Call) -> bool:
    """Return whether the sequence is so short that its L × L weights take less time than states at borders."""
    twice = not c.causal and c.log_decay is not None and c.log_decay.ndim == 1
    return not c.chunk and c.state is None and c.q.shape[1] <= (ONE_CHUNK_BOTH if twice else ONE_CHUNK)


@dataclass(frozen=True)
class Edges:
    """The decays of one direction in one segment; leading axes are 1 where all chunks or rows agree. None: no decay."""

    leftward: bool  # whether what crosses these edges travels from right to left
    # (n, B, H, C) float64: Σ of log decays from the chunk's first edge to token i's own edge.
    sums: Tensor | None = None
    # (n, B, 1, C) float64: how many of these edges are real; None where each token has a decay of its own.
    steps: Tensor | None = None
    # exp(sums_i), from the chunk's left border to i, and exp(sums_last − sums_i), from i to the last one:
    # (n, B, H, C, 1), or as wide as values, so that a product by element is one long loop.
    enter: Tensor | None = None
    leave: Tensor | None = None

    @property
    def sending(self) -> Tensor | None:
        """The way from each token to the border over which it leaves its chunk."""
        return self.enter if self.leftward else self.leave

    @property
    def receiving(self) -> Tensor | None:
        """The way to each token from the border over which states come in."""
        return self.leave if self.leftward else self.enter

    def across(self, x: Tensor) -> Tensor:
        """Return x ``(n, B, H)`` weighted by the decay over each whole chunk."""
        return x if self.enter is None else x * self.enter[..., -1, 0]

    def within(self, x: Tensor) -> Tensor:
        """Return M inside each chunk for j ≤ i, 0 above: ``(n, B, H, C, C)`` or, without decay, ``(C, C)``, like x."""
        C = x.shape[-2]
        if self.sums is None:
            return x.new_ones(C, C).tril_()
        M = x.new_empty(*self.sums.shape, C)
        torch.sub(self.sums[..., :, None], self.sums[..., None, :], out=M)
        return M.clamp_(max=0).exp_().tril_()

    def lags(self, x: Tensor) -> Tensor:
        """Return how many real edges lie between j and i inside each chunk, ``(n, B, 1, C, C)`` like x; 0 for j > i."""
        assert self.steps is not None
        return (self.steps[..., :, None] - self.steps[..., None, :]).clamp_(min=0).to(x.dtype)

    def carry(self, states: Tensor, *, leftward: bool) -> None:
        """Carry states ``(n + 1, B, H, D, E)`` over the borders of the chunks, in place.

        Rightward, ``states[0]`` is what comes in and ``states[c + 1]`` what chunk c adds. Leftward, ``states[n]`` comes
        in and ``states[c]`` is what chunk c adds. Afterwards row r is the state at border r.

        One addition per chunk, each to what is still in the cache: faster than one product of all of them with a
        triangle of decays, and than ``cumsum``, which walks along the wrong axis.
        """
        rows = states.unbind()
        steps = [(r - 1, r) for r in range(1, len(rows))]
        if leftward:
            steps = [(r, before) for before, r in reversed(steps)]
        if self.enter is None:
            for source, target in steps:
                rows[target].add_(rows[source])
            return
        over = self.enter[..., -1, :1, None].expand(len(rows) - 1, -1, -1, -1, -1).unbind()
        for source, target in steps:
            rows[target].addcmul_(rows[source], over[min(source, target)])


@dataclass(frozen=True)
class Segment:
    """Some batch rows × consecutive tokens, as n chunks of C; the last chunk may be ragged."""

    index: int  # along the sequence
    rows: slice
    tokens: slice
    n: int
    C: int
    absent: Tensor | None  # (n, B, 1, C) bool, True where masked or beyond the end; None when all tokens are real
    own_edges: bool  # whether its decays are its own, not those of every other segment
    gone: Tensor  # the same as indices of the rows of an (n, B, H, C, ·); empty when all are real

    def load(self, x: Tensor, into: Tensor) -> Tensor:
        """Copy x ``(B, L, H, ·)`` to ``into`` ``(n, B, H, C, ·)``, zero where absent; one more column is ones."""
        width = x.shape[-1]
        for mine, place in self.parts(into[..., :width] if into.shape[-1] > width else into, x):
            mine.copy_(place)
        if into.shape[-1] > width:
            into[..., width:] = 1
        return self.fill(into, 0)

    def fill(self, x: Tensor, value: float) -> Tensor:
        """Set x ``(n, B, H, C, ·)`` to a value where absent, in place."""
        return fill_rows_(x, self.gone, value) if len(self.gone) else x

    def store(self, y: Tensor, x: Tensor) -> None:
        """Copy y ``(n, B, H, C, ·)`` to its place in x ``(B, L, H, ·)``."""
        for mine, place in self.parts(y, x):
            place.copy_(mine)

    def parts(self, y: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair y ``(n, B, H, C, ·)`` with its place in x ``(B, L, H, ·)``, whole chunks first, then the ragged one."""
        b, t, h, d = x.stride()
        (_, B, H, C, width), start = y.shape, x.storage_offset() + self.rows.start * b + self.tokens.start * t
        whole, rest = divmod(self.tokens.stop - self.tokens.start, C)
        yield y if not rest else y[:whole], x.as_strided((whole, B, H, C, width), (C * t, b, h, t, d), start)
        if rest:
            yield y[whole, :, :, :rest], x.as_strided((B, H, rest, width), (b, h, t, d), start + whole * C * t)

    def edges(self, c: Call, *, leftward: bool = False) -> Edges:
        """Return the decays of the segment, for what travels rightward or leftward."""
        log_decay, dtype, device = c.log_decay_back if leftward else c.log_decay, c.sum_dtype, c.q.device
        if log_decay is None:
            return Edges(leftward)
        log_decay = log_decay.detach().clamp(min=lowest_log_decay(dtype))
        steps = None
        if log_decay.ndim == 3:
            B, H = self.rows.stop - self.rows.start, log_decay.shape[-1]
            of_tokens = torch.empty(self.n, B, H, self.C, 1, dtype=torch.float64, device=device)
            sums = self.load(log_decay[..., None], of_tokens)[..., 0].cumsum(-1)
        else:
            steps = torch.arange(1, self.C + 1, dtype=torch.float64, device=device)[None, None, None]
            if self.own_edges and self.absent is not None:
                steps = (~self.absent).double().cumsum(-1)
            sums = steps * log_decay.double()[:, None]
        enter, leave = (x.exp().to(dtype)[..., None] for x in (sums, sums[..., -1:] - sums))
        if not self.own_edges:
            enter, leave = (x.repeat_interleave(c.v.shape[-1] + c.ones, dim=-1) for x in (enter, leave))
        return Edges(leftward, sums, steps, enter, leave)


def segments(c: Call) -> list[list[Segment]]:
    """Cut a call into blocks of batch rows, each a list of segments in the order of the sequence."""
    B, L, H, D = c.q.shape
    one = is_one_chunk(c)
    width = max(D, c.v.shape[-1], L // 2 if one else 0)
    rows = max(1, SEGMENT_ELEMENTS // (H * width * (L if one else min(L, tokens_per_segment(c)))))
    return [list(_along(c, slice(b, min(b + rows, B)))) for b in range(0, B, rows)]


def _along(c: Call, rows: slice) -> Iterator[Segment]:
    L, H = c.q.shape[1:3]
    chunk, length = (L, L) if is_one_chunk(c) else (tokens_per_chunk(c), tokens_per_segment(c))
    own = _own_edges(c)
    for index, start in enumerate(range(0, L, length)):
        tokens = slice(start, min(start + length, L))
        T = tokens.stop - tokens.start
        C = min(chunk, T)
        chunks = -(-T // C)
        absent, gone = None, torch.empty(0)
        if c.mask is not None or T % C:
            real = torch.zeros(rows.stop - rows.start, chunks * C, dtype=torch.bool, device=c.q.device)
            real[:, :T] = True if c.mask is None else c.mask[rows, tokens]
            absent = ~real.view(-1, chunks, C).transpose(0, 1)[:, :, None]
            gone = rows_where(absent.expand(-1, -1, H, -1))
        pauses = own or (c.causal and c.ones and c.log_decay is not None and absent is not None)
        yield Segment(index, rows, tokens, chunks, C, absent, pauses, gone)


def _own_edges(c: Call) -> bool:
    """Return whether decays differ from segment to segment: they are the tokens', or absent ones lie in between.

    Absent tokens at the end may decay like others where nobody asks what comes after them.
    """
    if c.log_decay is None:
        return False
    return c.log_decay.ndim == 3 or (c.mask is not None and not bool((c.mask[:, 1:] <= c.mask[:, :-1]).all()))


def crossing(flow: Tensor) -> Tensor:
    """Return what crosses each edge, ``(…, C)``, given the flow ``(…, C, C)`` to token i from j < i, else zero."""
    C = flow.shape[-1]
    before = torch.ones(C, C, dtype=flow.dtype, device=flow.device).triu_(1)
    return (flow @ before).tril_().sum(-2)
