"""How the chunked backend walks a sequence: segments of chunks, their decays, and the scan over chunk states.

A segment is a run of tokens of a few batch rows, short enough that everything computed from it stays in the cache.
In it the layout is chunk-major, `(n, B, H, C, ·)` with n chunks of C tokens, so that every product of the algorithm is
one batched matrix product over contiguous memory, and a scan over chunks is a product with an (n + 1) × (n + 1) matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of one buffer of a segment: 256 KiB of float32, so that the busy ones fit L2 and all of them L3.
SEGMENT_ELEMENTS = 2**16
CHUNK = 64


class Workspace:
    """Named buffers of one call, for all its segments: fresh memory costs a page fault per 4 KiB.

    They are cut from blocks that hold many of them. One large block is asked for and given back as a whole, and glibc,
    which learns from what it is given back, keeps it at hand for the next call; of many small ones it would not.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, buffers_per_block: int = 16) -> None:
        self._per_block = buffers_per_block
        self._block = torch.empty(0, dtype=dtype, device=device)
        self._named: dict[str, Tensor] = {}
        self.dtype, self.device = dtype, device

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return the buffer of that name, seen as ``shape``; what it held is gone once it is asked for again."""
        size = math.prod(shape)
        flat = self._named.get(name)
        if flat is None or flat.numel() < size:
            flat = self._named[name] = self._cut(-(-size // 16) * 16)  # whole cache lines
        return flat[:size].view(shape)

    def _cut(self, size: int) -> Tensor:
        if self._block.numel() < size:
            self._block = torch.empty(self._per_block * size, dtype=self.dtype, device=self.device)
        cut, self._block = self._block[:size], self._block[size:]
        return cut


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
    """

    index: int
    rows: slice
    tokens: slice
    n: int
    C: int
    absent: Tensor | None

    def load(self, x: Tensor, into: Tensor) -> Tensor:
        """Copy x `(B, L, H, ·)` to ``into`` `(n, B, H, C, ·)`, zero where absent; a further column is set to one."""
        part = x[self.rows, self.tokens]
        B, T, H, width = part.shape
        body, whole = into[..., :width], T // self.C
        body[:whole].copy_(part[:, : whole * self.C].view(B, whole, self.C, H, width).permute(1, 0, 3, 2, 4))
        if whole < self.n:
            body[whole, :, :, : T - whole * self.C].copy_(part[:, whole * self.C :].transpose(1, 2))
        if into.shape[-1] > width:
            into[..., width:] = 1
        return self.fill(into, 0)

    def fill(self, x: Tensor, value: float) -> Tensor:
        """Set x `(n, B, H, C, ·)` to a value where absent, in place."""
        return x if self.absent is None else x.masked_fill_(self.absent[..., None], value)

    def store(self, y: Tensor, x: Tensor) -> None:
        """Copy y `(n, B, H, C, ·)` to its place in x `(B, L, H, ·)`."""
        part = x[self.rows, self.tokens]
        B, T, H, width = part.shape
        whole = T // self.C
        part[:, : whole * self.C].view(B, whole, self.C, H, width).copy_(y[:whole].permute(1, 0, 3, 2, 4))
        if whole < self.n:
            part[:, whole * self.C :].copy_(y[whole, :, :, : T - whole * self.C].transpose(1, 2))


def segments(x: Tensor, E: int, chunk: int, mask: Tensor | None) -> list[list[Segment]]:
    """Cut x `(B, L, H, D)` into blocks of batch rows, each a list of segments in the order of the sequence."""
    B, L, H, D = x.shape
    n = chunks_per_segment(H, D, E, chunk)
    rows = max(1, SEGMENT_ELEMENTS // (H * max(D, E) * min(L, n * chunk)))
    return [list(_along(L, slice(b, min(b + rows, B)), n, chunk, mask, x.device)) for b in range(0, B, rows)]


def _along(L: int, rows: slice, n: int, chunk: int, mask: Tensor | None, device: torch.device) -> Iterator[Segment]:
    for index, start in enumerate(range(0, L, n * chunk)):
        tokens = slice(start, min(start + n * chunk, L))
        T = tokens.stop - tokens.start
        C = min(chunk, T)
        chunks = -(-T // C)
        absent = None
        if mask is not None or T % C:
            real = torch.zeros(rows.stop - rows.start, chunks * C, dtype=torch.bool, device=device)
            real[:, :T] = True if mask is None else mask[rows, tokens]
            absent = ~real.view(-1, chunks, C).transpose(0, 1)[:, :, None]
        yield Segment(index, rows, tokens, chunks, C, absent)
