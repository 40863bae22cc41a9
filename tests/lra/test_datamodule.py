from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from chela.core.errors import DataError
from lra.batches import collate
from lra.datamodule import LRADataModule
from lra.source import DataConfig
from lra.tasks.listops import ListOps, evaluate
from tests.lra.conftest import text


def module(task: ListOps, data: DataConfig, **options: Any) -> LRADataModule:
    return LRADataModule(task, data, **{"batch_size": 16, "seed": 0, "max_steps": 40, **options})


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a["step"] != b["step"] or (a["mask"] is None) != (b["mask"] is None):
        return False
    return all(torch.equal(a[k], b[k]) for k in ("inputs", "mask", "labels") if a[k] is not None)


def test_a_batch(small_listops: ListOps, data_folder: DataConfig) -> None:
    batches = list(module(small_listops, data_folder).train_dataloader())
    assert [b["step"] for b in batches] == list(range(40))
    for batch in batches:
        inputs, mask, labels = batch["inputs"], batch["mask"], batch["labels"]
        mask = torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask
        assert inputs.shape == mask.shape and inputs.dtype == torch.int64 and mask.dtype == torch.bool
        assert labels.shape == (16,) and labels.dtype == torch.int64
        assert mask.any(0).all()  # no column is all padding
        assert torch.equal(inputs > 0, mask)
        for row, real, label in zip(inputs, mask, labels, strict=True):
            assert evaluate(text(row[real].numpy())) == label


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_where_it_stopped(small_listops: ListOps, data_folder: DataConfig, workers: int) -> None:
    straight = list(module(small_listops, data_folder).train_dataloader())
    data = DataConfig(dir=data_folder.dir, workers=workers)
    resumed = list(module(small_listops, data, first_step=23).train_dataloader())
    assert len(resumed) == 17
    assert all(same(a, b) for a, b in zip(straight[23:], resumed, strict=True))


def test_a_source_of_another_task_is_refused(small_listops: ListOps, data_folder: DataConfig) -> None:
    with pytest.raises(DataError, match=r"data.source is 'imdb': expected auto for task=listops"):
        small_listops.prepare(DataConfig(dir=data_folder.dir, source="imdb"))


def test_processes_share_the_global_batch(small_listops: ListOps, data_folder: DataConfig) -> None:
    whole = list(module(small_listops, data_folder).train_dataloader())
    parts = [list(module(small_listops, data_folder, rank=r, world_size=4).train_dataloader()) for r in range(4)]
    for t, batch in enumerate(whole):
        for r in range(4):
            assert torch.equal(parts[r][t]["inputs"], batch["inputs"][r::4])
            assert torch.equal(parts[r][t]["labels"], batch["labels"][r::4])
    with pytest.raises(ValueError, match="batch_size is 16: expected a multiple of the 3 processes"):
        module(small_listops, data_folder, world_size=3)


def test_parts_are_the_shares_of_more_processes(small_listops: ListOps, data_folder: DataConfig) -> None:
    four = [list(module(small_listops, data_folder, rank=r, world_size=4).train_dataloader()) for r in range(4)]
    for rank in range(2):
        made = module(small_listops, data_folder, rank=rank, world_size=2, accumulate=2, first_step=3)
        parts = list(made.train_dataloader())
        assert [(batch["step"], batch["part"]) for batch in parts[:3]] == [(3, 0), (3, 1), (4, 0)]
        assert len(parts) == 2 * 37
        for batch in parts:
            assert same(batch, four[rank + 2 * batch["part"]][batch["step"]])
    with pytest.raises(ValueError, match="batch_size is 16: expected a multiple of 6, processes times accumulate"):
        module(small_listops, data_folder, world_size=2, accumulate=3)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_record_once(small_listops: ListOps, data_folder: DataConfig, world_size: int) -> None:
    labels: list[int] = []
    for rank in range(world_size):
        made = module(small_listops, data_folder, batch_size=15, rank=rank, world_size=world_size, eval_batch_size=12)
        for batch in made.test_dataloader():
            assert 0 < len(batch["labels"]) <= 12
            labels += batch["labels"].tolist()
    assert sorted(labels) == sorted(made.records("test").labels().tolist())
    assert len(labels) == 50


def test_validation_policy_and_majority(small_listops: ListOps, data_folder: DataConfig) -> None:
    assert len(module(small_listops, data_folder).records("validation")) == 40
    habit = module(small_listops, DataConfig(dir=data_folder.dir, validation="test"))
    labels = habit.records("test").labels()
    assert len(labels) == 50 and np.array_equal(habit.records("validation").labels(), labels)
    assert habit.records("test").majority_accuracy() == max(np.mean(labels == c) for c in range(10))


def test_records(small_listops: ListOps, data_folder: DataConfig) -> None:
    task = replace(small_listops)
    with pytest.raises(DataError, match=r"call prepare\(\)"):
        task.dataset("train")
    task.prepare(data_folder)
    records = task.dataset("train")
    assert len(records) == 300
    assert [len(records[i][0]) for i in range(300)] == records.lengths().tolist()
    assert [records[i][1] for i in range(300)] == records.labels().tolist()
    assert np.array_equal(records[-1][0], records[299][0])
    with pytest.raises(IndexError):
        records[300]
    with pytest.raises(ValueError, match="expected one of train, validation, test"):
        task.dataset("eval")


def test_pairs_are_stacked_first_documents_then_second() -> None:
    a, b, c, d = (np.full(n, n, np.uint8) for n in (2, 3, 1, 4))
    batch = collate([((a, b), 1), ((c, d), 0)], length=4, step=5)
    assert batch["inputs"].tolist() == [[2, 2, 0, 0], [1, 0, 0, 0], [3, 3, 3, 0], [4, 4, 4, 4]]
    assert batch["mask"].sum(1).tolist() == [2, 1, 3, 4]
    assert batch["labels"].tolist() == [1, 0] and batch["step"] == 5
    assert collate([((a, a), 1)], length=2, step=0)["mask"] is None
    assert collate([((a, c), 1)], length=2, step=0)["mask"].tolist() == [[True, True], [True, False]]


def test_values_stay_values() -> None:
    batch = collate([(np.ones((2, 3), np.float32), 1)], length=2, step=0)
    assert batch["inputs"].shape == (1, 2, 3) and batch["inputs"].dtype == torch.float32
    assert batch["mask"] is None


def test_a_label_for_each_position_is_padded_with_what_is_ignored() -> None:
    records = [(np.array([3, 4, 5]), np.array([-100, 1, 0])), (np.array([6]), np.array([2]))]
    batch = collate(records, length=4, step=0)
    assert batch["labels"].tolist() == [[-100, 1, 0, -100], [2, -100, -100, -100]]
    assert batch["labels"].dtype == torch.int64 and batch["mask"].sum(1).tolist() == [3, 1]
