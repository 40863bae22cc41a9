"""What every task gives: facts about its input, records of a split, and how a stored record becomes model input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lra.builder import Progress, RecordSet
from lra.errors import DataError
from lra.schema import DataConfig
from lra.source import given_root
from lra.streams import permutation

Encoded = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Token ids `(L,)` integer or values `(L, F)` float32; a pair task has two of them."""

SPLITS = ("train", "validation", "test")


class Task(ABC):
    """One benchmark task. Made by `lra.tasks.get_task`; `prepare` before `dataset`.

    Attributes:
        name: of the task.
        version: of the records and their encoding.
        num_classes: classes.
        l_max: longest encoded sequence.
        vocab_size: number of token ids, padding 0 included; `None` for continuous input.
        input_dim: values per position for continuous input, 1 for tokens.
        pair: whether a record is two sequences.
        note: what every result on this data must say, after `prepare`: empty, or why it is not the benchmark's.
        sources: values of `data.source` that the task knows.
    """

    name: str
    version: str
    num_classes: int
    l_max: int
    vocab_size: int | None
    input_dim: int = 1
    pair: bool = False
    note: str = ""
    sources: tuple[str, ...] = ("auto",)

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._data: DataConfig | None = None
        self._sets: dict[str, RecordSet] = {}

    @abstractmethod
    def _build(self, data: DataConfig, progress: Progress | None) -> Path:
        """Build the records unless they are there; returns their folder."""

    @abstractmethod
    def encode(self, record: dict[str, Any]) -> Encoded:
        """Model input of one stored record. Raises `ValueError` saying what is wrong with it."""

    @abstractmethod
    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """Length of every record after `encode`, from what is stored beside the records; int64 `(N,)`."""

    def check(self, encoded: Encoded) -> None:
        """Raise `ValueError` for what the network cannot take: an empty or over-long sequence, an unknown token."""
        for sequence in encoded if isinstance(encoded, tuple) else (encoded,):
            if len(sequence) == 0:
                raise ValueError("the sequence is empty, expected at least one token")
            if len(sequence) > self.l_max:
                raise ValueError(f"the sequence has {len(sequence)} tokens, expected at most {self.l_max}")
            if self.vocab_size is not None and not 0 < sequence.min() <= sequence.max() < self.vocab_size:
                bad = int(np.flatnonzero((sequence < 1) | (sequence >= self.vocab_size))[0])
                raise ValueError(
                    f"token {int(sequence[bad])} at position {bad} is not in the vocabulary "
                    f"(ids 1 … {self.vocab_size - 1})"
                )

    def prepare(self, data: DataConfig, *, progress: Progress | None = None) -> None:
        """Make the records on first use; cheap when they are there. Raises `DataError`."""
        data.check()
        if data.source not in self.sources:
            raise DataError(
                f"data.source is {data.source!r}: expected {' or '.join(self.sources)} for task={self.name}"
            )
        given_root(self.name, data)  # a folder that is not there is said even where records were made from it
        self._folder, self._data, self._sets = self._build(data, progress), data, {}

    @property
    def folder(self) -> Path:
        """Where the records lie."""
        if self._folder is None:
            raise DataError(f"{self.name}: call prepare() before asking for records")
        return self._folder

    def records(self, split: str) -> RecordSet:
        """The records of a split as they are stored, in stored order."""
        if split not in self._sets:
            self._sets[split] = RecordSet(self.folder, split)
        return self._sets[split]

    def dataset(self, split: str) -> Records:
        """The records of `train`, `validation` or `test`, encoded, under the validation policy of `prepare`."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
        folder = self.folder
        assert self._data is not None, folder
        if split == "validation" and self._data.validation == "test":
            split = "test"
        stored, chosen = self._choose(split, self._data.validation)
        return Records(self, self.records(stored), chosen)

    def _choose(self, split: str, policy: str) -> tuple[str, np.ndarray | None]:
        """The stored split that `split` is taken from, and which of its records (all: None)."""
        return split, None


def sample(records: np.ndarray, number: int) -> np.ndarray:
    """A fixed random choice of `number` of some records, in their order; all when it is 0."""
    if not number:
        return records
    chosen: np.ndarray = records[np.sort(permutation(len(records), "sample")[:number])]
    return chosen


class Records:
    """Encoded records of one split: a sequence of (input, label).

    Args:
        task: encodes them.
        stored: the records on disk.
        chosen: which of them, in order; all when None.
    """

    def __init__(self, task: Task, stored: RecordSet, chosen: np.ndarray | None = None) -> None:
        self._task, self._stored = task, stored
        self._chosen = chosen
        lengths = task.encoded_lengths(stored)
        self._lengths = lengths if chosen is None else lengths[chosen]
        self._labels = stored.labels if chosen is None else stored.labels[chosen]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Encoded, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return self.read([i % len(self)])[0]

    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, int]]:
        """Several records at once, which reads faster than one by one. Raises `DataError` naming the bad one."""
        places = np.asarray(indices) if self._chosen is None else self._chosen[np.asarray(indices)]
        out = []
        for i, record in zip(places.tolist(), self._stored.read(places), strict=True):
            try:
                encoded, label = self._task.encode(record), int(record["label"])
                self._check(encoded, label)
            except (ValueError, KeyError) as error:
                raise DataError(f"{self._task.name}: {self._stored.where(i)}: {error}") from None
            out.append((encoded, label))
        return out

    def stored(self, i: int) -> dict[str, Any]:
        """One record as it is stored, before `encode`."""
        return self._stored.read([i if self._chosen is None else int(self._chosen[i])])[0]

    def _check(self, encoded: Encoded, label: int) -> None:
        if not 0 <= label < self._task.num_classes:
            raise ValueError(f"label is {label}, expected 0 … {self._task.num_classes - 1}")
        self._task.check(encoded)

    def lengths(self) -> np.ndarray:
        """Encoded length of every record (of a pair: of the longer), int64 `(N,)`; no record is read."""
        return self._lengths

    def labels(self) -> np.ndarray:
        """Class of every record, int64 `(N,)`; no record is read."""
        return self._labels

    def majority_accuracy(self) -> float:
        """Share of the most frequent class: what a constant answer scores."""
        return float(np.bincount(self._labels).max() / len(self._labels))
