"""Select: four pieces of movie reviews in a row, one marked; is its review positive? Not a task of LRA's.

Each piece is the end of a review of IMDb, 100 to 300 bytes of it, and has one symbol in front: the marker, or the same
other one for the three that are not asked for. Their lengths vary, so that no fixed distance from the marker tells
what belongs to it. A training record is drawn from (seed, step), one to validate or test on from its number
(``lra.pieces``).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lra.builder import Progress
from lra.errors import DataError
from lra.options import option
from lra.pieces import BYTES_OF_A_WORD, IDS, Drawn, below, hashed, reviews_of
from lra.schema import DataConfig
from lra.tasks.base import SPLITS, Encoded, Label, Task
from lra.tasks.stored import StoredRecords
from lra.tasks.text import Text

BYTES = 257  # ids of bytes, padding 0 included


@dataclass
class Select(Task):
    """Two classes, negative 0 and positive 1; ids byte + 1 or of words, then the marker and the other symbol."""

    pieces: int = option(4, "pieces in a row", ge=1, le=1000)
    shortest: int = option(100, "bytes of the shortest piece", ge=1, le=100_000)
    longest: int = option(300, "bytes of the longest piece", ge=1, le=100_000)
    words: bool = option(False, "words hashed to 2,048 ids, in place of bytes")
    train: int = option(20_000, "records that count as an epoch; each step draws new ones", ge=1)
    validation: int = option(1_000, "records to validate on", ge=1)
    test: int = option(5_000, "records to test on", ge=1)

    title = "Select"
    num_classes = 2
    note = "not a task of LRA's: which of four pieces of IMDb reviews is marked, and is it positive?"
    input_help = "token ids with spaces between"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reviews: Text | None = None
        if self.longest < self.shortest:
            raise ValueError(f"task.longest: expected shortest={self.shortest} or more, got {self.longest}")
        self.marker = IDS if self.words else BYTES
        self.vocab_size = self.marker + 2
        self.l_max = self.pieces * (1 + self.longest // (BYTES_OF_A_WORD if self.words else 1))

    def prepare(self, data: DataConfig, progress: Progress | None = None) -> None:
        """Get IMDb ready."""
        super().prepare(data, progress)
        self._reviews = reviews_of(data, progress)

    def dataset(self, split: str) -> Selections:
        """Return the records of a split. Raises ``DataError`` before ``prepare``."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
        if self._reviews is None:
            raise DataError("select: call prepare() before asking for records")
        return Selections(self, self._reviews.dataset(split), split)

    def draw(self, record: dict[str, Any], encoded: Encoded, label: Label) -> tuple[str, str]:
        """Return the pieces, the marked one bold."""
        body = ""
        for i, text in enumerate(record["texts"]):
            words = html.escape(text.decode("utf-8", "replace"))
            body += f'<p class="text">{f"<b>{words}</b>" if i == record["marked"] else words}</p>'
        return body, f"the marked piece is of a {('negative', 'positive')[int(label)]} review"


class Selections(Drawn):
    """Rows of pieces, each of a review's end."""

    def __init__(self, task: Select, reviews: StoredRecords, split: str) -> None:
        super().__init__(reviews, task.longest, getattr(task, split), f"select {split}")
        self._task = task

    def _plan(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which reviews (N, P), how many bytes of each (N, P), and which is marked (N,)."""
        task = self._task
        words = self.draws(numbers, 2 * task.pieces + 1)
        reviews, lengths = words[:, : task.pieces], words[:, task.pieces : -1]
        sizes = task.shortest + below(lengths, task.longest - task.shortest + 1)
        return below(reviews, len(self._usable)), sizes, below(words[:, -1], task.pieces)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, Label]]:
        """Return (input, label) of several records."""
        return [self._encoded(self.stored(int(i))) for i in indices]

    def _encoded(self, record: dict[str, Any]) -> tuple[np.ndarray, int]:
        parts: list[Any] = []
        for place, text in enumerate(record["texts"]):
            parts.append([self._task.marker + (place != record["marked"])])
            if self._task.words:
                parts.append(hashed(text)[: len(text) // BYTES_OF_A_WORD])
            else:
                parts.append(np.frombuffer(text, np.uint8).astype(np.uint16) + 1)
        return np.concatenate(parts).astype(np.uint16), record["label"]

    def lengths_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the length of each record, of words what it is at most; int64 ``(N,)``."""
        _, sizes, _ = self._plan(numbers)
        return (sizes // (BYTES_OF_A_WORD if self._task.words else 1)).sum(1) + self._task.pieces

    def stored(self, i: int) -> dict[str, Any]:
        """Return the pieces as bytes, which is marked, and the label."""
        ((reviews,), (sizes,), (marked,)) = self._plan([i])
        pairs = zip(reviews.tolist(), sizes.tolist(), strict=True)
        texts = [self.text(review, int(self._bytes[review]) - size, size) for review, size in pairs]
        return {"texts": texts, "marked": int(marked), "label": int(self._classes[reviews[marked]])}


TASK = Select
