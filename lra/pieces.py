"""Records made of pieces of movie reviews, each drawn from its number alone; every epoch has new ones.

Training, validation and test share no review, and so no piece. Shape legend: N records, P pieces of each.
"""

from __future__ import annotations

import re
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from lra.batches import GOLDEN, key, mix, permutation
from lra.source import DataConfig
from lra.tasks.base import Encoded, Label, Records
from lra.tasks.stored import StoredRecords
from lra.tasks.text import Text

IDS = 2048  # of hashed words, padding 0 included
WORD = re.compile(rb"[a-z0-9']+")
BYTES_OF_A_WORD = 4  # at least, in the mean of a piece, with the space behind it: further words are cut off
_WHOLE = 1_000_000  # bytes: more than any review has


def reviews_of(data: DataConfig) -> Text:
    """Return IMDb, prepared, its reviews whole; a record is the bytes of one plus 1, and its sentiment."""
    reviews = Text(max_length=_WHOLE)
    reviews.prepare(replace(data, source="auto"))
    return reviews


def hashed(text: bytes) -> np.ndarray:
    """Return an id 1 … 2,047 of each word, in small letters, uint16 ``(words,)``: the same for the same word.

    A text without a word, a row of points for instance, is one empty word.

    >>> len(hashed(b"It's good -- it's GOOD")), len(set(hashed(b"It's good -- it's GOOD").tolist()))
    (4, 2)
    """
    return np.array([zlib.crc32(word) % (IDS - 1) + 1 for word in WORD.findall(text.lower()) or [b""]], np.uint16)


def ids_of(text: bytes, words: bool) -> np.ndarray:
    """Return the ids of a piece, uint16: of its words, hashed and cut, or of its bytes, each plus 1."""
    if words:
        return hashed(text)[: len(text) // BYTES_OF_A_WORD]
    return np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(1)


class SampledRecords(Records):
    """Records drawn from a split's reviews. Training takes new ones at every step, the others those of 0 … N − 1.

    A review has ``least`` bytes or is not used; ``number`` is N, in training what counts as an epoch.
    """

    def __init__(self, reviews: StoredRecords, least: int, number: int, name: str) -> None:
        self._reviews, self._number, self._key = reviews, number, key(name)
        self._usable = np.flatnonzero(reviews.lengths() >= least)
        self._bytes = reviews.lengths()[self._usable]

    def __len__(self) -> int:
        return self._number

    def draws(self, numbers: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
        """Return so many 32-bit words for each number, uint64 ``(N, count)``."""
        first = mix(np.asarray(numbers).astype(np.uint64) * GOLDEN + self._key)
        words: np.ndarray = mix(first[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN) >> np.uint64(32)
        return words

    @cached_property
    def _texts(self) -> list[bytes]:
        """The usable reviews, some 30 MB: from disk, one by one, they would take longer than a network's step."""
        return [(np.asarray(ids) - 1).astype(np.uint8).tobytes() for ids, _ in self._reviews.read(self._usable)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_texts"}  # a worker reads its own

    def text(self, review: int, start: int, length: int) -> bytes:
        """Return a piece of a usable review."""
        return self._texts[review][start : start + length]

    @abstractmethod
    def lengths_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the length of each record, or what it is at most, int64 ``(N,)``; nothing is read."""

    def lengths(self) -> np.ndarray:
        """Return that of the records 0 … N − 1."""
        return self.lengths_of(np.arange(self._number))

    def longest(self, indices: np.ndarray) -> int:
        """Return the length of the longest of some records."""
        return int(self.lengths_of(indices).max())

    def batch(self, size: int, pool: int, seed: int, step: int) -> np.ndarray:
        """Return the numbers of a step's records, drawn from (seed, step) alone; like lengths of a pool together."""
        block, place = divmod(step, pool)
        words = mix(np.arange(size * pool, dtype=np.uint64) * GOLDEN + key(seed, "drawn", block))
        numbers = (words >> np.uint64(1)).astype(np.int64)
        ordered = numbers[np.argsort(self.lengths_of(numbers), kind="stable")]
        at = int(permutation(pool, seed, "pool", block)[place]) * size
        return ordered[at : at + size]


def below(words: np.ndarray, bound: Any) -> np.ndarray:
    """Turn 32-bit words into integers in [0, bound), int64; bias bound / 2³²."""
    return ((words * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


class Pairs(SampledRecords):
    """Two pieces of ``piece`` bytes each: of one review and disjoint (label 1), or of two (label 0).

    Where in its review a piece lies is drawn alike for both labels: of two disjoint places one is taken. With ``words``
    their words are hashed, in place of bytes.
    """

    def __init__(self, reviews: StoredRecords, piece: int, number: int, name: str, words: bool) -> None:
        super().__init__(reviews, 2 * piece, number, f"pairs {name}")
        self._piece, self._words = piece, words

    def texts(self, i: int) -> tuple[bytes, bytes]:
        """Return the two pieces of a record."""
        (draw,) = self.draws([i], 7)
        size = len(self._usable)
        first = int(below(draw[0], size))
        other = first if i & 1 else (first + 1 + int(below(draw[1], size - 1))) % size
        out = []
        for side, review, at in ((0, first, draw[2:4]), (1, other, draw[2:4] if i & 1 else draw[4:6])):
            places = sorted(below(at, self._bytes[review] - 2 * self._piece + 1).tolist())
            late = int(draw[6]) & 1 ^ side
            out.append(self.text(review, places[late] + late * self._piece, self._piece))
        return out[0], out[1]

    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, Label]]:
        """Return (two sequences, label) of several records."""
        pairs = [[ids_of(text, self._words) for text in self.texts(int(i))] for i in indices]
        return [((first, second), int(i) & 1) for i, (first, second) in zip(indices, pairs, strict=True)]

    def lengths_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return what the length is at most."""
        return np.full(len(numbers), self._piece // (BYTES_OF_A_WORD if self._words else 1))

    def majority_accuracy(self) -> float:
        """Return a half: every second record is of one review."""
        return 0.5


def cosine_accuracy(train: Pairs, test: Pairs, most: int = 5_000) -> float:
    """Return the accuracy on the test pairs of a threshold on the cosine of the pieces' TF-IDF vectors of words.

    Document frequencies and threshold come from at most ``most`` training pairs.
    """
    known, asked = (
        [[Counter(WORD.findall(text.lower())) for text in pairs.texts(i)] for i in range(number)]
        for pairs, number in ((train, min(most, len(train))), (test, len(test)))
    )
    documents = Counter(word for pair in known for bag in pair for word in bag)

    def cosine(pair: list[Counter[bytes]]) -> float:
        first, second = ({w: n * np.log(2 * len(known) / (1 + documents[w])) for w, n in bag.items()} for bag in pair)
        dot = sum(value * second[word] for word, value in first.items() if word in second)
        norms = [sum(value**2 for value in side.values()) ** 0.5 for side in (first, second)]
        return float(dot / max(norms[0] * norms[1], 1e-9))

    values, tested = (np.array([cosine(pair) for pair in pairs]) for pairs in (known, asked))
    order = np.argsort(values)
    right = np.cumsum(np.where(order & 1, -1, 1))  # with all up to here called different
    return float(((tested > values[order[int(np.argmax(right))]]) == np.arange(len(tested)) % 2).mean())
