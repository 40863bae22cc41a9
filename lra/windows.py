"""Windows of a text as records: at each symbol, the next one is the target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lra.errors import DataError
from lra.streams import GOLDEN, key, mix
from lra.tasks.base import IGNORED, Encoded, Label, Records
from lra.texts import Span


class Windows(Records):
    """Windows of a text: record i holds the symbols from i·stride on as targets, and as input the one before each.

    Args:
        table: The id of each byte.
        span: The symbols.
        window: Of a record; the last one of a span may be shorter.
        stride: From one record to the next, at most the window.
        once: Whether a symbol is a target in one record only, the first that has it.
    """

    def __init__(self, table: np.ndarray, span: Span, window: int, stride: int, once: bool) -> None:
        if not 1 <= stride <= window:
            raise ValueError(f"expected a stride from 1 to the window, got {stride} of {window}")
        self._table, self._span, self._window, self._stride, self._once = table, span, window, stride, once
        self._number = 1 + max(0, -(-(len(span) - window) // stride))

    def __len__(self) -> int:
        return self._number

    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, Label]]:
        """Return (input, targets) of several records."""
        return [self._record(int(i)) for i in indices]

    def _record(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        first = i * self._stride
        ids = self._table[self._span.read(first - 1, min(first + self._window, len(self._span)))]
        targets = ids[1:].astype(np.int64)
        if self._once and i:
            targets[: self._window - self._stride] = IGNORED
        return ids[:-1], targets

    def lengths(self) -> np.ndarray:
        """Return the length of every record, int64 ``(N,)``; of equal ones in the memory of one."""
        lengths = np.broadcast_to(np.int64(self._window), self._number)
        last = len(self._span) - (self._number - 1) * self._stride
        if last < self._window:
            lengths = lengths.copy()
            lengths[-1] = last
        return lengths

    def where(self, i: int) -> str:
        """Return what names a record in an error."""
        return f"window at symbol {i * self._stride:,}"

    def batch(self, size: int, pool: int, seed: int, step: int) -> np.ndarray:
        """Return windows drawn at random, each apart from the others, from (seed, step) alone."""
        words = mix(np.arange(size, dtype=np.uint64) * GOLDEN + key(seed, "window", step))
        return (words % np.uint64(len(self))).astype(np.int64)

    def ordered(self, size: int, step: int) -> tuple[np.ndarray, bool]:
        """Return the windows of a step, row b reading its part of the text on, and whether that begins anew.

        The text is cut into as many equal parts as there are rows; what is left at a part's end, less than a window,
        is not read.
        """
        part = len(self._span) // size
        steps = part // self._window
        if not steps:
            raise DataError(
                f"data.carry: expected a text of at least a window of {self._window:,} for each of {size} rows, got "
                f"{len(self._span):,} symbols; lower trainer.batch_size or task.window"
            )
        at = step % steps
        starts: np.ndarray = np.arange(size) * part + at * self._window
        return starts // self._stride, at == 0

    def majority_accuracy(self) -> float:
        """Return the share of the most frequent symbol."""
        return float(self._span.counts().max() / len(self._span))


def in_words(window: int, stride: int) -> str:
    """Say what a symbol is predicted from where a text is read in windows.

    >>> in_words(64, 64)
    'windows of 64, each alone: 1 to 64 symbols before'
    >>> in_words(64, 16)
    'windows of 64, each 16 on: after the first at least 48 symbols before'
    """
    if stride == window:
        return f"windows of {window:,}, each alone: 1 to {window:,} symbols before"
    return f"windows of {window:,}, each {stride:,} on: after the first at least {window - stride:,} symbols before"
