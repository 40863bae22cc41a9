"""Batches for training, validation and test of one task, as a LightningDataModule.

A batch of step t is a pure function of (seed, t): `first_step` alone resumes a run, and each of several processes takes
every `world_size`-th record of the same global batch, padded to the global batch's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lra.batches import batch_indices, eval_batches
from lra.builder import Progress
from lra.errors import DataError
from lra.schema import DataConfig
from lra.tasks import get_task
from lra.tasks.base import Encoded, Records

Batch = dict[str, Any]


def collate(records: Sequence[tuple[Encoded, int]], length: int, step: int) -> Batch:
    """Pad encoded records to `length`.

    Args:
        records: (input, label) of each.
        length: L, at least the longest.
        step: passed on.

    Returns:
        `inputs` `(B, L)` int64 or `(B, L, F)` float32, `mask` `(B, L)` bool (True: real), `labels` `(B,)` int64, and
        `step`. Records that are pairs give inputs and mask of `2B` rows: the first documents, then the second.
    """
    if records and isinstance(records[0][0], tuple):
        rows = [x[0] for x, _ in records] + [x[1] for x, _ in records]
    else:
        rows = [x for x, _ in records]
    tokens = rows[0].ndim == 1
    inputs = np.zeros((len(rows), length, *rows[0].shape[1:]), np.int64 if tokens else np.float32)
    mask = np.zeros((len(rows), length), np.bool_)
    for row, sequence in enumerate(rows):
        inputs[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = True
    return {
        "inputs": torch.from_numpy(inputs),
        "mask": torch.from_numpy(mask),
        "labels": torch.tensor([label for _, label in records], dtype=torch.int64),
        "step": step,
    }


class _Steps(Dataset[Batch]):
    """The training batches, in the order in which this process takes them: P = `accumulate` parts of every step.

    Item P·t + p is what process r would get of the global batch of step t as process r + p·`world_size` of P times as
    many, so that fewer processes in more parts see the same records together as more processes in fewer.
    """

    def __init__(
        self, records: Records, batch_size: int, pool: int, seed: int, rank: int, world_size: int, accumulate: int
    ) -> None:
        self.records, self.batch_size, self.pool, self.seed = records, batch_size, pool, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.lengths = records.lengths()

    def __getitem__(self, item: int) -> Batch:
        step, part = divmod(item, self.accumulate)
        batch = batch_indices(self.lengths, self.batch_size, self.pool, self.seed, step)
        share, shares = self.rank + part * self.world_size, self.world_size * self.accumulate
        return _share(self.records, batch, self.lengths, step, share, shares) | {"part": part}


class _Fixed(Dataset[Batch]):
    """Evaluation batches: every record once, in a fixed order."""

    def __init__(self, records: Records, batch_size: int, rank: int, world_size: int) -> None:
        self.records, self.rank, self.world_size = records, rank, world_size
        self.lengths = records.lengths()
        self.batches = eval_batches(self.lengths, batch_size)
        if len(records) < len(self.batches) * world_size:
            raise DataError(
                f"{len(records)} records in batches of {batch_size} are too few for {world_size} processes: "
                "expected at least one for each process in every batch"
            )

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Batch:
        return _share(self.records, self.batches[i], self.lengths, i, self.rank, self.world_size)


def _share(records: Records, batch: np.ndarray, lengths: np.ndarray, step: int, share: int, shares: int) -> Batch:
    return collate(records.read(batch[share::shares]), int(lengths[batch].max()), step)


class LRADataModule(lightning.LightningDataModule):
    """The data of one task.

    Args:
        task_config: a configuration of `lra.schema.TASKS`.
        data_config: where data lies and how batches are made.
        batch_size: records of a global training batch.
        eval_batch_size: most records of a global evaluation batch; `batch_size` when None.
        seed: of the data order.
        first_step: first step that `train_dataloader` yields: 0, or where a run goes on.
        max_steps: the step after the last.
        rank: of this process; the trainer's once attached.
        world_size: number of processes; the trainer's once attached.
        accumulate: parts of a training batch that a process takes one by one, for
            `Trainer(accumulate_grad_batches=...)`; they bear their number as `part`.
        progress: called with (what, done, total) while records are made.

    With several processes, `Trainer(use_distributed_sampler=False)` is needed: the parts are cut here.

    Raises:
        ValueError: a batch that cannot be shared evenly among the processes.
        DataError: from `prepare_data`, where the data cannot be had.
    """

    def __init__(
        self,
        task_config: Any,
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
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        data_config.check()
        self.task = get_task(task_config)
        self.data = data_config
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.seed, self.first_step, self.max_steps = seed, first_step, max_steps
        self._rank, self._world_size, self.accumulate = rank, world_size, accumulate
        self._progress = progress
        self._prepared = False
        self._check_shares(world_size)

    def _check_shares(self, world_size: int) -> None:
        shares = world_size * self.accumulate
        if self.batch_size < 1 or self.batch_size % shares:
            what = f"the {shares} processes" if shares == world_size else f"{shares}, processes times accumulate"
            raise ValueError(f"batch_size is {self.batch_size}: expected a multiple of {what}")

    def prepare_data(self) -> None:
        """Make the records, once; a second process waits for the first."""
        if not self._prepared:
            self.task.prepare(self.data, progress=self._progress)
            self._prepared = True

    def setup(self, stage: str | None = None) -> None:
        """Open the records in this process."""
        self.prepare_data()

    @property
    def rank(self) -> int:
        """This process among `world_size`."""
        return self.trainer.global_rank if self.trainer is not None else self._rank

    @property
    def world_size(self) -> int:
        """Number of processes that share a batch."""
        return self.trainer.world_size if self.trainer is not None else self._world_size

    def records(self, split: str) -> Records:
        """The records of `train`, `validation` or `test`."""
        self.prepare_data()
        return self.task.dataset(split)

    def majority_accuracy(self, split: str) -> float:
        """What always answering the most frequent class scores on a split."""
        return self.records(split).majority_accuracy()

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every training record comes once."""
        return len(self.records("train")) / self.batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches of steps `first_step` … `max_steps − 1`, in order, each in its parts."""
        self._check_shares(self.world_size)
        records = self.records("train")
        parts = self.accumulate
        steps = _Steps(records, self.batch_size, self.data.pool, self.seed, self.rank, self.world_size, parts)
        return self._loader(steps, range(self.first_step * parts, self.max_steps * parts))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation record once, sorted by length."""
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Every test record once, sorted by length."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Batch]:
        fixed = _Fixed(self.records(split), self.eval_batch_size, self.rank, self.world_size)
        return self._loader(fixed, range(len(fixed)))

    def _loader(self, dataset: Dataset[Batch], order: range) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_size=None,  # an item is a batch
            sampler=order,
            num_workers=self.data.workers,
            # array_record's threads do not survive a fork: a forked worker crashes once its parent has read a record
            multiprocessing_context="spawn" if self.data.workers else None,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )
