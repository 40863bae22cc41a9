"""Batches for training, validation and test of one task, as a LightningDataModule.

A batch of step t is a pure function of (seed, t): ``first_step`` alone resumes a run, and each of several processes
takes every ``world_size``-th record of the same global batch, padded to the global batch's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from chela.core.errors import DataError
from lra.batches import Batch, collate, eval_batches
from lra.source import DataConfig
from lra.tasks import get_task
from lra.tasks.base import InMemory, Records

Picked = np.ndarray | tuple[np.ndarray, bool]
"""The records of a batch; with ``data.carry`` also whether they start a new text."""


@dataclass(eq=False)
class _Batches(Dataset[Batch | DataError]):
    """This process's share of global batches, in P = ``parts`` parts each.

    Item P·t + p is what process r would get of the global batch of step t as process r + p·``world_size`` of P times as
    many. So fewer processes in more parts see the same records together as more processes in fewer. An item that cannot
    be read is the ``DataError`` itself, so that it crosses from a loader worker as it is.
    """

    records: Records
    pick: Callable[[int], Picked]
    rank: int
    world_size: int
    parts: int
    groups: Any = None  # of every record, where a batch tells them

    def __getitem__(self, item: int) -> Batch | DataError:
        step, part = divmod(item, self.parts)
        picked = self.pick(step)
        batch, fresh = picked if isinstance(picked, tuple) else (picked, None)
        mine = batch[self.rank + part * self.world_size :: self.world_size * self.parts]
        try:
            records = self.records.read(mine)
        except DataError as error:
            return error
        also: Batch = {"part": part, "groups": None if self.groups is None else self.groups[mine].tolist()}
        also |= {} if fresh is None else {"fresh": fresh}
        return collate(records, self.records.longest(batch), step) | also


class _Loader(DataLoader[Any]):
    """Raises, in the main process, the ``DataError`` that came in a batch's place."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


class LRADataModule(lightning.LightningDataModule):
    """The data of one task.

    Args:
        task: A task, or its options (``lra.tasks.task_options``).
        data_config: Where data lies and how batches are made.
        batch_size: Records of a global training batch. Of several processes each takes its part here, so a ``Trainer``
            needs ``use_distributed_sampler=False``.
        eval_batch_size: Most records of a global evaluation batch; ``batch_size`` when None.
        seed: Of the data order.
        first_step: First step that ``train_dataloader`` yields: 0, or where a run goes on.
        max_steps: The step after the last.
        rank, world_size: This process among how many; the trainer's once attached.
        accumulate: Parts of a training batch that a process takes one by one, each with its number as ``part``.
        pieces: Neighbouring processes that get the same records, each to work on a piece of every sequence.

    Raises:
        ValueError: A batch that cannot be shared evenly among the processes.
        DataError: From ``prepare_data``, where the data cannot be had; from a loader, for a damaged record.
    """

    def __init__(
        self,
        task: Any,
        data_config: DataConfig,
        *,
        batch_size: int,
        eval_batch_size: int | None = None,
        seed: int,
        first_step: int = 0,
        max_steps: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        pieces: int = 1,
    ) -> None:
        super().__init__()
        self.task = get_task(task)
        self.data = data_config
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.seed, self.first_step, self.max_steps = seed, first_step, max_steps
        self.accumulate, self.pieces = accumulate, pieces
        self.rank, self.world_size = rank, world_size
        self._prepared = False
        self._checked: set[str] = set()  # splits in memory
        self.share()

    def share(self) -> tuple[int, int]:
        """Return this process's number and how many share a batch. Raises ``ValueError`` where they cannot evenly.

        Those that work on pieces of the same records have one number.
        """
        rank, world_size = self.rank, self.world_size
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank // self.pieces, self.trainer.world_size // self.pieces
        shares = world_size * self.accumulate
        if self.batch_size < 1 or self.batch_size % shares:
            what = f"the {shares} processes" if shares == world_size else f"{shares}, processes times accumulate"
            raise ValueError(f"batch_size is {self.batch_size}: expected a multiple of {what}")
        return rank, world_size

    def prepare_data(self) -> None:
        """Make the records, once; a second process waits for the first."""
        if not self._prepared:
            self.task.prepare(self.data)
            self._prepared = True

    def records(self, split: str) -> Records:
        """Return the records of ``train``, ``validation`` or ``test``."""
        self.prepare_data()
        found = self.task.dataset(self.data.split(split))
        if not isinstance(found, Records):
            got = type(found).__name__
            raise DataError(f"{self.task.name}: expected InMemory(…) from dataset({split!r}), got {got}")
        if not len(found):
            raise DataError(f"{self.task.name}: expected records from dataset({split!r}), got none")
        if isinstance(found, InMemory) and split not in self._checked:  # what is stored was checked when it was built
            for i, (encoded, label) in enumerate(found.read(range(len(found)))):
                try:
                    self.task.check(encoded, label)
                except ValueError as error:
                    raise DataError(f"{self.task.name}: record {i} of {split}: {error}") from None
            self._checked.add(split)
        return found

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the batches of steps ``first_step`` … ``max_steps − 1``, in order, each in its parts."""
        records, parts = self.records("train"), self.accumulate
        drawn = partial(records.batch, self.batch_size, self.data.pool, self.seed)
        pick = partial(records.ordered, self.batch_size) if self.data.carry else drawn
        return self._loader(records, pick, range(self.first_step * parts, self.max_steps * parts), parts)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return every validation record once, sorted by length."""
        return self.evaluation(self.records("validation"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return every test record once, sorted by length."""
        return self.evaluation(self.records("test"))

    def evaluation(self, records: Records, chosen: np.ndarray | None = None) -> DataLoader[Batch]:
        """Return every record, or the chosen ones, once, sorted by length."""
        chosen = np.arange(len(records)) if chosen is None else chosen
        _, processes = self.share()
        batches = [chosen[batch] for batch in eval_batches(records.lengths()[chosen], self.eval_batch_size)]
        if len(chosen) < len(batches) * processes:
            raise DataError(
                f"{len(chosen)} records in batches of {self.eval_batch_size} are too few for {processes} processes: "
                "expected at least one for each process in every batch"
            )
        return self._loader(records, batches.__getitem__, range(len(batches)), 1, records.groups())

    def _loader(self, records: Records, pick: Callable[[int], Picked], items: range, *more: Any) -> _Loader:
        return _Loader(
            _Batches(records, pick, *self.share(), *more),
            batch_size=None,  # an item is a batch
            sampler=items,
            num_workers=self.data.workers,
            # array_record's threads do not survive a fork: a forked worker crashes once its parent has read a record
            multiprocessing_context="spawn" if self.data.workers else None,
            pin_memory=torch.cuda.is_available(),
        )
