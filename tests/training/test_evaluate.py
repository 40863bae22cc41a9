import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from chela.evaluate import main as evaluate
from chela.training import loop as fit
from chela.training.run import RunFolder
from tests.lra.test_released_listops import TREES, release
from tests.training.launches import TINY, launch, metrics_of, only_run


@pytest.fixture(scope="module", params=["32-true", "64-true"])
def done(request: pytest.FixtureRequest, data: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    runs = tmp_path_factory.mktemp("done")
    words = (*TINY, f"data.dir={data}", f"runs={runs}", "optimizer.lr=1e-2", f"trainer.precision={request.param}")
    assert launch(*words).status == 0
    return RunFolder(only_run(runs))


def score(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[float, int, float]:
    with tempfile.TemporaryDirectory() as folder:
        assert evaluate([*words, f"out={folder}/score.json"]) == 0
        found = json.loads(Path(folder, "score.json").read_text())
    out = capsys.readouterr().out
    assert f"accuracy {found['accuracy']:.2%} of {found['count']:,}, loss {found['loss']:.4f}" in out
    assert max(map(len, out.splitlines())) <= 80
    return found["accuracy"], found["count"], found["loss"]


def test_the_test_number_again_to_the_last_digit(done: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(done.result.read_text())
    assert score(capsys, f"run={done.path}") == (result["test"]["accuracy"], 40, result["test"]["loss"])


def test_the_validation_of_the_last_and_of_the_best_weights(
    done: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {int(row["step"]): row for row in metrics_of(done.path) if row["split"] == "validation"}
    best = max(rows, key=lambda step: (float(rows[step]["accuracy"]), -step))  # the first among equals
    assert json.loads(done.result.read_text())["best_step"] == best
    for which, step in (("last", 12), ("best", best)):
        accuracy, _, loss = score(capsys, f"run={done.path}", f"checkpoint={which}", "split=validation")
        assert (repr(accuracy), repr(loss)) == (rows[step]["accuracy"], rows[step]["loss"])


def test_a_test_set_left_unseen_can_be_scored_later(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*TINY, f"data.dir={data}", f"runs={tmp_path}")
    launched = launch(*words, "trainer.test=false")
    assert launched.status == 0
    assert "test set left unseen" in launched.out
    run = RunFolder(only_run(tmp_path))
    result = json.loads(run.result.read_text())
    assert result["test"] is result["majority_accuracy"] is None
    assert 0 <= score(capsys, f"run={run.path}")[0] <= 1
    assert "test set left unseen" in launch(*words, "resume=auto", "trainer.test=false").out  # reported, not repeated
    assert launch(*words, "resume=auto").status == 0  # only the test is left
    later = json.loads(run.result.read_text())
    assert (later["test"]["accuracy"], later["test"]["count"], later["test"]["loss"]) == score(
        capsys, f"run={run.path}"
    )
    untested = {"test", "test_by_depth", "majority_accuracy"}
    clocks = {"wall_seconds", "peak_memory_bytes"}
    assert {key: later[key] for key in later.keys() - untested - clocks} == {
        key: result[key] for key in result.keys() - untested - clocks
    }


def test_what_was_trained_on_a_gpu_is_scored_without_one(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with monkeypatch.context() as patched:  # the run says gpu, and is made without
        patched.setattr(fit, "hardware", lambda config: {"accelerator": "cpu", "precision": "32-true"})
        words = (*TINY, f"data.dir={data}", f"runs={tmp_path}", "trainer.accelerator=gpu")
        assert launch(*words).status == 0
    run = RunFolder(only_run(tmp_path))
    assert "accelerator: gpu" in run.config.read_text()
    assert score(capsys, f"run={run.path}")[0] == json.loads(run.result.read_text())["test"]["accuracy"]


def test_data_that_has_moved(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run says where its release was; a word says where it is. Generated trees are others."""
    mine = release(tmp_path / "mine", TREES * 16)
    words = (*TINY, "task.validation=3", "task.test=3", f"data.dir={data}", f"runs={tmp_path / 'runs'}")
    assert launch(*words, f"data.root={mine}").status == 0
    run = f"run={only_run(tmp_path / 'runs')}"
    before = score(capsys, run)
    mine.rename(tmp_path / "moved")
    assert evaluate([run]) == 2
    assert "mine, which does not exist: set it to one that does" in capsys.readouterr().err
    assert score(capsys, run, f"data.root={tmp_path / 'moved'}") == before
    assert evaluate([run, "data.root=null"]) == 2
    assert "got another (data.released True -> None)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=x", "checkpoint=first"], "checkpoint: expected one of best, last, got 'first'"),
        (["nonsense", "more"], "run: expected one value, got nonsense more"),
        (["run=x", "x=1"], "split=…, out=…, got 'x=1'"),
        (["split=test"], "run: expected the folder of a run, there is none under "),
        (["run=no/such"], "run: expected the folder of a run, got 'no/such': there is no such folder"),
    ],
)
def test_bad_words(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("done", ["32-true"], indirect=True)
def test_a_folder_that_cannot_be_written_is_no_matter_without_out(
    done: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert evaluate([str(done.path)]) == 0
    monkeypatch.undo()
    assert evaluate([str(done.path), f"out={tmp_path}"]) == 2
    assert "out: expected a file, got the folder" in capsys.readouterr().err


@pytest.mark.parametrize("done", ["32-true"], indirect=True)
@pytest.mark.parametrize("words", [[], ["last"], ["run=last"]])
def test_the_newest_run(
    words: list[str],
    done: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("older", "newest", "foreign"):
        shutil.copytree(done.path, tmp_path / "runs" / "listops-tiny" / name)
        os.utime(tmp_path / "runs" / "listops-tiny" / name / "config.yaml", ns=(0, len(name)))
    (tmp_path / "runs" / "listops-tiny" / "foreign" / "config.yaml").unlink()
    assert evaluate(words) == 0
    assert capsys.readouterr().err == "run runs/listops-tiny/newest\n"


@pytest.mark.parametrize("done", ["32-true"], indirect=True)
@pytest.mark.parametrize("out", ["file/score.json", "/proc/chela/score.json"])
def test_scores_that_cannot_be_written(
    out: str, done: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert evaluate([f"run={done.path}", f"out={tmp_path / out}"]) == 2
    assert "error: out: expected a folder that can be written, got " in capsys.readouterr().err


def test_longer_trees_than_any_learned_from_are_scored_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the end of the run, and again from the checkpoint; by depth, which adds up to the whole."""
    words = (*TINY, f"data.dir={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}", "task.room=60")
    launched = launch(*words)
    assert launched.status == 0 and "test_longer: accuracy" in launched.out
    run = RunFolder(only_run(tmp_path / "runs"))
    result = json.loads(run.result.read_text())
    longer = result["test_longer"]
    assert score(capsys, f"run={run.path}", "split=longer") == (longer["accuracy"], 2000, longer["loss"])
    assert evaluate([f"run={run.path}", f"out={tmp_path / 'score.json'}"]) == 0
    assert "by depth 2: " in capsys.readouterr().out
    assert json.loads((tmp_path / "score.json").read_text())["by_depth"] == result["test_by_depth"]
    for tested in (longer | {"by": longer["by_depth"]}, result["test"] | {"by": result["test_by_depth"]}):
        assert sum(part["count"] for part in tested["by"].values()) == tested["count"]
        right = sum(part["count"] * part["accuracy"] for part in tested["by"].values())
        assert right == pytest.approx(tested["accuracy"] * tested["count"])


@pytest.mark.parametrize("done", ["32-true"], indirect=True)
@pytest.mark.parametrize("split", ["longer", "train"])
def test_a_split_that_there_is_not_is_one_line(split: str, done: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([f"run={done.path}", f"split={split}"]) == 2
    assert capsys.readouterr().err == f"error: split: expected test or validation, got {split}\n"
