"""What a task is: facts about its input, and the records of each split.

``docs/extend.md`` has a task of one's own, which needs a class with a few facts and ``dataset``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from chela.core.errors import DataError
from chela.core.options import check_options, shown
from lra.source import DataConfig

Encoded = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Token ids ``(L,)`` integer or values ``(L, F)`` float32; a pair task has two of them."""

Label = int | np.ndarray
"""The class of a sequence, or for the objective "tokens" a target for each position, int64 ``(L,)``."""

IGNORED = -100
"""The target of a position that is not scored."""

SPLITS = ("train", "validation", "test")
_READ_AT_ONCE = 1000


class Records(ABC):
    """The records of one split, read at random."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, Label]]:
        """Return (input, label) of several records. Raises ``DataError`` naming one that cannot be read."""

    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Return the length of every record (of a pair: of the longer), int64 ``(N,)``."""

    def longest(self, indices: np.ndarray) -> int:
        """Return the length of the longest of some records."""
        return int(self.lengths()[indices].max())

    def __getitem__(self, i: int) -> tuple[Encoded, Label]:
        return self.read([range(len(self))[i]])[0]

    def groups(self) -> np.ndarray | None:
        """Return the number by which results are also told apart, see ``Task.grouped_by``; int64 ``(N,)``."""
        return None

    def batch(self, size: int, pool: int, seed: int, step: int) -> np.ndarray:
        """Return which records make the global training batch of a step; here as ``lra.batches.batch_indices`` says."""
        from lra.batches import batch_indices

        return batch_indices(self.lengths(), size, pool, seed, step)

    def ordered(self, size: int, step: int) -> tuple[np.ndarray, bool]:
        """Return the records of a step where row b goes on from the step before, and whether all start a new text."""
        raise DataError("data.carry: expected records that go on from each other, as those of one text do")

    def epochs(self, records: int) -> float:
        """Return how many passes over the split so many training records make."""
        return records / len(self)

    def majority_accuracy(self) -> float:
        """Return what the most frequent target scores as the constant answer. Here: reads all records."""
        starts = range(0, len(self), _READ_AT_ONCE)
        parts = (self.read(range(start, min(start + _READ_AT_ONCE, len(self)))) for start in starts)
        return majority(label for part in parts for _, label in part)


