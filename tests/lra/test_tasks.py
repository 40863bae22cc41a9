"""Tasks by name, tasks of one's own, and what built-in ones keep: the folders in which records lie on users' disks."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from chela.core.errors import DataError
from chela.core.options import option
from lra.builder import prefetch
from lra.datamodule import LRADataModule
from lra.source import DataConfig
from lra.tasks import TASKS, get_task, task_class, task_options
from lra.tasks.base import IGNORED, InMemory, Task
from lra.tasks.image import Image
from lra.tasks.listops import ListOps
from lra.tasks.pathfinder import Pathfinder, PathX
from lra.tasks.stored import StoredTask


@dataclass
class Copying(Task):
    """Each position's target is the token before it."""

    length: int = option(6, "of a sequence", ge=2)
    records: int = 40

    objective = "tokens"
    num_classes = 5
    vocab_size = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.l_max = self.length

    def dataset(self, split: str) -> InMemory:
        rows = np.random.default_rng(len(split)).integers(1, 5, (self.records, self.length))
        targets = np.concatenate([np.full((self.records, 1), IGNORED), rows[:, :-1]], axis=1)
        lengths = [2 + i % (self.length - 1) for i in range(self.records)]
        return InMemory([(rows[i, :n], targets[i, :n]) for i, n in enumerate(lengths)])


class Plain:
    """No task at all."""


class Values(Task):
    """A task that is no dataclass, with a record that is broken.

    Args:
        broken: The record.
        share: A share.
    """

    title = "Of values"
    num_classes, l_max, input_dim = 2, 4, 3

    def __init__(self, broken: int | None = None, share: float = 0.5) -> None:
        self.broken = broken

    def dataset(self, split: str) -> InMemory:
        shapes = [(4, 3) if i != self.broken else (4, 2) for i in range(20)]
        return InMemory([(np.ones(shape, np.float32), i % 4 // 3) for i, shape in enumerate(shapes)])


COPYING, VALUES = f"{__name__}:Copying", f"{__name__}:Values"


def test_lists_stand_for_arrays() -> None:
    records = InMemory([([1, 2, 3], [0, IGNORED, 1]), (([1, 2], [3]), 1)])
    tokens, labels = records[0]
    assert isinstance(tokens, np.ndarray) and isinstance(labels, np.ndarray)
    assert isinstance(records[1][0][1], np.ndarray) and records.lengths().tolist() == [3, 2]


def test_the_tasks_and_their_titles() -> None:
    titles = "Corpus enwik8 Image ListOps Pathfinder Path-X Recall Retrieval Select Shakespeare Text text8 WikiText-103"
    assert [task_class(name).title for name in TASKS] == titles.split()
    assert [name for name in TASKS if task_class(name).generated] == ["listops", "pathfinder", "pathx"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("listop", r"expected one of .*, image, listops, .* \(did you mean 'listops'\?\)"),
        ("base", "expected one of"),
        ("no_such_module:Task", "expected a module no_such_module in this folder"),
        (f"{__name__}:Absent", "expected a subclass of Task"),
        (f"{__name__}:Plain", "expected a subclass of Task"),
    ],
)
def test_what_is_no_task_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        task_class(name)
    assert "\n" not in str(error.value)


def test_what_is_wrong_inside_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_python.py").write_text("class Mine(:")
    with pytest.raises(ValueError, match=r"no_python.py line 1: expected Python, got invalid syntax"):
        task_class("no_python:Mine")
    (tmp_path / "needs_more.py").write_text("import no_such_dependency")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        task_class("needs_more:Mine")


def test_options_of_a_dataclass_and_of_a_constructor() -> None:
    found = {field.name: (field.type, field.metadata["help"]) for field in fields(task_options(VALUES))}
    assert found == {
        "name": ("str", "what is built"),
        "broken": ("int | None", "The record."),
        "share": ("float", "A share."),
    }
    made = get_task(task_options(COPYING)(length=3))
    assert isinstance(made, Copying) and made.name == "copying" and made.l_max == 3 and get_task(made) is made
    with pytest.raises(ValueError, match=r"task\.length: expected at least 2, got 1"):
        get_task(task_options(COPYING)(length=1))
    kinds = {field.name: field.type for field in fields(task_options("pathx"))}
    assert (kinds["contour_lengths"], kinds["distractors"]) == ("list[int] | None", "int | None")


def test_a_task_of_ones_own_with_a_label_for_each_position() -> None:
    data = LRADataModule(task_options(COPYING)(), DataConfig(), batch_size=8, seed=0, max_steps=3)
    for batch in data.train_dataloader():
        assert batch["labels"].shape == batch["inputs"].shape and (batch["labels"][:, 0] == IGNORED).all()
        real = batch["inputs"][:, 1:] > 0
        assert torch.equal(batch["labels"][:, 1:][real], batch["inputs"][:, :-1][real])
    targets = np.concatenate([label for _, label in data.records("test").read(range(40))])
    counts = np.bincount(targets[targets >= 0])
    assert data.records("test").majority_accuracy() == counts.max() / counts.sum()


def test_a_record_that_the_network_cannot_take_is_named() -> None:
    data = LRADataModule(Values(broken=7), DataConfig(), batch_size=20, seed=0, max_steps=1)
    with pytest.raises(
        DataError, match=r"^values: record 7 of train: expected values of shape \(L, 3\), got \(4, 2\)$"
    ):
        data.train_dataloader()
    data = LRADataModule(Values(None), DataConfig(), batch_size=20, seed=0, max_steps=1)
    batch = next(iter(data.train_dataloader()))
    assert batch["inputs"].shape == (20, 4, 3) and batch["mask"] is None and batch["labels"].sum() == 5
    assert data.records("train").majority_accuracy() == 0.75
    data.task.dataset = lambda split: InMemory([])  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"^values: expected records from dataset\('test'\), got none$"):
        data.records("test")


@pytest.mark.parametrize(
    ("tokens", "targets", "message"),
    [
        ([1, 2, 3], [1, 2], r"expected a target for each token, got \(2,\) for 3 tokens"),
        ([1, 2, 3], [1, 5, IGNORED], "label is 5, expected 0 … 4"),
        ([1, 2, 3], [1, -1, 0], "label is -1"),
        ([], [], "the sequence is empty"),
        ([1, 5, 2], [1, 1, 1], r"token 5 at position 1 is not in the vocabulary \(ids 1 … 4\)"),
        ([1, 2, 0], [1, 1, 1], "token 0 at position 2"),
        ([1] * 7, [1] * 7, "the sequence has 7 tokens, expected at most 6"),
    ],
)
def test_what_the_network_cannot_take_is_told(tokens: list[int], targets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Copying().check(np.array(tokens, int), np.array(targets))
    Copying().check(np.array([1, 2, 3]), np.array([IGNORED, 1, 4]))


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        (ListOps(), "lra_listops/n96000-2000-2000_len501-1999_depth10_args10_seed0"),
        (Pathfinder(), "lra_pathfinder/r32_hard_n160000-20000-20000_seed0_d78490e221"),
        (PathX(distractors=17), "lra_pathfinder/r128_hard_n160000-20000-20000_seed0_f3a3d32047"),
        (Image(), "lra_image/rgb"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_records_that_users_have_stay_where_they_are(
    task: StoredTask, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{type(task).build.__module__}.prepare", lambda root, spec, *_: spec.folder(root))
    task.prepare(DataConfig(dir=str(tmp_path)))
    assert task.folder.relative_to(tmp_path).as_posix() == f"{folder}/1.0.0"


def test_ahead_keeps_the_order_and_drops_what_nobody_waits_for() -> None:
    begun: list[int] = []

    def call(i: int) -> int:
        begun.append(i)
        if i == 5:
            raise ValueError("five")
        return i

    calls = ((lambda i=i: call(i)) for i in range(1000))
    reader = prefetch(calls, workers=2)
    assert [next(reader) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(reader)
    assert len(begun) <= 11
