from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from chela.config import resolve
from chela.errors import UsageError
from chela.groups import configs_folder, names
from chela.identity import fingerprint
from experiments import launchers, plan
from experiments.plan import Job, read_sweep
from experiments.runs import read_runs
from experiments.sweep import main, sharded
from experiments.table import to_csv
from tests.experiments.conftest import LOSS
from tests.experiments.fake_train import CRASHES, DIES

FAKE = (sys.executable, "-m", "tests.experiments.fake_train")
SMALL = {
    "preset": "tiny",
    "tasks": ["listops"],
    "models": ["chela", "softmax"],
    "seeds": [0, 1],
    "overrides": {"trainer.max_steps": 12},
}
TUNED = {**SMALL, "tune": {"rates": [0.001, 0.002], "steps": 0.5}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sweep"


def sweep(tmp_path: Path, content: dict[str, object], *words: str) -> int:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(content))
    return main([str(path), f"runs={tmp_path / 'sweep'}", "jobs=2", *words], command=FAKE)


def accuracies(folder: Path) -> dict[tuple[str, int], float]:
    return {(run.model, run.seed): run.value for run in read_runs([folder])}


def test_every_run_of_the_grid_is_made_once(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, SMALL) == 0
    assert sorted(accuracies(folder)) == [("chela", 0), ("chela", 1), ("softmax", 0), ("softmax", 1)]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    capsys.readouterr()
    assert sweep(tmp_path, SMALL) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")} == before
    assert "4 of 4 runs finished (4 of them before)" in capsys.readouterr().out


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
    assert "FAILED, the others go on: RuntimeError: it went wrong" in capsys.readouterr().out
    states = {(run.model, run.seed): (run.state, run.error) for run in read_runs([folder])}
    assert states["softmax", 0] == ("failed", "RuntimeError: it went wrong")
    assert [states["chela", seed][0] for seed in (0, 1)] == ["finished", "finished"]


def test_a_run_that_is_always_killed_is_given_up_in_the_end(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dies = {**SMALL, "models": ["chela"], "seeds": [0], "overrides": {"model.d_ff": DIES}}
    assert sweep(tmp_path, dies) == 1
    out = capsys.readouterr().out
    assert out.count("killed by signal 9") == 2 and "FAILED" in out


def test_a_failure_is_forgotten_once_the_run_is_finished(tmp_path: Path, folder: Path) -> None:
    one = {**SMALL, "models": ["chela"], "seeds": [0]}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(one))
    (plan_pair,) = read_sweep(path).pairs(folder)
    (job,) = plan_pair.runs(None)
    failing = (sys.executable, "-c", "raise SystemExit('no space left')")
    assert main([str(path), f"runs={folder}"], command=failing) == 1
    assert [run.state for run in read_runs([folder])] == ["failed"]
    assert sweep(tmp_path, one) == 0
    assert [run.state for run in read_runs([folder])] == ["finished"]
    assert job.finished() and not list(folder.rglob("failed.json"))


