"""Loading: records read, encoded, bucketed and collated, against the rate at which the mini CHELA takes them.

Both are CPU seconds of one thread, which a busy machine changes little. Text and Image need their records: run
``python -m lra.prepare task=text`` first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from chela.config import resolve
from chela.core.errors import DataError
from chela.schema import Config
from experiments.bench import Row
from experiments.bench.train import training_step
from lra.batches import batch_indices, padding_share
from lra.datamodule import LRADataModule

RECORDS = 5_000


def run(quick: bool) -> list[Row]:
    """Measure listops, text and image at the mini preset; with ``quick`` listops at the tiny one."""
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            return [row(resolve(["task=listops", "preset=tiny", f"data.dir={folder}"]), records=500)]
    tasks = ("listops", "text", "image")
    return [row(resolve([f"task={task}", "preset=mini", "data.download=false"])) for task in tasks]


def row(config: Config, records: int = RECORDS) -> Row:
    """Measure one task: at least ``records`` records loaded, six steps of the model."""
    key = {"task": config.task.name, "preset": config.preset}
    size = config.trainer.batch_size
    steps = -(-records // size)
    data = LRADataModule(config.task, config.data, batch_size=size, seed=0, max_steps=steps + 1)
    try:
        data.prepare_data()
    except DataError as error:
        return Row(key, {}, f"not run: {error}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        load = steps * size / _seconds(iter(data.train_dataloader()), steps)
        step = training_step(config, data.task, "cpu", "32-true")
        taken = (step(batch["inputs"], batch["labels"], batch["mask"]) for batch in data.train_dataloader())
        take = 6 * size / _seconds(taken, 6)
    finally:
        torch.set_num_threads(threads)
    lengths = data.task.dataset("train").lengths()
    epoch = [batch_indices(lengths, size, config.data.pool, 0, t) for t in range(len(lengths) // size)]
    values = {"loaded [records/s]": load, "taken [records/s]": take, "loaded / taken": load / take}
    return Row(key, values | {"padding [%]": 100 * padding_share(lengths, epoch)})


def _seconds(work: Iterator[Any], number: int) -> float:
    """Return the CPU seconds of ``number`` items after a first one."""
    next(work)
    start = time.process_time()
    for _ in range(number):
        next(work)
    return time.process_time() - start