class Task:
    """A task; ``prepare`` before ``dataset``.

    Its options are the fields of a dataclass, with ``option``, or the arguments of ``__init__``. What depends on them,
    such as ``l_max``, is set in ``__post_init__`` or ``__init__``.
    """

    name: str  # in results and folders; the class's name in small letters unless it says another
    title: str  # in tables; the class's name unless it says another
    version: str = "1.0.0"  # of the records and their encoding
    objective: str = "classification"  # gives each sequence a label; "tokens": each position
    score: str = "accuracy"  # what picks the best checkpoint and what tables show; or "loss"
    num_classes: int  # or the number of symbols that a position's target is one of
    l_max: int  # longest encoded sequence
    vocab_size: int | None = None  # number of token ids, padding 0 included; None for continuous input
    input_dim: int = 1  # values per position for continuous input, 1 for tokens
    pair: bool = False  # whether a record is two sequences
    note: str = ""  # printed with every result, after ``prepare``: why the data is not the benchmark's
    sources: tuple[str, ...] = ("auto",)  # values of ``data.source`` that the task knows
    generated: bool = False  # whether its data is generated unless ``data.root`` names a release of it
    grouped_by: str = ""  # what ``Records.groups`` tells of a record, such as "pairs"
    further: tuple[str, ...] = ()  # names of splits beside the three on which a trained network is tested too
    own_text: bool = False  # ``data.root`` is the text; its file's name is a part of a run's fingerprint
    in_order: bool = False  # the records are of one text, each target the next input: ``data.carry`` reads in order
    context: str = ""  # from how much of a text a target is predicted in validation and test; empty where it is none
    input_help: str = "numbers with spaces or commas between: token ids, or the values of all positions"  # of a line
    classes: tuple[str, ...] = ()  # their names, for people
    encoding: dict[str, Any]  # the name and the options by which ``get_task`` made it
    retired: ClassVar[dict[str, Any]] = {}
    """Removed options, each with its one value that is still read and still hashed for the fingerprint."""

    def __init_subclass__(cls) -> None:
        cls.name = vars(cls).get("name", cls.__name__.lower())
        cls.title = vars(cls).get("title", cls.__name__)

    def __post_init__(self) -> None:
        """Check the options of a dataclass. Raises ``ValueError`` naming the one that is out of range."""
        check_options(self, "task.")

    @property
    def train_length(self) -> int:
        """Longest sequence to learn from; a further split may have longer ones."""
        return self.l_max

    def prepare(self, data: DataConfig) -> None:
        """Get the data ready on first use. Raises ``DataError`` where it cannot be had."""
        check_options(data, "data.")
        if data.source not in self.sources:
            expected = f"expected {' or '.join(self.sources)} for task={self.name}"
            raise DataError(f"data.source is {data.source!r}: {expected}")

    def check_split(self, split: str, prepared: bool = True) -> None:
        """Raise ``ValueError`` for a split that there is not, ``DataError`` before ``prepare``."""
        if split not in (known := (*SPLITS, *self.further)):
            raise ValueError(f"split is {split!r}: expected one of {', '.join(known)}")
        if not prepared:
            raise DataError(f"{self.name}: call prepare() before asking for records")

    def dataset(self, split: str) -> Records:
        """Return the records of ``train``, ``validation`` or ``test``."""
        raise NotImplementedError(f"{type(self).__name__} must define dataset(split)")

    def baseline(self) -> str:
        """Return, in words, what a simple rule scores on the test set, after ``prepare``; empty if none is known."""
        return ""

    def check(self, encoded: Encoded, label: Label | None = None) -> None:
        """Raise ``ValueError`` for what the network cannot take: a wrong length, shape, token or label."""
        for sequence in sequences(encoded):
            if len(sequence) == 0:
                raise ValueError("the sequence is empty, expected at least one token")
            if len(sequence) > self.l_max:
                raise ValueError(f"the sequence has {len(sequence)} tokens, expected at most {self.l_max}")
            if self.vocab_size is None:
                if sequence.shape[1:] != (self.input_dim,):
                    raise ValueError(f"expected values of shape (L, {self.input_dim}), got {sequence.shape}")
            elif sequence.ndim != 1 or sequence.dtype.kind not in "iu":
                raise ValueError(f"expected token ids of shape (L,), got {sequence.dtype} {sequence.shape}")
            elif not 0 < sequence.min() <= sequence.max() < self.vocab_size:
                at = int(np.flatnonzero((sequence < 1) | (sequence >= self.vocab_size))[0])
                known = f"the vocabulary (ids 1 … {self.vocab_size - 1})"
                raise ValueError(f"token {sequence[at]} at position {at} is not in {known}")
        if label is None:
            return
        targets = np.atleast_1d(label)
        if self.objective == "tokens":
            if np.shape(label) != (len(sequences(encoded)[0]),):
                raise ValueError(f"expected a target for each token, got {np.shape(label)} for {len(encoded)} tokens")
            targets = targets[targets != IGNORED]
        bad = targets[(targets < 0) | (targets >= self.num_classes)]
        if bad.size:
            raise ValueError(f"label is {bad[0]}, expected 0 … {self.num_classes - 1}")

    def read_line(self, line: str) -> Encoded:
        """Return the input that a line of text stands for, see ``input_help``. Raises ``ValueError``."""
        values = numbers(line)
        if self.vocab_size is not None:
            if (values % 1).any():
                raise ValueError("expected whole numbers, the ids of tokens")
            return values.astype(np.int64)
        if values.size % self.input_dim:
            raise ValueError(f"expected a multiple of {self.input_dim} numbers, got {values.size:,}")
        return values.astype(np.float32).reshape(-1, self.input_dim)


class InMemory(Records):
    """Records that fit into memory: (input, label) of each, see ``Encoded`` and ``Label``; lists stand for arrays."""

    def __init__(self, records: Sequence[tuple[Encoded, Label]]) -> None:
        self._records = [(_arrays(encoded), _arrays(label)) for encoded, label in records]
        self._lengths = np.array([max(map(len, sequences(encoded))) for encoded, _ in self._records], np.int64)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, Label]]:
        """Return (input, label) of several records."""
        return [self._records[i] for i in indices]

    def lengths(self) -> np.ndarray:
        """Return the length of every record, int64 ``(N,)``."""
        return self._lengths


def _arrays(given: Any) -> Any:
    """Turn lists into arrays, those of a pair too."""
    if isinstance(given, tuple):
        return tuple(map(_arrays, given))
    return np.asarray(given) if isinstance(given, list) else given


def sequences(encoded: Encoded) -> tuple[np.ndarray, ...]:
    """Return the one or two sequences of a record."""
    return encoded if isinstance(encoded, tuple) else (encoded,)


def majority(labels: Iterable[Label]) -> float:
    """Return the share of the most frequent target among those that count.

    >>> majority([np.array([1, 1, IGNORED]), np.array([2])])
    0.6666666666666666
    """
    counts = Counter[int]()
    for label in labels:
        counts.update(np.ravel(label).tolist())
    del counts[IGNORED]
    if not counts:
        raise DataError("no record has a target that is scored: expected at least one")
    return max(counts.values()) / counts.total()


def numbers(line: str) -> np.ndarray:
    """Read numbers with spaces or commas between, float64 ``(n,)``. Raises ``ValueError``.

    >>> numbers("1, 2 3")
    array([1., 2., 3.])
    """
    try:
        values = np.array([float(word) for word in line.replace(",", " ").split()])
    except ValueError as error:
        raise ValueError(f"expected numbers, got {shown(str(error))}") from None
    if not np.isfinite(values).all():
        raise ValueError("expected finite numbers")
    return values
