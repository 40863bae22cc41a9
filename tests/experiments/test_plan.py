"""What a sweep file means, before anything is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from chela.config.compose import configs_folder, names, resolve
from experiments import plan
from experiments.plan import read_sweep
from experiments.runs import RATES, add_rates, read_file
from experiments.sweep import slots
from tests.experiments.conftest import LOSS, SMALL, sweep

TUNED = {**SMALL, "tune": {"rates": [0.001, 0.002], "steps": 0.5}}


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
    (only,) = read_sweep(path, models=["mine"]).pairs(folder)
    assert only.name == mine.name
    (tmp_path / "my_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    config.task.name = "my_module:Recall"
    assert mine.runs(0.001)[0].folder.parent == folder / "Recall-tiny"


def test_the_rate_is_the_best_in_the_direction_of_the_score(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "s.yaml"
    tune = {"rates": [0.1, 0.2, 0.3, 0.4], "seeds": [3, 4]}
    path.write_text(yaml.safe_dump({**TUNED, "models": ["chela"], "tune": tune}))
    (pair,) = read_sweep(path).pairs(folder)
    losses = (0.2, 0.7, 0.4, 0.4, 0.4, 0.4, 0.1, None)  # the best of all at 0.4, where the other seed diverged
    assert [job.config.seed for job in pair.tune] == [3, 4] * 4
    for job, loss in zip(pair.tune, losses, strict=True):
        if loss is None:
            continue
        job.folder.mkdir(parents=True)
        result = {"format_version": 2, "score": LOSS, "best_validation": {"loss": loss, "accuracy": loss}, "test": None}
        (job.folder / "result.json").write_text(json.dumps(result))
    record = pair.choose_rate()
    assert tuple(row.get("validation_loss") for row in record["grid"]) == losses
    assert record["grid"][-1] == record["grid"][-1] | {"rate": 0.4, "seed": 4, "diverged": True}
    assert add_rates(folder, {pair.name: record}) == read_file(folder / RATES)
    assert record["chosen"] == 0.2 == pair.rate(read_file(folder / RATES)) and pair.rate({}) is None


@pytest.mark.parametrize("task", ["listops", "image", "pathfinder", "pathx"])
def test_the_grid_of_the_small_arena_never_reads_a_test_record(task: str, folder: Path) -> None:
    """Records of these are one row, the test's last; a longer validation must come out of those to train on."""
    (pair,) = read_sweep(configs_folder() / "sweep" / "lra_mini.yaml", [task], ["chela"]).pairs(folder)
    run, grid = pair.config.task, [job.config.task for job in pair.tune]
    assert len(grid) == 10
    for about in grid:
        assert about.validation >= 5 * run.validation
        if task != "image":  # its test images are a file of their own
            assert about.train + about.validation == run.train + run.validation and about.test == run.test


def test_a_pair_without_a_seed_left_is_not_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {**TUNED, "tasks": ["listops", "image"], "seeds": [0], "per_task": {"listops": {"seeds": [0, 1]}}}
    assert sweep(tmp_path, content, "dry_run=true", "seed=1") == 0
    out = capsys.readouterr().out
    assert "listops-tiny" in out and "task=image" not in out and "image-tiny" not in out


@pytest.mark.parametrize(
    ("visible", "count", "devices", "room"),
    [
        ("", 2, 1, [["0"], ["1"]]),
        ("5,3", 2, 1, [["5"], ["3"]]),
        ("5,3,1", 3, 2, [["5", "3"]]),
        ("", 0, 1, [[], [], []]),
    ],
)
def test_how_many_runs_fit(
    monkeypatch: pytest.MonkeyPatch, visible: str, count: int, devices: int, room: list[list[str]]
) -> None:
    """By GPUs where there are any, else by cores."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    config = resolve(["preset=tiny", "trainer.accelerator=auto", "trainer.threads=1", f"trainer.devices={devices}"])
    assert slots(config.trainer, 0) == room


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ({**SMALL, "models": ["chella"]}, [], "did you mean 'chela'"),
        ({**SMALL, "modles": ["chela"]}, [], "modles"),
        ({**SMALL, "overrides": {"model.dpeth": 2}}, [], "did you mean 'model.depth'"),
        ({**SMALL, "overrides": {"seed": 2}}, [], "seed is the sweep's own"),
        ({"preset": "tiny"}, [], "expected a sweep file"),
        ({**SMALL, "per_model": {"sofmax": {"seeds": [0]}}}, [], "per_model: expected names of files in configs/model"),
        ({**SMALL, "per_task": {"imagee": {"seeds": [0]}}}, [], "per_task: expected names of files in configs/task"),
        (TUNED, ["optimizer.lr=0.01"], "optimizer.lr: expected none where rates are tuned (listops-tiny-chela)"),
        ({**TUNED, "overrides": {"optimizer.lr": 0.01}}, [], "optimizer.lr: expected none where rates are tuned"),
        (SMALL, ["trainer.threads=4"], "trainer.threads is the sweep's own"),
        (SMALL, ["task=image"], "expected some of the sweep's listops"),
        (SMALL, ["launcher=cloud"], "expected one of local, slurm"),
        (SMALL, ["jobs=many"], "jobs: expected a whole number"),
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


def test_a_mistake_is_told_without_waiting_for_lightning(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**SMALL, "models": ["chella"]}))
    code = "import sys; from experiments.sweep import main; assert main(sys.argv[1:]) == 2; "
    code += "assert not {'lightning', 'matplotlib', 'submitit'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((configs_folder() / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_this_repository_can_be_planned(path: Path, folder: Path) -> None:
    """Every task and system that this tree has, with the sweep's own overrides."""
    listed = yaml.safe_load(path.read_text())
    tasks, models = ([name for name in listed[f"{group}s"] if name in names(group)] for group in ("task", "model"))
    if not (tasks and models):
        pytest.skip(f"none of the sweep's tasks or systems is in this tree: {listed['tasks']}, {listed['models']}")
    pairs = list(read_sweep(path, tasks, models).pairs(folder))
    jobs = [job for pair in pairs for job in (*pair.tune, *pair.runs(None))]
    assert pairs and len({job.name for job in jobs}) == len(jobs)
    steps: dict[str, set[int]] = {}
    for pair in pairs:
        if pair.config.preset != "full":  # there each system has its own paper's schedule
            steps.setdefault(pair.config.task.name, set()).add(pair.config.trainer.max_steps)
    assert all(len(found) == 1 for found in steps.values()), f"expected equal steps within a task, got {steps}"
