from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from experiments.runs import add_rates, read_file, read_runs
from experiments.runs import main as collect
from experiments.sweep import main
from tests.experiments.conftest import FAKE, SMALL, sweep
from tests.experiments.fake_train import CRASHES, DIES

RATES = (0.001, 0.002, 0.01)
TUNED = {**SMALL, "tune": {"rates": [*RATES, 0.9], "steps": 0.5}}  # 0.9 diverges


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tuned sweep, and the file beside it."""
    top = tmp_path_factory.mktemp("tuned")
    assert sweep(top, TUNED) == 0
    return top / "sweep"


@pytest.fixture
def tuned(done: Path, folder: Path) -> Path:
    """A copy of it, in the folder of ``sweep``."""
    return Path(shutil.copytree(done, folder))


def accuracies(folder: Path) -> dict[tuple[str, int], float]:
    return {(run.model, run.seed): run.value for run in read_runs([folder])}


def test_every_run_of_the_grid_is_made_once(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, SMALL) == 0
    assert sorted(accuracies(folder)) == [("chela", 0), ("chela", 1), ("softmax", 0), ("softmax", 1)]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    capsys.readouterr()
    assert sweep(tmp_path, SMALL) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} == before
    assert "4 of 4 runs finished" in capsys.readouterr().out


def test_what_was_left_untested_is_tested_once_it_may_be(tmp_path: Path, folder: Path) -> None:
    one = {**SMALL, "models": ["chela"], "seeds": [0]}
    assert sweep(tmp_path, one, "trainer.test=false") == 0
    assert [run.state for run in read_runs([folder])] == ["untested"]
    assert sweep(tmp_path, one) == 0
    assert [run.state for run in read_runs([folder])] == ["finished"]


def test_a_failure_is_told_and_recorded_and_stops_nobody(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {**SMALL, "per_model": {"softmax": {"seeds": [0], "overrides": {"model.d_ff": CRASHES}}}}
    assert sweep(tmp_path, broken) == 1
    *lines, summary, failed, go_on, table = capsys.readouterr().out.splitlines()
    said = "RuntimeError: it went wrong"
    assert any(line.endswith(f"FAILED, the others go on: {said}") for line in lines)
    assert summary == "2 of 3 runs finished, 1 failed" and said in failed
    assert go_on == "to go on: start the same command again" and table.endswith(f"chela table {folder}")
    runs = {(run.model, run.seed): run for run in read_runs([folder])}
    assert runs["softmax", 0].state == "failed" and runs["softmax", 0].record["failed"]["error"] == said
    assert [runs["chela", seed].state for seed in (0, 1)] == ["finished", "finished"]


def test_a_run_that_is_killed_is_a_failure(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dies = {**SMALL, "models": ["chela"], "seeds": [0], "overrides": {"model.d_ff": DIES}}
    assert sweep(tmp_path, dies) == 1
    assert "FAILED, the others go on: killed by signal 9" in capsys.readouterr().out


def test_a_failure_is_forgotten_once_the_run_is_finished(tmp_path: Path, folder: Path) -> None:
    one = {**SMALL, "models": ["chela"], "seeds": [0]}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(one))
    failing = (sys.executable, "-c", "raise SystemExit('no space left')")
    assert main([str(path), f"runs={folder}"], command=failing) == 1
    assert [run.state for run in read_runs([folder])] == ["failed"]
    assert sweep(tmp_path, one) == 0
    assert [run.state for run in read_runs([folder])] == ["finished"]


def test_slices_go_on_where_they_stopped(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {**SMALL, "models": ["chela"], "seeds": [0], "overrides": {"trainer.max_steps": 3}}
    assert sweep(tmp_path, one, "trainer.max_time=1s") == 0
    assert ": stopped" in capsys.readouterr().out
    assert sweep(tmp_path, one, "trainer.max_time=1s") == 0
    assert ": goes on" in capsys.readouterr().out
    assert sweep(tmp_path, one) == 0  # without a limit it is the same run
    assert [run.state for run in read_runs([folder])] == ["finished"]


def test_the_rate_is_chosen_on_validation_and_written_down(done: Path) -> None:
    for model in ("chela", "softmax"):
        record = read_file(done / "rates.yaml")[f"listops-tiny-{model}"]
        scores = {row["rate"]: row.get("validation_accuracy") for row in record["grid"]}
        assert scores.pop(0.9) is None and record["grid"][-1]["diverged"]
        assert record["chosen"] == max(scores, key=scores.__getitem__) and record["steps"] == 6
        chosen = [run for run in read_runs([done]) if run.model == model]
        assert [run.seed for run in chosen] == [0, 1]
        assert {run.config["optimizer.lr"] for run in chosen} == {record["chosen"]}
        assert {run.config["trainer.max_steps"] for run in chosen} == {12}
    assert {run.state for run in read_runs([done])} == {"finished"}
    assert {run.state for run in read_runs([done / "tune"])} == {"untested", "unfinished"}  # 0.9 diverged


def test_what_was_collected_is_finished_with_its_rates(
    tmp_path: Path, done: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect(["collect", str(done), f"into={folder}"]) == 0
    assert sweep(tmp_path, TUNED) == 0
    assert "4 of 4 runs finished" in capsys.readouterr().out
    assert accuracies(folder) == accuracies(done) and not (folder / "tune").exists()


def test_a_recorded_rate_stays_until_the_grid_changes(tmp_path: Path, tuned: Path) -> None:
    records = read_file(tuned / "rates.yaml")
    record = records["listops-tiny-chela"]
    record["chosen"] = other = next(rate for rate in RATES if rate != record["chosen"])
    add_rates(tuned, records)
    one = {**TUNED, "models": ["chela"], "seeds": [0]}
    assert sweep(tmp_path, one) == 0
    assert read_file(tuned / "rates.yaml")["listops-tiny-chela"]["chosen"] == other
    assert sweep(tmp_path, {**one, "tune": {"rates": [0.001, 0.003], "steps": 0.5}}) == 0
    after = read_file(tuned / "rates.yaml")
    assert {row["rate"] for row in after["listops-tiny-chela"]["grid"]} == {0.001, 0.003}
    assert after["listops-tiny-softmax"] == records["listops-tiny-softmax"]


def test_a_grid_that_diverges_everywhere_blocks_its_pair(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hopeless = {**SMALL, "tune": {"rates": [0.5, 0.9]}, "per_model": {"chela": {"overrides": {"trainer.max_steps": 2}}}}
    assert sweep(tmp_path, hopeless, "model=chela") == 1
    assert not (folder / "rates.yaml").exists()
    assert "failed: listops-tiny-chela: no learning rate" in capsys.readouterr().out


def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, SMALL, "seed=0", "model=chela") == 0
    capsys.readouterr()
    assert sweep(tmp_path, SMALL, "dry_run=true") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["finished", "new", "new", "new"]
    assert "chela train task=listops model=softmax preset=tiny" in lines[-1]
    assert len(list(folder.rglob("result.json"))) == 1


def test_threads_are_pinned(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "threads": 3, "models": ["chela"], "seeds": [0]}))
    look = "import os, sys; print(os.environ['OMP_NUM_THREADS'], 'trainer.threads=3' in sys.argv); sys.exit(1)"
    assert main([str(path), f"runs={folder}"], command=(sys.executable, "-c", look)) == 1
    assert next((folder / "logs").iterdir()).read_text() == "3 True\n"


# ---- killing ---------------------------------------------------------------------------------------------------------

LAUNCH = "import sys; from experiments.sweep import main; sys.exit(main(sys.argv[2:], command=sys.argv[1].split()))"


def launch(tmp_path: Path, folder: Path, command: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", LAUNCH, command, str(tmp_path / "s.yaml"), f"runs={folder}", "jobs=2"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**os.environ, "FAKE_STEP_SECONDS": "0.04"})


def workers(folder: Path) -> list[int]:
    """Find the processes that train into a folder, orphans included."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(f"runs={folder}".encode()) for word in words) and b"resume=auto" in words:
            found.append(int(entry.name))
    return found


