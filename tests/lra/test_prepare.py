from pathlib import Path

import pytest

from chela.prepare import main
from tests.training.launches import launch


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHELA_DATA", str(tmp_path / "data"))
    return tmp_path


def test_the_records_are_made_and_checked(here: Path) -> None:
    done = launch("task=listops", "preset=tiny", "check=true", main=main)
    assert (done.status, done.err) == (0, "")
    assert "train: 2,000 records" in done.out and "validation: 200 records" in done.out
    assert "(data.validation=holdout)" in done.out
    assert "every file has its SHA-256" in done.out
    assert [path.name for path in here.iterdir()] == ["data"]  # nothing in the working folder


def test_the_validation_set_is_that_of_the_policy(here: Path) -> None:
    words = ("task=recall", "preset=tiny", "task.validation=7 of 3 in 16", "data.validation=test")
    out = launch(*words, main=main).out
    assert "validation: 100 records" in out and "(data.validation=test)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=listops", "--check"], "expected key=value, got '--check', say check=…; see --help"),
        (["task=retrieval", "preset=tiny"], "retrieval: this data cannot be fetched for you"),
        (["task=image", "preset=tiny", "data.download=false"], "data.download is false: get https://www.cs.toronto"),
        (
            ["task=pathfinder", "preset=tiny", "task.contour_lengths=[14]"],
            "pathfinder: the two paths of image 0 found no room in 100,000 attempts: lower task.contour_lengths "
            "(14 dashes) or raise task.resolution (16)",
        ),
        (["task=text", "preset=tiny", "data.root=/nowhere"], "data.root is /nowhere, which does not exist"),
    ],
)
def test_mistakes_are_one_line(here: Path, words: list[str], message: str) -> None:
    ended = launch(*words, main=main)
    assert ended.status == 2 and message in ended.error and ended.out == ""


def test_help_names_its_own_flags(here: Path) -> None:
    done = launch("--help", main=main)
    assert done.status == 0 and "check=true" in done.out and "data.root" in done.out
