import io
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from chela.prepare import main
from lra.tasks.listops import evaluate


def run(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(list(words))
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHELA_DATA", str(tmp_path / "data"))
    return tmp_path


def test_listops_with_a_page(here: Path) -> None:
    status, out, err = run("task=listops", "preset=tiny", "show=3", "check=true")
    assert (status, err) == (0, "")
    assert "train: 2,000 records" in out and "validation: 200 records" in out and "(data.validation=holdout)" in out
    assert "every file has its SHA-256" in out
    page = (here / "data" / "listops.html").read_text()
    assert page.count("<h2>") == 3
    values = re.findall(r"label (\d)</h2>\n<p>.*?\n<pre>(.*?)</pre>", page)
    assert len(values) == 3 and all(int(label) == evaluate(tree) for label, tree in values)
    assert [path.name for path in here.iterdir()] == ["data"]  # nothing in the working folder


def test_the_validation_set_is_that_of_the_policy(here: Path) -> None:
    out = run("task=recall", "preset=tiny", "task.validation=7 of 3 in 16", "data.validation=test")[1]
    assert "validation: 100 records" in out and "(data.validation=test)" in out


def test_text_is_shown_as_it_is_cut(here: Path, real_text) -> None:  # type: ignore[no-untyped-def]
    where = (f"data.dir={real_text.dir}", f"data.root={real_text.root}")
    status, _, err = run("task=text", "preset=full", "task.max_length=200", *where, "show=6")
    assert (status, err) == (0, "")
    page = (Path(real_text.dir) / "text.html").read_text()
    assert page.count("<h2>") == 6 and "200 positions of at most 200" in page
    assert "positive" in page and "negative" in page


def test_image_is_shown_as_the_model_sees_it(here: Path, real_image) -> None:  # type: ignore[no-untyped-def]
    where = (f"data.dir={real_image.dir}", f"data.root={real_image.root}")
    assert run("task=image", "preset=mini", *where, "show=2")[0] == 0
    page = (Path(real_image.dir) / "image.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "256 positions" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=listops", "--show"], "expected key=value, got '--show', say show=…; see --help"),
        (["task=listops", "show=1001"], "show: expected at most 1,000, got 1001"),
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
    status, out, err = run(*words)
    assert status == 2 and message in err and err.count("\n") == 1
    assert out == ""


def test_help_names_its_own_flags(here: Path) -> None:
    status, out, _ = run("--help")
    assert status == 0 and "show=6" in out and "check=true" in out and "data.root" in out
