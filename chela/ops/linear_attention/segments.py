"""How the chunked backend walks a sequence: in segments of chunks.

A segment is a run of tokens of a few batch rows, short enough that everything computed from it stays in the cache.
In it the layout is chunk-major, `(n, B, H, C, ·)` with n chunks of C tokens, so that every product of the algorithm is
one batched matrix product over contiguous memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chela.ops.padding import fill_rows_, rows_where

# Elements of one buffer of a segment: 512 KiB of float32, so that the busy ones fit L2 and all of them L3.
SEGMENT_ELEMENTS = 2**17


def chunk_tokens(D: int, E: int) -> int:
    """Return the tokens of a chunk where none are asked for: fewer where a state is small beside what is in a chunk."""
    return 32 if max(D, E) <= 64 else 64


def chunks_per_segment(H: int, D: int, E: int, chunk: int) -> int:
    """Return how many chunks a segment of one batch row takes; no length comes in, so it adds no guard to a graph."""
    return max(4, min(32, SEGMENT_ELEMENTS // (H * max(D, E) * chunk)))


@dataclass(frozen=True)
class Segment:
    """Some batch rows × consecutive tokens, as n chunks of C; the last chunk may be ragged.

    Attributes:
        index: Number of the segment along the sequence.
        rows: The batch rows.
        tokens: The tokens.
        n: Number of chunks.
        C: Tokens per chunk.
        absent: `(n, B, 1, C)` bool, True where a token is masked or lies beyond the end; None when all are real.
        gone: The same as indices of the rows of an `(n, B, H, C, ·)`; empty when all are real.
    """

    index: int
    rows: slice
    tokens: slice
    n: int
    C: int
    absent: Tensor | None
    gone: Tensor

    def load(self, x: Tensor, into: Tensor) -> Tensor:
        """Copy x `(B, L, H, ·)` to ``into`` `(n, B, H, C, ·)`, zero where absent; a further column is set to one."""
        width = x.shape[-1]
        for mine, place in self.parts(into[..., :width] if into.shape[-1] > width else into, x):
            mine.copy_(place)
        if into.shape[-1] > width:
            into[..., width:] = 1
        return self.fill(into, 0)

    def fill(self, x: Tensor, value: float) -> Tensor:
        """Set x `(n, B, H, C, ·)` to a value where absent, in place."""
        return fill_rows_(x, self.gone, value) if len(self.gone) else x

    def store(self, y: Tensor, x: Tensor) -> None:
        """Copy y `(n, B, H, C, ·)` to its place in x `(B, L, H, ·)`."""
        for mine, place in self.parts(y, x):
            place.copy_(mine)

    def parts(self, y: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair y `(n, B, H, C, ·)` with its place in x `(B, L, H, ·)`, whole chunks first, then the ragged one."""
        b, t, h, d = x.stride()
        (_, B, H, C, width), start = y.shape, x.storage_offset() + self.rows.start * b + self.tokens.start * t
        whole, rest = divmod(self.tokens.stop - self.tokens.start, C)
        yield y if not rest else y[:whole], x.as_strided((whole, B, H, C, width), (C * t, b, h, t, d), start)
        if rest:
            yield y[whole, :, :, :rest], x.as_strided((B, H, rest, width), (b, h, t, d), start + whole * C * t)


def segments(x: Tensor, E: int, chunk: int, mask: Tensor | None) -> list[list[Segment]]:
    """Cut x `(B, L, H, D)` into blocks of batch rows, each a list of segments in the order of the sequence."""
    B, L, H, D = x.shape
    n = chunks_per_segment(H, D, E, chunk)
    rows = max(1, SEGMENT_ELEMENTS // (H * max(D, E) * min(L, n * chunk)))
    return [list(_along(x, slice(b, min(b + rows, B)), n, chunk, mask)) for b in range(0, B, rows)]


def _along(x: Tensor, rows: slice, n: int, chunk: int, mask: Tensor | None) -> Iterator[Segment]:
    _, L, H, _ = x.shape
    for index, start in enumerate(range(0, L, n * chunk)):
        tokens = slice(start, min(start + n * chunk, L))
        T = tokens.stop - tokens.start
        C = min(chunk, T)
        chunks = -(-T // C)
        absent, gone = None, torch.empty(0)
        if mask is not None or T % C:
            real = torch.zeros(rows.stop - rows.start, chunks * C, dtype=torch.bool, device=x.device)
            real[:, :T] = True if mask is None else mask[rows, tokens]
            absent = ~real.view(-1, chunks, C).transpose(0, 1)[:, :, None]
            gone = rows_where(absent.expand(-1, -1, H, -1))
        yield Segment(index, rows, tokens, chunks, C, absent, gone)