def kill_at_random(tmp_path: Path, folder: Path, command: str, kills: int, longest: float) -> None:
    """Kill -9 workers and launcher in turn, and start the sweep again when it is the launcher's turn."""
    rng = random.Random(9)
    launcher = launch(tmp_path, folder, command)
    for number in range(kills):
        time.sleep(rng.uniform(0.1, longest))
        alive = workers(folder)
        if number % 2 or not alive:
            launcher.kill()
            launcher.wait()
            if rng.random() < 0.5:  # otherwise its workers go on as orphans, and the next launcher must wait for them
                for worker in workers(folder):
                    os.kill(worker, signal.SIGKILL)
            launcher = launch(tmp_path, folder, command)
        else:
            os.kill(rng.choice(alive), signal.SIGKILL)
    assert launcher.wait() in (0, 1)
    last = launch(tmp_path, folder, command)
    assert last.wait() == 0


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the workers in /proc")
def test_killed_at_random_and_started_again_the_sweep_ends_the_same(tmp_path: Path, done: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TUNED))
    undisturbed = accuracies(done)
    killed = tmp_path / "killed"
    kill_at_random(tmp_path, killed, " ".join(FAKE), kills=10, longest=0.7)
    assert accuracies(killed) == undisturbed and len(undisturbed) == 4
    assert read_file(killed / "rates.yaml") == read_file(done / "rates.yaml")


def test_asked_to_stop_it_lets_the_runs_save(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**SMALL, "overrides": {"trainer.max_steps": 400}}))
    launcher = launch(tmp_path, folder, " ".join(FAKE))
    deadline = time.monotonic() + 20
    while len(list(folder.rglob("checkpoint.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=20) == 128 + signal.SIGTERM
    assert not workers(folder)
    assert [run.state for run in read_runs([folder])] == ["unfinished", "unfinished"]


def test_two_launchers_share_the_work(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SMALL))
    both = [launch(tmp_path, folder, " ".join(FAKE)) for _ in range(2)]
    assert [launcher.wait(timeout=60) for launcher in both] == [0, 0]
    assert len(accuracies(folder)) == 4
    started = sum(path.read_text().count("12,train") for path in folder.rglob("metrics.csv"))
    assert started == 4  # nobody's last step was taken twice