def test_slices_go_on_where_they_stopped(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {**SMALL, "models": ["chela"], "seeds": [0], "overrides": {"trainer.max_steps": 3}}
    assert sweep(tmp_path, one, "trainer.max_time=1s") == 0
    assert "stopped at step 1 of 3" in capsys.readouterr().out
    assert sweep(tmp_path, one, "trainer.max_time=1s") == 0
    assert "goes on from step 1" in capsys.readouterr().out
    assert sweep(tmp_path, one) == 0  # without a limit it is the same run
    assert [run.state for run in read_runs([folder])] == ["finished"]


def test_the_rate_is_chosen_on_validation_and_written_down(tmp_path: Path, folder: Path) -> None:
    tuned = {**SMALL, "tune": {"rates": [0.001, 0.002, 0.01, 0.9], "steps": 0.5}}
    assert sweep(tmp_path, tuned) == 0
    for model in ("chela", "softmax"):
        record = yaml.safe_load((folder / "rates" / f"listops-tiny-{model}.yaml").read_text())
        scores = {row["rate"]: row.get("validation_accuracy") for row in record["grid"]}
        assert scores.pop(0.9) is None and record["grid"][-1]["diverged"]
        assert record["chosen"] == max(scores, key=scores.__getitem__) and record["steps"] == 6
        chosen = [run for run in read_runs([folder]) if run.model == model]
        assert [run.seed for run in chosen] == [0, 1]
        assert {run.config["optimizer.lr"] for run in chosen} == {record["chosen"]}
        assert {run.config["trainer.max_steps"] for run in chosen} == {12}
    assert {run.state for run in read_runs([folder])} == {"finished"}
    assert {run.state for run in read_runs([folder / "tune"])} == {"untested", "unfinished"}  # 0.9 diverged


def test_a_recorded_rate_stays_until_the_grid_changes(tmp_path: Path, folder: Path) -> None:
    tuned = {**SMALL, "models": ["chela"], "seeds": [0], "tune": {"rates": [0.001, 0.002], "steps": 0.5}}
    assert sweep(tmp_path, tuned) == 0
    record = folder / "rates" / "listops-tiny-chela.yaml"
    other = {0.001: 0.002, 0.002: 0.001}[yaml.safe_load(record.read_text())["chosen"]]
    record.write_text(yaml.safe_dump({**yaml.safe_load(record.read_text()), "chosen": other}))
    assert sweep(tmp_path, tuned) == 0
    assert yaml.safe_load(record.read_text())["chosen"] == other
    assert sweep(tmp_path, {**tuned, "tune": {"rates": [0.001, 0.003], "steps": 0.5}}) == 0
    assert {row["rate"] for row in yaml.safe_load(record.read_text())["grid"]} == {0.001, 0.003}


@pytest.mark.parametrize("content", ["chosen: 0.002\n", "grid: [", "a word", "\udcff"])
def test_a_rate_whose_record_cannot_be_read_is_chosen_again(tmp_path: Path, folder: Path, content: str) -> None:
    tuned = {**SMALL, "models": ["chela"], "seeds": [0], "tune": {"rates": [0.001, 0.002], "steps": 0.5}}
    assert sweep(tmp_path, tuned) == 0
    record = folder / "rates" / "listops-tiny-chela.yaml"
    chosen, before = record.read_text(), accuracies(folder)
    record.write_bytes(content.encode(errors="surrogateescape"))
    assert sweep(tmp_path, tuned) == 0
    assert record.read_text() == chosen and accuracies(folder) == before


def test_a_grid_that_diverges_everywhere_blocks_its_pair(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hopeless = {**SMALL, "tune": {"rates": [0.5, 0.9]}, "per_model": {"chela": {"overrides": {"trainer.max_steps": 2}}}}
    assert sweep(tmp_path, hopeless, "model=chela") == 1
    assert not (folder / "rates").exists()
    assert "not run: listops-tiny-chela: training diverged at every" in capsys.readouterr().out


@pytest.mark.parametrize("tune", [None, {"rates": [0.001, 0.002]}])
def test_the_shards_are_the_whole(tmp_path: Path, folder: Path, tune: object) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "seeds": [0, 1, 2], **({"tune": tune} if tune else {})}))
    pairs = list(read_sweep(path).pairs(folder))
    parts = [sharded(pairs, f"{part}/4") for part in (1, 2, 3, 4)]
    jobs = [job.name for part in parts for pair in part for job in pair.runs(0.01)]
    assert sorted(jobs) == sorted(job.name for pair in pairs for job in pair.runs(0.01))
    assert len(set(jobs)) == 6


