"""Tasks whose records are built once and read from disk (``lra.builder``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lra.batches import permutation
from lra.builder import RecordSet
from lra.source import DataConfig, given_root
from lra.tasks.base import Encoded, Label, Records, Task, majority


class StoredTask(Task, ABC):
    """A task with records on disk. A subclass builds them, encodes one as model input, and says how long that is."""

    folder: Path  # where the records lie, once prepared
    _data: DataConfig

    @abstractmethod
    def build(self, data: DataConfig) -> Path:
        """Build the records unless they are there, and return their folder."""

    @abstractmethod
    def encode(self, record: dict[str, Any]) -> Encoded:
        """Return the model input of a stored record. Raises ``ValueError`` saying what is wrong with it."""

    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """Return the length of every record after ``encode``: here the stored number "length"; int64 ``(N,)``."""
        return records.sizes["length"]

    def choose(self, split: str, policy: str) -> tuple[str, np.ndarray]:
        """Return the stored split that a split is taken from under a policy of ``data.validation``, and its records."""
        return split, np.arange(len(self.records(split)))

    def prepare(self, data: DataConfig) -> None:
        """Make the records on first use; cheap when they are there. Raises ``DataError``."""
        super().prepare(data)
        given_root(self.name, data)  # an error even where records were already made from a folder that is gone
        self.folder, self._data = self.build(data), data
        self._sets: dict[str, RecordSet] = {}

    def records(self, split: str) -> RecordSet:
        """Return the records of a split as they are stored, in stored order."""
        if split not in self._sets:
            self._sets[split] = RecordSet(self.folder, split)
        return self._sets[split]

    def dataset(self, split: str) -> StoredRecords:
        """Return the records of a split, encoded, under the validation policy of ``prepare``."""
        self.check_split(split, hasattr(self, "folder"))
        split = self._data.split(split)
        stored, chosen = self.choose(split, self._data.validation)
        number = getattr(self, split, 0)
        if 0 < number < len(chosen):
            chosen = chosen[np.sort(permutation(len(chosen), "sample")[:number])]
        return StoredRecords(self, self.records(stored), chosen)


class StoredRecords(Records):
    """Encoded records of one split: the ``chosen`` ones of those on disk, in order."""

    def __init__(self, task: StoredTask, stored: RecordSet, chosen: np.ndarray) -> None:
        self._task, self._stored, self._chosen = task, stored, chosen
        self._lengths: np.ndarray = task.encoded_lengths(stored)[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, Label]]:
        """Return (input, label) of several records. Raises ``DataError`` naming one that cannot be read."""
        records = self._stored.read(self._chosen[np.asarray(indices)])
        return [(self._task.encode(record), int(record["label"])) for record in records]

    def lengths(self) -> np.ndarray:
        """Return the encoded length of every record (of a pair: of the longer), int64 ``(N,)``; none is read."""
        return self._lengths

    def groups(self) -> np.ndarray | None:
        """Return the number stored beside each record under the name ``Task.grouped_by``, int64 ``(N,)``."""
        numbers = self._stored.sizes.get(self._task.grouped_by)  # those of a release may not be known
        return None if numbers is None else np.asarray(numbers[self._chosen])

    def labels(self) -> np.ndarray:
        """Return the class of every record, int64 ``(N,)``; none is read."""
        return np.asarray(self._stored.labels[self._chosen])

    def majority_accuracy(self) -> float:
        """Return the share of the most frequent class; none is read."""
        return majority([self.labels()])
