from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from chela.core.errors import UsageError
from experiments.runs import CURVES, RUNS, add_rates, main, read_run, read_runs
from experiments.summary import result_tables, row_names
from experiments.table import cell_text
from tests.experiments.conftest import MakeRun, strange


def test_a_run_is_read(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(seed=3, accuracy=0.4)
    (run,) = read_runs([tmp_path])
    assert (run.path, run.state, run.task, run.model, run.preset) == (folder, "finished", "listops", "chela", "tiny")
    assert (run.seed, run.policy, run.value) == (3, "holdout", 40)
    assert list(run.metrics("train")["step"]) == list(range(1, 21))
    assert list(run.metrics("validation")["accuracy"]) == pytest.approx([0.25, 0.35])


def test_a_task_and_a_system_of_ones_own_are_read(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = read_run(make_run(accuracy=0.4)), read_run(strange(make_run(seed=1), loss=0.5))
    assert (first.title, first.score["name"], first.value) == ("ListOps", "accuracy", 40)
    assert first.result["best_validation"] == {"accuracy": 0.4} and first.result["test"]["accuracy"] == 0.4
    assert (second.title, second.score["name"], second.value) == ("Recall", "loss", 0.5)
    assert (second.task, second.model, second.state) == ("Recall", "mine", "finished")
    assert main(["collect", str(tmp_path / "runs"), f"into={tmp_path / 'kept'}"]) == 0
    _, kept = read_runs([tmp_path / "kept"])
    assert kept.path == tmp_path / "kept" / "Recall-tiny" / f"mine-seed1-{second.fingerprint}"


@pytest.mark.parametrize("words", [["x"], ["collect", "x"], ["collect", "into=y"], ["status", "x", "into=y"], ["a=b"]])
def test_mistakes_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "expected" in error and error.count("\n") == 1


def test_runs_of_one_configuration_are_counted_once_and_the_finished_one_wins(
    make_run: MakeRun, tmp_path: Path
) -> None:
    finished = make_run(accuracy=0.4)
    make_run(accuracy=None, root=tmp_path / "another")
    assert [run.path for run in read_runs([tmp_path])] == [finished]
    assert [run.path for run in read_runs([finished, finished.parent])] == [finished]


def test_a_failure_that_was_written_down_counts_until_the_run_is_finished(make_run: MakeRun, tmp_path: Path) -> None:
    failed = make_run(accuracy=None)
    mark = read_run(failed).fingerprint
    (failed / "failed.json").write_text(json.dumps({"fingerprint": mark, "status": 3, "error": "not finite"}))
    make_run(accuracy=None, root=tmp_path / "begun")
    (run,) = read_runs([tmp_path])
    assert run.state == "failed" and run.record["failed"]["error"] == "not finite"
    make_run(accuracy=0.2, root=tmp_path / "again")
    assert [run.state for run in read_runs([tmp_path])] == ["finished"]


def test_what_another_logger_keeps_in_a_run_is_no_run(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    (folder / "wandb" / "run-1" / "files").mkdir(parents=True)
    (folder / "wandb" / "run-1" / "files" / "config.yaml").write_text("_wandb: {value: 1}\n")
    assert [run.path for run in read_runs([tmp_path])] == [run.path for run in read_runs([folder])] == [folder]


def test_tuning_runs_are_no_results_unless_asked_for(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(root=tmp_path / "s")
    make_run("trainer.max_steps=5", root=tmp_path / "s" / "tune")
    assert len(read_runs([tmp_path / "s"])) == 1
    assert len(read_runs([tmp_path / "s" / "tune"])) == 1


def test_a_run_that_left_the_test_set_unseen_is_in_no_table(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("trainer.test=false", test=None, majority_accuracy=None)
    make_run("model=softmax", accuracy=0.4)
    (untested, finished) = read_runs([tmp_path])
    assert (untested.state, finished.state) == ("untested", "finished")
    assert untested.result["best_validation"]["accuracy"] == 0.5
    assert main(["collect", str(tmp_path / "runs"), f"into={tmp_path / 'kept'}"]) == 0
    assert "collected 1 runs" in capsys.readouterr().out
    (table,) = result_tables([untested, finished])
    assert cell_text(table, "listops", "chela") == "– (1 untested)"
    assert np.isnan(table.cells["mean"]["chela", "listops"]) and table.majority("listops") == 17


@pytest.mark.parametrize(
    "named",
    [
        [  # the full system by its name alone
            ("", "chela"),
            ("", "chela"),
            ("model.mixer.conv=none", "chela [model.mixer.conv=none]"),
            ("model.mixer.gate=none", "chela [model.mixer.gate=none]"),
            ("model=softmax optimizer.lr=0.01", "softmax"),
        ],
        [  # two ways, of which none is the usual one
            ("optimizer.lr=0.001", "chela [optimizer.lr=0.001]"),
            ("optimizer.lr=0.01", "chela [optimizer.lr=0.01]"),
        ],
        [  # a name means the same on every task
            ("", "chela"),
            ("model.mixer.gate=none", "chela [model.mixer.gate=none]"),
            ("task=image model.mixer.gate=none", "chela [model.mixer.gate=none]"),
        ],
        [("model=softmax", "softmax"), ("model=softmax model.d_ff=96", "softmax [model.d_ff=96]")],
        [  # a chosen rate belongs to the way it was chosen for
            ("optimizer.lr=0.001 trainer.threads=1", "chela"),
            ("task=image optimizer.lr=0.002 trainer.threads=1", "chela"),
            ("optimizer.lr=0.005 trainer.threads=2 model.causal=true", "chela [model.causal=true]"),
            ("task=image optimizer.lr=0.005 trainer.threads=2 model.causal=true", "chela [model.causal=true]"),
        ],
        [("data.dir=/one runs=a trainer.max_time=1m", "chela"), ("data.dir=/two runs=b", "chela")],
    ],
)
def test_a_row_is_named_by_what_sets_it_apart(make_run: MakeRun, tmp_path: Path, named: list[tuple[str, str]]) -> None:
    names = {make_run(*words.split(), seed=seed): name for seed, (words, name) in enumerate(named)}
    assert row_names(read_runs([tmp_path])) == names


@pytest.mark.parametrize(("task", "apart"), [("listops", True), ("pathfinder", True), ("image", False)])
def test_a_release_is_other_data_than_what_is_generated(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, apart: bool
) -> None:
    generated, released = make_run(f"task={task}"), make_run(f"task={task}", "data.root=/mine", seed=1)
    runs = {run.path: run for run in read_runs([tmp_path])}
    assert (runs[generated].cell != runs[released].cell) is apart
    names = row_names(list(runs.values()))
    assert names[generated] == "chela" and names[released] == ("chela [data.released=true]" if apart else "chela")
    assert main(["collect", str(tmp_path / "runs"), f"into={tmp_path / 'kept'}"]) == 0
    assert {run.cell for run in read_runs([tmp_path / "kept"])} == {run.cell for run in runs.values()}
    assert "/mine" not in (tmp_path / "kept" / "runs.jsonl").read_text()


def test_texts_of_ones_own_stay_apart_where_they_are_collected(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("novel.txt", "letters.txt"):
        make_run("task=corpus", f"data.root=/mine/{name}")
    cells = {run.cell for run in read_runs([tmp_path])}
    assert main(["collect", str(tmp_path / "runs"), f"into={tmp_path / 'kept'}"]) == 0
    assert len(cells) == 2 and {run.cell for run in read_runs([tmp_path / "kept"])} == cells
    assert "/mine" not in (tmp_path / "kept" / "runs.jsonl").read_text()


def test_collect_keeps_results_and_leaves_checkpoints_and_local_folders(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("data.dir=/secret/place", f"runs={tmp_path}/runs", accuracy=0.4)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.ckpt").write_text("large")
    (folder / "probe.json").write_text('{"adds": 2.5}')
    make_run(seed=1, accuracy=None)
    add_rates(tmp_path / "runs", {"listops-tiny-chela": {"chosen": 0.002}})
    assert main(["collect", str(tmp_path / "runs"), f"into={tmp_path / 'kept'}"]) == 0
    assert "collected 1 runs" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "kept").rglob("*") if path.is_file())
    assert files == ["curves.csv", "rates.yaml", "runs.jsonl"]
    (kept,), (before,) = read_runs([tmp_path / "kept"]), read_runs([folder])
    assert (kept.config, kept.result, kept.fingerprint) == (before.config, before.result, before.fingerprint)
    assert (kept.path, kept.record["probe"]) == (
        tmp_path / "kept" / folder.relative_to(tmp_path / "runs"),
        {"adds": 2.5},
    )
    assert kept.metrics("validation").equals(before.metrics("validation"))
    text = (tmp_path / "kept" / "runs.jsonl").read_text()
    assert "/secret" not in text and str(tmp_path) not in text


def test_what_is_collected_later_joins_what_is_there(make_run: MakeRun, tmp_path: Path) -> None:
    """Other columns leave the first ones where they are, and a run that comes again replaces its line."""
    kept, first, second = tmp_path / "kept", make_run(accuracy=0.4), strange(make_run(seed=1), loss=0.5)
    for folder in (first, second, first):
        assert main(["collect", str(folder), f"into={kept}"]) == 0
    assert len((kept / "runs.jsonl").read_text().splitlines()) == 2
    for run, folder in zip(read_runs([kept]), (first, second), strict=True):
        before = read_run(folder)
        assert (run.task, run.value, run.record["result"]) == (before.task, before.value, before.record["result"])
        pd.testing.assert_frame_equal(run.metrics("train"), before.metrics("train"), check_like=True)
    assert main(["collect", str(kept), f"into={tmp_path / 'copy'}"]) == 0
    assert all((tmp_path / "copy" / name).read_text() == (kept / name).read_text() for name in (RUNS, CURVES))


def test_torn_metrics_are_read_up_to_the_tear(make_run: MakeRun) -> None:
    folder = make_run()
    with open(folder / "metrics.csv", "a") as file:
        file.write("21,tra")
    assert read_run(folder).metrics("train")["step"].iloc[-1] == 20


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), "config.yaml"),
        (lambda folder: (folder / "config.yaml").write_text("a: 1"), "it lacks"),
        (lambda folder: (folder / "result.json").write_text("{"), "result.json, could not read it"),
        (lambda folder: (folder / "config.yaml").unlink(), "holds none"),
    ],
)
def test_a_broken_folder_is_one_line(make_run: MakeRun, break_it: object, message: str) -> None:
    folder = make_run()
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        read_runs([folder])


@pytest.mark.parametrize(
    ("text", "message"), [('{"run": "a/b"', "runs.jsonl, could not read it"), ('{"run": "a/b"}', "it lacks")]
)
def test_collected_results_that_cannot_be_read_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "runs.jsonl").write_text(text + "\n")
    with pytest.raises(UsageError, match=message):
        read_runs([tmp_path])
