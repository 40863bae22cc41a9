"""Select: four movie reviews told by turns; at each turn, does its teller say a certain word anywhere? Not in LRA.

Each piece is the end of a review of IMDb, 100 to 300 bytes of it. It is cut into six turns, the turns of all four are
mixed, and each has the name of its piece in front, one of 256 symbols. The question is whether the piece has the word
"this", as nearly half of them do. It may be in any turn of that name, and in other pieces' turns too. Names, order and
lengths are drawn anew, so neither a fixed distance nor a symbol tells which turns count: names must be compared. A
training record is drawn from (seed, step), one to validate or test on from its number (``lra.pieces``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from chela.core.options import option, shown
from lra.pieces import BYTES_OF_A_WORD, IDS, WORD, SampledRecords, below, hashed, ids_of, reviews_of
from lra.source import DataConfig
from lra.tasks.base import IGNORED, Encoded, Label, Task
from lra.tasks.stored import StoredRecords
from lra.tasks.text import Text

BYTES = 257  # ids of bytes, padding 0 included


@dataclass
class Select(Task):
    """Two classes, without the word 0 and with it 1; ids byte + 1 or of words, then those of names."""

    pieces: int = option(4, "pieces of a record", ge=1, le=1000)
    shortest: int = option(100, "bytes of the shortest piece", ge=1, le=100_000)
    longest: int = option(300, "bytes of the longest piece", ge=1, le=100_000)
    turns: int = option(6, "parts of a piece, between those of others", ge=1, le=1000)
    names: int = option(256, "names that a piece may have", ge=2, le=10_000)
    word: str = option("this", "the word that is asked for, in small letters")
    words: bool = option(False, "words hashed to 2,048 ids, in place of bytes")
    train: int = option(20_000, "records that count as an epoch; each step draws new ones", ge=1)
    validation: int = option(1_000, "records to validate on", ge=1)
    test: int = option(5_000, "records to test on", ge=1)

    title = "Select"
    version = "2.0.0"  # of version 1 a convolution alone could tell the piece, by a marker in front
    objective = "tokens"
    num_classes = 2
    note = "not a task of LRA's: pieces of four IMDb reviews by turns, each with a name; does it have a certain word?"
    input_help = "token ids with spaces between"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest < self.shortest:
            raise ValueError(f"task.longest: expected shortest={self.shortest} or more, got {self.longest}")
        if not WORD.fullmatch(self.word.encode()):
            raise ValueError(f"task.word: expected one word of small letters, digits or ', got {shown(self.word)}")
        if self.names < self.pieces:
            raise ValueError(f"task.names: expected pieces={self.pieces} or more, got {self.names}")
        self.first_name = IDS if self.words else BYTES
        self.vocab_size = self.first_name + self.names
        self.l_max = self.pieces * (self.turns + self.longest // (BYTES_OF_A_WORD if self.words else 1))

    def prepare(self, data: DataConfig) -> None:
        """Get IMDb ready."""
        super().prepare(data)
        self._reviews: Text = reviews_of(data)

    def dataset(self, split: str) -> Selections:
        """Return the records of a split."""
        self.check_split(split, hasattr(self, "_reviews"))
        return Selections(self, self._reviews.dataset(split), split)

    def baseline(self) -> str:
        """Return the score of the best rule without names: by the turn at hand, and how many turns have the word."""
        if not self.words:
            return ""
        votes = Counter[tuple[bool, int]]()
        for case, label in self._turns("train"):
            votes[case] += 2 * label - 1
        hits = [(votes[case] > 0) == label for case, label in self._turns("test")]
        return f"{np.mean(hits):.2%} by whether the turn at hand has the word, and how many turns have it"

    def _turns(self, split: str) -> Iterator[tuple[tuple[bool, int], int]]:
        """Yield for each turn whether it has the word, how many turns of its record have it, and the target."""
        (word,), records = hashed(self.word.encode()), self.dataset(split)
        for ids, targets in records.read(range(min(5_000, len(records)))):
            places = np.flatnonzero(np.asarray(targets) != IGNORED)
            has = np.add.reduceat(np.asarray(ids) == word, places) > 0
            for own, target in zip(has.tolist(), np.asarray(targets)[places].tolist(), strict=True):
                yield (own, int(has.sum())), target


class Selections(SampledRecords):
    """Rows of pieces, each of a review's end."""

    def __init__(self, task: Select, reviews: StoredRecords, split: str) -> None:
        super().__init__(reviews, task.longest, getattr(task, split), f"select {split}")
        self._task = task

    def _plan(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, ...]:
        """Return of N records the pieces' reviews, bytes and names, ``(N, P)``, and whose turn it is, ``(N, P·T)``."""
        task = self._task
        words = self.draws(numbers, (3 + task.turns) * task.pieces)
        reviews, lengths, names, *turns = np.split(words, 3 + task.turns, axis=1)
        return (
            below(reviews, len(self._usable)),
            task.shortest + below(lengths, task.longest - task.shortest + 1),
            _apart(names, task.names),
            np.argsort(np.concatenate(turns, axis=1), axis=1) % task.pieces,
        )

    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, Label]]:
        """Return (input, label) of several records."""
        return [self._encoded(*self.drawn(int(i))) for i in indices]

    def _encoded(self, texts: list[bytes], names: list[int], order: list[int]) -> tuple[np.ndarray, np.ndarray]:
        task, word = self._task, self._task.word.encode()
        pieces = [ids_of(text, task.words) for text in texts]
        has = [word in WORD.findall(text.lower()) for text in texts]
        if task.words:  # what is cut off does not count
            has = [bool((ids == hashed(word)).any()) for ids in pieces]
        left = [iter(np.array_split(ids, task.turns)) for ids in pieces]
        turns = [np.concatenate([[task.first_name + names[piece]], next(left[piece])]) for piece in order]
        ids = np.concatenate(turns).astype(np.uint16)
        targets = np.full(len(ids), IGNORED)
        targets[np.cumsum([0, *map(len, turns[:-1])])] = [has[piece] for piece in order]
        return ids, targets

    def lengths_of(self, numbers: np.ndarray) -> np.ndarray:
        """Return the length of each record, of words what it is at most; int64 ``(N,)``."""
        task = self._task
        _, sizes, *_ = self._plan(numbers)
        return np.asarray((sizes // (BYTES_OF_A_WORD if task.words else 1)).sum(1) + task.pieces * task.turns)

    def drawn(self, i: int) -> tuple[list[bytes], list[int], list[int]]:
        """Return a record's pieces as bytes, their names, and whose turn it is."""
        reviews, sizes, names, order = (part[0].tolist() for part in self._plan([i]))
        pairs = zip(reviews, sizes, strict=True)
        return [self.text(review, int(self._bytes[review]) - size, size) for review, size in pairs], names, order


def _apart(words: np.ndarray, bound: int) -> np.ndarray:
    """Turn 32-bit words (N, P) into integers in [0, bound) of which no two in a row are equal."""
    P = words.shape[1]
    drawn = below(words, bound - np.arange(P))
    for i in range(1, P):  # the i-th of those that are left
        for earlier in np.sort(drawn[:, :i], axis=1).T:
            drawn[:, i] += drawn[:, i] >= earlier
    return drawn