def test_a_task_may_have_a_grid_of_its_own(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "s.yaml"
    own = {"image": {"tune": {"rates": [0.3, 0.1], "steps": 1.0}}}
    path.write_text(yaml.safe_dump({**SMALL, "tasks": ["listops", "image"], "tune": {"rates": [0.2]}, "per_task": own}))
    grids = {(pair.config.task.name, pair.tuning.rates[0], len(pair.tune)) for pair in read_sweep(path).pairs(folder)}
    assert grids == {("listops", 0.2, 1), ("image", 0.3, 2)}
    path.write_text(yaml.safe_dump({**SMALL, "per_task": {"listops": {"tune": {"rates": []}}}}))
    with pytest.raises(UsageError, match="at least one rate"):
        read_sweep(path)


def test_files_of_ones_own_lie_beside_the_sweep_file(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks and systems that no file in configs names; what the runs are told is all that is looked at."""
    special = {"per_model": {"mine": {"seeds": [5]}}}
    path = tmp_path / "s.yaml"
    path.write_text(
        yaml.safe_dump({**TUNED, **special, "tasks": ["./recall.yaml"], "models": ["chela", "systems/mine.yaml"]})
    )
    config = resolve(["preset=tiny"])
    monkeypatch.setattr(plan, "resolve", lambda words: config)
    chela, mine = read_sweep(path).pairs(folder)
    assert (chela.name, mine.name) == ("recall-tiny-chela", "recall-tiny-mine")
    assert mine.words[:2] == (f"task={tmp_path / 'recall.yaml'}", f"model={tmp_path / 'systems' / 'mine.yaml'}")
    assert (chela.seeds, mine.seeds) == ((0, 1), (5,))
    (only,) = read_sweep(path, {"models": ["mine"]}).pairs(folder)
    assert only.name == mine.name
    (tmp_path / "my_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    config.task.name = "my_module:Recall"
    assert mine.runs(0.001)[0].folder.parent == folder / "Recall-tiny"


def test_the_rate_is_the_best_in_the_direction_of_the_score(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**TUNED, "models": ["chela"], "tune": {"rates": [0.1, 0.2, 0.3]}}))
    (pair,) = read_sweep(path).pairs(folder)
    for job, loss in zip(pair.tune, (0.9, 0.4, 0.4), strict=True):
        job.folder.mkdir(parents=True)
        result = {"format_version": 2, "score": LOSS, "best_validation": {"loss": loss, "accuracy": loss}, "test": None}
        (job.folder / "result.json").write_text(json.dumps(result))
    assert pair.choose_rate() == 0.2 == pair.recorded_rate()
    record = yaml.safe_load((folder / "rates" / f"{pair.name}.yaml").read_text())
    assert [row["validation_loss"] for row in record["grid"]] == [0.9, 0.4, 0.4]


def test_a_job_is_what_its_words_resolve_to(tmp_path: Path, folder: Path) -> None:
    """Folder and fingerprint are foretold without resolving the words; the run must find the same."""
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "tune": {"rates": [1e-05, 0.3], "steps": 0.3}}))
    for pair in read_sweep(path).pairs(folder, ["optimizer.beta2=0.99"]):
        for job in (*pair.tune, *pair.runs(3e-4)):
            config = resolve(list(job.words))
            assert fingerprint(config) == fingerprint(job.config)
            assert job.folder.parent == Path(config.runs) / f"{config.task.name}-{config.preset}"


def test_a_pair_without_a_seed_left_is_not_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {**TUNED, "tasks": ["listops", "image"], "seeds": [0], "per_task": {"listops": {"seeds": [0, 1]}}}
    assert sweep(tmp_path, content, "--dry-run", "seed=1") == 0
    out = capsys.readouterr().out
    assert "listops-tiny" in out and "task=image" not in out and "image-tiny" not in out


@pytest.mark.parametrize(
    ("visible", "devices", "room"), [("0,1", 1, 2), ("0,1", 2, 1), ("-1", 1, 3), ("0,-1,1", 1, 1), ("0", 2, None)]
)
def test_how_many_runs_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, devices: int, room: int | None
) -> None:
    """By GPUs where there are any, listed as CUDA reads the variable; more than there are can never be had."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(launchers, "_cores", lambda: 3)
    config = resolve(["preset=tiny", "trainer.accelerator=auto", f"trainer.devices={devices}"])
    job = Job((), tmp_path / "listops-tiny" / "a", config)
    if room is None:
        with pytest.raises(UsageError, match=r"expected up to the 1 GPUs of this machine, got 2"):
            launchers.Local(tmp_path, 0, 1, job)
    else:
        assert launchers.Local(tmp_path, 0, 1, job).room() == room


def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, SMALL, "seed=0", "model=chela") == 0
    capsys.readouterr()
    assert sweep(tmp_path, SMALL, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["finished", "new", "new", "new"]
    assert "python -m chela.train task=listops model=softmax preset=tiny" in lines[-1]
    assert len(list(folder.rglob("result.json"))) == 1


def test_threads_are_pinned(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "threads": 3, "models": ["chela"], "seeds": [0]}))
    look = "import os, sys; print(os.environ['OMP_NUM_THREADS'], 'trainer.threads=3' in sys.argv); sys.exit(1)"
    assert main([str(path), f"runs={folder}"], command=(sys.executable, "-c", look)) == 1
    assert next((folder / "logs").iterdir()).read_text() == "3 True\n"


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ({**SMALL, "models": ["chella"]}, [], "did you mean 'chela'"),
        ({**SMALL, "modles": ["chela"]}, [], "modles"),
        ({**SMALL, "preset": "auto"}, [], "expected one of full, mini, tiny"),
        ({**SMALL, "overrides": {"model.dpeth": 2}}, [], "did you mean 'model.depth'"),
        ({**SMALL, "overrides": {"seed": 2}}, [], "set by the sweep itself"),
        ({**SMALL, "models": ["chela", "chela"]}, [], "each once"),
        ({**SMALL, "tune": {"rates": []}}, [], "at least one"),
        ({"preset": "tiny"}, [], "expected a sweep file"),
        ({**SMALL, "per_model": {"sofmax": {"seeds": [0]}}}, [], "per_model: expected names of files in configs/model"),
        ({**SMALL, "per_task": {"imagee": {"seeds": [0]}}}, [], "per_task: expected names of files in configs/task"),
        (TUNED, ["optimizer.lr=0.01"], "optimizer.lr: expected none where rates are tuned (listops-tiny-chela)"),
        ({**TUNED, "overrides": {"optimizer.lr": 0.01}}, [], "optimizer.lr: expected none where rates are tuned"),
        (SMALL, ["trainer.threads=4"], "trainer.threads is set by the sweep itself"),
        (SMALL, ["task=image"], "expected some of the sweep's listops"),
        (SMALL, ["launcher=cloud"], "expected one of local, slurm"),
        (SMALL, ["jobs=many"], "jobs: expected a whole number"),
        (SMALL, ["--shard", "3/2"], "expected i/n"),
        (SMALL, ["nonsense"], "file: expected one value"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    content: dict[str, object],
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sweep(tmp_path, content, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_mistake_is_told_without_waiting_for_torch(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**SMALL, "models": ["chella"]}))
    code = "import sys; from experiments.sweep import main; assert main(sys.argv[1:]) == 2; "
    code += "assert not {'torch', 'lightning', 'matplotlib', 'submitit'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((configs_folder() / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_this_repository_can_be_planned(path: Path, folder: Path) -> None:
    """Every task and system that this tree has, with the sweep's own overrides."""
    listed = yaml.safe_load(path.read_text())
    chosen = {
        f"{group}s": [name for name in listed[f"{group}s"] if name in names(group)] for group in ("task", "model")
    }
    if [] in chosen.values():
        pytest.skip(f"none of the sweep's tasks or systems is in this tree: {listed['tasks']}, {listed['models']}")
    pairs = list(read_sweep(path, chosen).pairs(folder))
    jobs = [job for pair in pairs for job in (*pair.tune, *pair.runs(None))]
    assert pairs and len({job.name for job in jobs}) == len(jobs)
    steps: dict[str, set[int]] = {}
    for pair in pairs:
        steps.setdefault(pair.config.task.name, set()).add(pair.config.trainer.max_steps)
    assert all(len(found) == 1 for found in steps.values()), f"expected equal steps within a task, got {steps}"


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
def test_killed_at_random_and_started_again_the_sweep_ends_the_same(tmp_path: Path, folder: Path) -> None:
    assert sweep(tmp_path, TUNED) == 0
    undisturbed = accuracies(folder)
    killed = tmp_path / "killed"
    kill_at_random(tmp_path, killed, " ".join(FAKE), kills=10, longest=0.7)
    assert accuracies(killed) == undisturbed and len(undisturbed) == 4
    rates = [{path.name: path.read_text() for path in (top / "rates").iterdir()} for top in (folder, killed)]
    assert rates[0] == rates[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the workers in /proc")
def test_killed_at_random_real_runs_give_the_same_accuracy_columns(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHELA_DATA", str(tmp_path / "data"))
    content = {**SMALL, "overrides": {"trainer.max_steps": 200, "trainer.val_every": 50}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    assert main([str(tmp_path / "s.yaml"), f"runs={folder}", "jobs=2"]) == 0
    killed = tmp_path / "killed"
    kill_at_random(tmp_path, killed, f"{sys.executable} -m chela.train", kills=10, longest=15.0)
    assert accuracy_columns(killed) == accuracy_columns(folder)
    assert len(accuracy_columns(folder)) == 2


def accuracy_columns(folder: Path) -> list[tuple[str, ...]]:
    rows = csv.DictReader(io.StringIO(to_csv(read_runs([folder]), with_published=False)))
    keys = ("task", "system", "accuracy", "sd", "seeds", "at_chance", "failed", "unfinished", "lr", "steps")
    return [tuple(row[key] for key in keys) for row in rows if row["kind"] == "measured"]


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
