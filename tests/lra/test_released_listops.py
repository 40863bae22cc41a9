import csv
from pathlib import Path

import pytest

from chela.core.errors import DataError
from lra.builder import check
from lra.source import DataConfig
from lra.tasks.listops import ListOps, evaluate
from tests.lra.conftest import text

TREES = [("( ( ( [MAX 2 ) 9 ) ] )", "9"), ("( ( ( [SM ( ( ( [MED 4 ) 7 ) ] ) ) 8 ) ] )", "3"), ("5", "5")]


def release(root: Path, train: list[tuple[str, ...]] = TREES, header: tuple[str, ...] = ("Source", "Target")) -> Path:
    folder = root / "lra_release" / "listops-1000"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        with open(folder / f"basic_{split}.tsv", "w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([header, *(train if split == "train" else TREES)])
    return root


def small() -> ListOps:
    return ListOps(train=3, validation=3, test=3, min_length=1, max_length=20)


def test_the_released_trees(tmp_path: Path) -> None:
    task = small()
    task.prepare(DataConfig(dir=str(tmp_path / "r"), root=str(release(tmp_path / "mine"))))
    records = task.dataset("train")
    assert [text(x) for x, _ in records.read(range(3))] == ["[MAX 2 9 ]", "[SM [MED 4 7 ] 8 ]", "5"]
    assert [evaluate(text(x)) for x, _ in records.read(range(3))] == records.labels().tolist() == [9, 3, 5]
    assert "the trees of the LRA release" in check(task.folder)["about"]["origin"]


def labels(root: Path, records: Path) -> list[int]:
    task = small()
    task.prepare(DataConfig(dir=str(records), root=str(root)))
    return task.dataset("train").labels().tolist()


def test_another_folder_is_another_set(tmp_path: Path) -> None:
    first, records = release(tmp_path / "first"), tmp_path / "records"
    second = release(tmp_path / "second", [("[MIN 2 9 ]", "2"), *TREES[1:]])
    assert labels(first, records) == [9, 3, 5]
    assert labels(second, records) == [2, 3, 5]
    assert labels(first / "lra_release", records) == [9, 3, 5]
    assert len(list((records / "lra_listops").iterdir())) == 2  # the same folder by another path is the same set


def test_a_folder_that_is_gone_is_said_whatever_was_made_from_it(tmp_path: Path) -> None:
    root, records = release(tmp_path / "mine"), tmp_path / "records"
    labels(root, records)
    with pytest.raises(DataError, match=r"data.root is .*nowhere, which does not exist: set it to one that does"):
        labels(tmp_path / "nowhere", records)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds none of: the trees of the LRA release"):
        labels(tmp_path / "empty", records)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TREES[0], ("[MAX 2 x ]", "2"), TREES[2]], r"basic_train.tsv line 3: 'x' is no token of ListOps"),
        ([("[MAX 2 9 ]", "2"), *TREES[1:]], r"line 2: the value '2' is not that of the expression"),
        ([TREES[0], ("[MAX 2 9 ]", "10"), TREES[2]], r"line 3: the value '10'"),
        ([TREES[0], ("[MAX 2 9 ]",), TREES[2]], r"line 3: expected an expression of 1 to 20 tokens"),
        ([TREES[0], ("", "1"), TREES[2]], r"line 3: expected an expression of 1 to 20 tokens .*, got 0"),
        ([TREES[0], ("[MAX" + " 1" * 30 + " ]", "1"), TREES[2]], r"1 to 20 tokens .*, got 32"),
        ([("[MAX 2 3", "3"), *TREES[1:]], r"line 2: .*: the file is damaged"),
        (TREES[:2], r"train has 2 records, expected 3"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[tuple[str, ...]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small().prepare(DataConfig(dir=str(tmp_path / "r"), root=str(release(tmp_path / "mine", rows))))
    assert not list((tmp_path / "r").rglob("*.array_record*"))


def test_a_foreign_file(tmp_path: Path) -> None:
    data = DataConfig(dir=str(tmp_path / "r"), root=str(release(tmp_path / "mine", header=("a", "b"))))
    with pytest.raises(DataError, match="does not start with the columns Source and Target"):
        small().prepare(data)
