"""One sequence over many processes: which piece this one holds, and what the pieces exchange.

Inside ``sequence_parallel(length)`` the tensors ``(B, L, …)`` of each process are its piece of sequences of ``length``
tokens, one piece after another by rank. The ops of this package, and what is built on them, then give each piece what
one process would give it. Outside, nothing changes. The collectives are here; the gradient of each is its transpose, so
every process must run the same operations in the same order, forward and backward.

Gradients are those of the sum of all processes' losses. Shapes: P pieces, B batch, L tokens of a piece, C channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

_piece: Piece | None = None


@contextlib.contextmanager
def sequence_parallel(length: int, group: Any = None) -> Iterator[Piece]:
    """Let what runs inside work on this process's piece of sequences of ``length`` tokens.

    Only the forward pass must be inside. Pieces differ by at most one token, also empty ones are allowed.

    Args:
        length: Tokens of the whole sequence, padding included; the same in all processes.
        group: The ``torch.distributed`` group over whose P processes sequences are spread; None is all processes.

    Yields:
        The piece: ``piece.cut(x)`` takes it from a whole ``(B, length, …)``.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> with sequence_parallel(10) as piece:
    ...     piece.cut(torch.zeros(2, 10, 3)).shape
    torch.Size([2, 10, 3])
    >>> dist.destroy_process_group()
    """
    piece = Piece(length, group)
    with within(piece):
        yield piece


@contextlib.contextmanager
def within(piece: Piece | None) -> Iterator[None]:
    """Work on a piece again, for the recomputation of a forward pass."""
    global _piece
    outer, _piece = _piece, piece
    try:
        yield
    finally:
        _piece = outer


def current() -> Piece | None:
    """Return the piece that the code around works on; None outside of ``sequence_parallel``."""
    return _piece


def extent(x: Tensor) -> tuple[int, slice]:
    """Return how many tokens the whole sequence of ``x: (B, L, C)`` has, and the channels this process convolves."""
    return (x.shape[1], slice(None)) if _piece is None else (_piece.length, _piece.channels(x.shape[2]))


class Piece:
    """Piece ``rank`` of P = ``count``, of sequences of ``length`` tokens."""

    def __init__(self, length: int, group: Any) -> None:
        self.length, self.group = length, group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    @property
    def start(self) -> int:
        """The place of its first token."""
        return self.tokens().start

    def tokens(self, piece: int | None = None) -> range:
        """Return the places of the tokens of a piece; None is this one."""
        return self._share(self.length, piece)

    def channels(self, channels: int) -> slice:
        """Return the channels, of so many, that this process convolves."""
        share = self._share(channels)
        return slice(share.start, share.stop)

    def _share(self, total: int, piece: int | None = None) -> range:
        p = self.rank if piece is None else piece
        return range(total * p // self.count, total * (p + 1) // self.count)

    def cut(self, x: Tensor) -> Tensor:
        """Return this process's tokens of a whole ``(B, length, …)``."""
        return x[:, self.start : self.tokens().stop]

    def gather(self, x: Tensor) -> Tensor:
        """Return every process's x, ``(P, …)``, equal in shape; each sends (P − 1)·|x| both ways."""
        return torch.stack(self._exchanged([x] * self.count, [x.shape] * self.count))

    def with_neighbours(self, x: Tensor, before: int, after: int) -> Tensor:
        """Return ``x: (B, L, C)`` with so many tokens more at each end, fewer where the sequence ends.

        Where pieces are short, they come from several. A process sends B·C numbers for each, both ways.
        """
        lent = [self.overlap(self.rank, p, before, after) for p in range(self.count)]
        borrowed = [len(self.overlap(p, self.rank, before, after)) for p in range(self.count)]
        parts = [x[:, part.start : part.stop] for part in lent]
        got = self._exchanged(parts, [(len(x), size, *x.shape[2:]) for size in borrowed])
        return torch.cat([*got[: self.rank], x, *got[self.rank + 1 :]], dim=1)

    def to_channels(self, x: Tensor) -> Tensor:
        """Exchange all channels of a piece ``(B, L, C)`` for all tokens of some channels ``(B, length, C/P)``.

        A process sends B·L·C·(P − 1)/P numbers, L being length/P; the gradient as many.
        """
        shapes = [(len(x), len(self.tokens(p)), len(self._share(x.shape[2]))) for p in range(self.count)]
        return torch.cat(self._exchanged(torch.split(x, self._widths(x.shape[2]), dim=2), shapes), dim=1)

    def to_tokens(self, x: Tensor, channels: int) -> Tensor:
        """Undo ``to_channels`` of so many channels."""
        parts = torch.split(x, [len(self.tokens(p)) for p in range(self.count)], dim=1)
        shapes = [(*parts[self.rank].shape[:2], width) for width in self._widths(channels)]
        return torch.cat(self._exchanged(parts, shapes), dim=2)

    def _widths(self, channels: int) -> list[int]:
        return [len(self._share(channels, p)) for p in range(self.count)]

    def _exchanged(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        return _Exchange.apply(self, shapes, *parts)  # type: ignore[no-untyped-call, no-any-return]

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send ``parts[p]`` to process p; return what each one sent here, of ``shapes[p]``.

        As bytes, which gloo and NCCL both know, whatever the dtype.
        """
        like = parts[0]
        out = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
        into = like.new_empty(sum(map(math.prod, shapes))).view(torch.uint8)
        sizes = [part.nbytes for part in parts]
        dist.all_to_all_single(into, out, [like.itemsize * math.prod(s) for s in shapes], sizes, group=self.group)
        arrived = torch.split(into.view(like.dtype), [math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(arrived, shapes, strict=True)]

    def overlap(self, owner: int, reader: int, before: int, after: int) -> range:
        """Return the tokens of one piece that another one needs, counted from the owner's first one."""
        mine, theirs = self.tokens(owner), self.tokens(reader)
        start, stop = max(0, theirs.start - before - mine.start), min(len(mine), theirs.stop + after - mine.start)
        return range(start, max(start, stop)) if theirs and owner != reader else range(0)


class _Exchange(torch.autograd.Function):
    """The gradients go back where the parts came from."""

    @staticmethod
    def forward(ctx: Any, piece: Piece, shapes: Sequence[tuple[int, ...]], *parts: Tensor) -> Any:
        ctx.piece, ctx.shapes = piece, [tuple(part.shape) for part in parts]
        return tuple(piece.exchange(parts, shapes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.piece.exchange(grads, ctx.shapes)
