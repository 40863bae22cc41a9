"""Reading, encoding, bucketing and collating must be far faster than the model that eats the batches."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chela.config import resolve
from chela.models import build_model
from lra.datamodule import LRADataModule

RECORDS = 5_000


def seconds(work: Iterator[Any], batches: int) -> float:
    """Processor time, so that a busy machine does not count against either side."""
    start = time.process_time()
    for _ in range(batches):
        next(work)
    return time.process_time() - start


def train(model: torch.nn.Module, batches: Iterator[dict[str, Any]]) -> Iterator[None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for batch in batches:
        loss = torch.nn.functional.cross_entropy(model(batch["inputs"], batch["mask"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "image"])
def test_loading_is_twenty_times_faster_than_the_mini_model(task: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(f"real_{task}")
    config = resolve([f"task={task}", "preset=mini", f"data.dir={data.dir}", f"data.root={data.root}"])
    size = config.trainer.batch_size
    steps = -(-RECORDS // size)
    made = LRADataModule(config.task, config.data, batch_size=size, seed=0, max_steps=2 * steps)
    made.prepare_data()
    loading = iter(made.train_dataloader())
    next(loading)
    load = (steps - 1) * size / seconds(loading, steps - 1)
    eating = train(build_model(config.model, made.task, 0), iter(made.train_dataloader()))
    next(eating)
    eat = 6 * size / seconds(eating, 6)
    assert load >= 20 * eat, f"loads {load:,.0f} records/s, the model takes {eat:,.0f}"
