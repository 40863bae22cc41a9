from pathlib import Path

import numpy as np
import pytest

from chela.core.errors import DataError
from lra.source import DataConfig
from lra.tasks import retrieval
from lra.tasks.retrieval import Retrieval

ROWS = ["1.0\tA1\tB1\tthe \"first paper\tand 'its citation\n", "0\tA2\tB2\tünlike\tthings\r\n", "1\tA3\tB3\ta\tb\n"]


@pytest.fixture
def aan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release with three pairs in every split, in the folders of the archive."""
    monkeypatch.setattr(retrieval, "COUNTS", {"train": 3, "validation": 3, "test": 3})
    folder = tmp_path / "mine" / "lra_release" / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for split in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{split}.tsv").write_text("".join(ROWS), newline="")
    return folder


def prepared(root: Path, tmp_path: Path, **options: int) -> Retrieval:
    task = Retrieval(**options)  # type: ignore[arg-type]
    task.prepare(DataConfig(dir=str(tmp_path / "records"), root=str(root)))
    return task


def test_the_release_is_read_without_quoting(aan: Path, tmp_path: Path) -> None:
    task = prepared(tmp_path / "mine", tmp_path)
    records = task.dataset("validation")
    (first, second), label = records[0]
    assert (first - 1).astype(np.uint8).tobytes() == b'the "first paper'
    assert (second - 1).astype(np.uint8).tobytes() == b"and 'its citation"
    assert label == 1 and records.labels().tolist() == [1, 0, 1]
    assert records.lengths().tolist() == [17, 7, 1]
    assert (records[1][0][1] - 1).astype(np.uint8).tobytes() == b"things"
    assert task.note == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\tA\tB\tfour\n", "new_aan_pairs.eval.tsv line 2: expected a label 0 or 1 .*, got '1' and 3 fields"),
        ("2\tA\tB\tx\ty\n", "line 2: expected a label 0 or 1 .*, got '2'"),
        ("x\tA\tB\tx\ty\n", "line 2: .*, got 'x'"),
        ("1\tA\tB\t\ty\n", "line 2: .*, 1 of them empty"),
    ],
)
def test_a_row_that_does_not_parse_is_named(aan: Path, tmp_path: Path, line: str, message: str) -> None:
    (aan / "new_aan_pairs.eval.tsv").write_text(ROWS[0] + line + ROWS[2])
    with pytest.raises(DataError, match=message):
        prepared(aan, tmp_path)
    assert not list((tmp_path / "records").rglob("*.array_record*"))


def test_missing_files_and_pairs(aan: Path, tmp_path: Path) -> None:
    (aan / "new_aan_pairs.test.tsv").write_text(ROWS[0])
    with pytest.raises(DataError, match="test has 1 records, expected 3"):
        prepared(aan, tmp_path)
    (aan / "new_aan_pairs.test.tsv").unlink()
    with pytest.raises(DataError, match=r"new_aan_pairs.test.tsv: No such file"):
        prepared(aan, tmp_path)


def test_another_folder_is_another_set(aan: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in aan.iterdir():
        (other / file.name).write_text("".join(reversed(ROWS)), newline="")
    assert prepared(tmp_path / "mine", tmp_path).dataset("train").lengths().tolist() == [17, 7, 1]
    assert prepared(other, tmp_path).dataset("train").lengths().tolist() == [1, 7, 17]


def test_pairs_among_the_downloads_keep_their_folder(aan: Path, tmp_path: Path) -> None:
    (tmp_path / "downloads").symlink_to(aan)
    task = Retrieval()
    for _ in range(2):
        task.prepare(DataConfig(dir=str(tmp_path)))
        assert task.folder == tmp_path / "lra_retrieval" / "aan" / "1.0.0"
        (tmp_path / "downloads").unlink(missing_ok=True)  # once made they are not asked for again


def test_absent_data_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        Retrieval().prepare(DataConfig(dir=str(tmp_path)))
    for part in ("new_aan_pairs.train.tsv", str(tmp_path / "downloads"), "data.root=FOLDER"):
        assert part in str(error.value)


def test_only_the_first_bytes_are_kept(aan: Path, tmp_path: Path) -> None:
    rows = [f"1\tA\tB\t{'é' * 9000}\tb\n", *ROWS[1:]]
    for split in ("train", "eval", "test"):
        (aan / f"new_aan_pairs.{split}.tsv").write_text("".join(rows))
    task = prepared(aan, tmp_path)
    assert task.records("train").sizes["first"].max() == retrieval.READ_BYTES == 10_000
    assert task.dataset("train").lengths().max() == 4000
