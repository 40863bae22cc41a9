"""Loading: records read, encoded, bucketed and collated, against the rate at which the mini CHELA takes them.

Processor time of one thread on both sides, so that a busy machine is unfair to neither. Text and Image need their
records: `python -m lra.prepare task=text` first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from chela.config import resolve
from chela.models import build_model
from chela.schema import Config
from experiments.bench.registry import Row
from lra.batches import batch_indices, padding_share
from lra.datamodule import LRADataModule
from lra.errors import DataError

RECORDS = 5_000


def run(quick: bool) -> list[Row]:
    """Measure listops, text and image at the mini preset; with ``quick`` listops at the tiny one."""
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            return [row(resolve(["task=listops", "preset=tiny", f"data.dir={folder}"]), records=500)]
    return [
        row(resolve([f"task={task}", "preset=mini", "data.download=false"])) for task in ("listops", "text", "image")
    ]


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
        model = build_model(config.model, data.task, 0)
        take = 6 * size / _seconds(_steps(model, iter(data.train_dataloader())), 6)
    finally:
        torch.set_num_threads(threads)
    lengths = data.records("train").lengths()
    epoch = [batch_indices(lengths, size, config.data.pool, 0, t) for t in range(len(lengths) // size)]
    values = {
        "loaded [records/s]": load,
        "taken [records/s]": take,
        "loaded / taken": load / take,
        "padding [%]": 100 * padding_share(lengths, epoch),
    }
    return Row(key, values)


def _seconds(work: Iterator[Any], number: int) -> float:
    """Processor time of ``number`` items after a first one."""
    next(work)
    start = time.process_time()
    for _ in range(number):
        next(work)
    return time.process_time() - start


def _steps(model: torch.nn.Module, batches: Iterator[dict[str, Any]]) -> Iterator[None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for batch in batches:
        loss = F.cross_entropy(model(batch["inputs"], batch["mask"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield
