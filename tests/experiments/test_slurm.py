from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from experiments.runs import read_runs
from experiments.sweep import main
from experiments.table import main as table
from tests.experiments import slurm_cluster
from tests.experiments.conftest import FAKE

pytestmark = pytest.mark.slurm
pytest.importorskip("submitit", reason="launcher=slurm needs submitit (extra slurm)")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    absent = slurm_cluster.missing()
    if absent:
        pytest.skip(f"expected Slurm and munge (Debian: slurm-wlm, munge), not installed: {', '.join(absent)}")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm"), cpus=4):
        yield


def write(tmp_path: Path, content: dict[str, object]) -> list[str]:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"preset": "tiny", "tasks": ["listops"], "seeds": [0], **content}))
    return [str(tmp_path / "s.yaml"), f"runs={tmp_path / 'sweep'}", "launcher=slurm"]


def test_an_array_whose_run_meets_its_time_limit_is_complete_in_the_end(
    slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs as an array; CHELA's is longer than the limit: it is asked to save, requeued, and goes on."""
    monkeypatch.setenv("CHELA_DATA", str(tmp_path / "data"))
    long = {"trainer.max_steps": 360, "trainer.val_every": 120, "trainer.checkpoint_every": 50}  # with pauses, 100 s
    words = write(
        tmp_path,
        {
            "models": ["chela", "softmax", "linear", "lightning"],
            "per_model": {"chela": {"overrides": long}},
            "slurm": {"time": 2, "signal_delay_s": 30},
        },
    )
    assert main(words, command=(sys.executable, "-m", "tests.experiments.slow_train")) == 0
    out = capsys.readouterr().out
    runs = {run.model: run for run in read_runs([tmp_path / "sweep"])}
    assert {run.state for run in runs.values()} == {"finished"} and len(runs) == 4
    log = next(path for path in (tmp_path / "sweep" / "logs").iterdir() if "-chela-" in path.name).read_text()
    assert "going on with" in log, f"expected a run that was requeued, got one launch of it:\n{log}\n{out}"
    arrays = {path.name.split("_")[0] for path in (tmp_path / "sweep" / "slurm").glob("*_[0-3]_*.out")}
    assert len(arrays) == 1
    assert table([str(tmp_path / "sweep"), "published=false"]) == 0
    shown = capsys.readouterr().out
    assert all(any(line.startswith(f"| {name} |") and "(1" in line for line in shown.splitlines()) for name in runs)


def test_a_failure_in_the_queue_is_told(slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = write(
        tmp_path, {"models": ["chela", "softmax"], "per_model": {"softmax": {"overrides": {"model.d_ff": 13}}}}
    )
    assert main(words, command=FAKE) == 1
    assert "FAILED, the others go on: RuntimeError: it went wrong" in capsys.readouterr().out
    assert sorted(run.state for run in read_runs([tmp_path / "sweep"])) == ["failed", "finished"]


def test_a_launcher_that_was_killed_is_started_again_and_doubles_no_run(slurm: None, tmp_path: Path) -> None:
    """The later job of a run does nothing while the first one goes on."""
    words = write(tmp_path, {"models": ["chela", "softmax"], "overrides": {"trainer.max_steps": 40}})
    code = "import sys; from experiments.sweep import main; sys.exit(main(sys.argv[2:], command=sys.argv[1].split()))"
    env = {**os.environ, "FAKE_STEP_SECONDS": "0.3"}
    launch = [sys.executable, "-c", code, " ".join(FAKE), *words]
    first = subprocess.Popen(launch, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "sweep").rglob("checkpoint.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    first.kill()
    first.wait()
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "sweep").rglob("result.json"))) < 2 and time.monotonic() < deadline:
        assert subprocess.run(launch, env=env, stdout=subprocess.DEVNULL).returncode == 0
    steps = [path.read_text().count(",train,") for path in (tmp_path / "sweep").rglob("metrics.csv")]
    assert steps == [40, 40], "expected nobody's step to have been taken twice"
    assert [run.state for run in read_runs([tmp_path / "sweep"])] == ["finished", "finished"]


def test_words_that_slurm_does_not_know_are_one_line(
    slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(write(tmp_path, {"models": ["chela"], "slurm": {"partitoin": "gpu"}}), command=FAKE) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: slurm: ") and error.count("\n") == 1
