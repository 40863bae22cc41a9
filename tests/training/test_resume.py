import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chela.config.compose import resolve
from chela.training import loop as fitting
from chela.training.run import claim_run, find_run
from chela.training.step import LitModel
from lra.builder import MANIFEST
from tests.training.launches import (
    EPOCH,
    LAST,
    TINY,
    assert_equal,
    die_at,
    fork,
    launch,
    left_by,
    metrics_of,
    only_run,
)

AtStep = Callable[[int, Callable[[], None]], None]


class Killed(BaseException):
    """Ends a launch in the middle, with nothing saved."""


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_at_the_last_step(  # test_slices stops at all others
    tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path, at_step: AtStep
) -> None:
    at_step(LAST, terminate)
    ended = launch(*tiny)
    assert ended.status == 128 + signal.SIGTERM and not ended.err
    run = only_run(tmp_path)
    assert f"stopped (SIGTERM) at step {LAST}; saved. To go on: chela train resume={run}" in ended.out
    assert not (run / "result.json").exists()
    assert launch(f"resume={run}").status == 0
    assert_equal(left_by(run), straight)


def test_another_machine_is_told(
    tiny: tuple[str, ...], tmp_path: Path, at_step: AtStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(2, terminate)
    assert "products of matrices by" in launch(*tiny).out
    monkeypatch.setattr(fitting, "arithmetic", lambda device: "a later processor")
    at_step(3, terminate)
    assert "on a later processor the last digits differ" in launch(f"resume={only_run(tmp_path)}").out
    at_step(4, terminate)
    assert "last digits" not in launch(f"resume={only_run(tmp_path)}").out  # said once


@pytest.mark.parametrize("step", [EPOCH + 1, LAST])
def test_killed_at_a_step(
    step: int, tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path, at_step: AtStep
) -> None:
    at_step(step, kill)
    with pytest.raises(Killed):
        launch(*tiny)
    assert len(metrics_of(only_run(tmp_path))) >= step - 1
    ended = launch(*tiny, "resume=auto")
    assert ended.status == 0, ended.err
    assert_equal(left_by(only_run(tmp_path)), straight)


def test_slices(tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path) -> None:
    """A limit that is over at once: every launch takes one step."""
    for step in range(1, LAST):
        ended = launch(*tiny, "resume=auto", "trainer.max_time=0s")
        assert ended.status == 0 and f"stopped (trainer.max_time=0s) at step {step}; saved" in ended.out, ended.err
    assert launch(*tiny, "resume=auto").status == 0
    assert_equal(left_by(only_run(tmp_path)), straight)


def test_a_finished_run_is_reported_not_repeated(tiny: tuple[str, ...], straight_run: Path, at_step: AtStep) -> None:
    at_step(1, kill)
    before = (straight_run / "result.json").read_bytes()
    for words in ((*tiny, f"runs={straight_run.parents[1]}", "resume=auto"), (f"resume={straight_run}",)):
        ended = launch(*words)
        assert ended.status == 0 and "test accuracy" in ended.out
    assert (straight_run / "result.json").read_bytes() == before


def test_a_run_made_again_gets_a_folder_of_its_own(tiny: tuple[str, ...], tmp_path: Path) -> None:
    short = (*tiny, "trainer.max_steps=1")
    assert launch(*short).status == 0
    again = launch(*short)
    (only,) = tmp_path.glob("runs/*/*/config.yaml")
    assert f"finished already: {only.parent} (again=true" in again.out and "test accuracy" in again.out
    assert launch(*short, "again=true").status == 0
    first, second = sorted(path.parent for path in tmp_path.glob("runs/*/*/config.yaml"))
    assert second.name == f"{first.name}-2"
    assert_equal(left_by(second), left_by(first))  # same seed, same numbers, to the last bit
    ended = launch(*short, "resume=auto")
    assert f"run={second}" in ended.out  # the newest one


def test_auto_finds_the_run_by_its_resolved_configuration(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Not by the words: others that resolve to the same numbers find it, the same folder name is not enough."""
    run, goes_on, lock = claim_run(resolve([*tiny]))
    lock.release()
    assert not goes_on
    same = [*reversed(tiny), "model=chela", "model.depth=2", "trainer.max_time=9m", "resume=auto"]
    assert find_run(resolve(same)) == run
    for word in ("seed=1", "model.dropout=0.2", "task.train=49", "preset=mini", "optimizer.eps=1e-9"):
        assert find_run(resolve([*tiny, word, "resume=auto"])) is None, word
    assert find_run(resolve([*tiny, f"runs={tmp_path / 'elsewhere'}", "resume=auto"])) is None
    assert find_run(resolve([*tiny])) is None  # resume=none begins a new one


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.precision=64-true", "model=softmax"),
        ("data.workers=1", "model.prenorm=false", "trainer.val_every=12"),  # each loader waits seconds for its worker
        ("trainer.precision=bf16-mixed", "model.norm=layer", "model.causal=true"),
        ("model=linear", "trainer.val_every=1", "trainer.checkpoint_every=100"),
        ("trainer.accumulate=4",),
    ],
)
def test_other_systems_and_settings(
    words: tuple[str, ...], tiny: tuple[str, ...], tmp_path: Path, at_step: AtStep
) -> None:
    apart = (*tiny, *words, f"runs={tmp_path / 'apart'}")
    assert launch(*apart).status == 0
    at_step(3, terminate)
    assert launch(*tiny, *words).status == 128 + signal.SIGTERM
    assert launch(*tiny, *words, "resume=auto").status == 0
    assert_equal(left_by(only_run(tmp_path / "runs")), left_by(only_run(tmp_path / "apart")))


@pytest.mark.parametrize("place", ["_save_best", "test_step", "write_whole"])
def test_killed_after_the_last_step(
    place: str, tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"_save_best": fitting.Launch, "test_step": LitModel, "write_whole": fitting}[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, lambda *_: kill())
        with pytest.raises(Killed):
            launch(*tiny)
    assert launch(*tiny, "resume=auto").status == 0
    assert_equal(left_by(only_run(tmp_path)), straight)


# ---- kill -9 -------------------------------------------------------------------------------------------------------


def killed_then_resumed(point: int, words: tuple[str, ...], folder: Path) -> Path | None:
    """Kill a launch at a point and go on; None when it ended before that point."""
    process = fork(words, folder / "killed.log", die_at, point)
    process.join(120)
    if process.exitcode == 0:
        return None
    assert process.exitcode == -signal.SIGKILL, (folder / "killed.log").read_text()
    resume(words, folder)
    return only_run(folder)


def resume(words: tuple[str, ...], folder: Path) -> None:
    process = fork((*words, "resume=auto"), folder / "resumed.log")
    process.join(120)
    assert process.exitcode == 0, (folder / "resumed.log").read_text()


def test_kill_9_while_a_checkpoint_is_written(tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path) -> None:
    """A point in the middle of the second checkpoint; the slow test below takes them all."""
    run = killed_then_resumed(42, (*tiny, "resume=auto"), tmp_path)
    assert run is not None
    assert_equal(left_by(run), straight)


@pytest.mark.slow
def test_kill_9_at_every_change_of_a_file(data: str, straight: dict[str, Any], tmp_path: Path) -> None:
    point, survived = 0, 0
    while True:
        point += 1
        folder = tmp_path / str(point)
        folder.mkdir()
        run = killed_then_resumed(point, (*TINY, f"data.dir={data}", f"runs={folder}", "resume=auto"), folder)
        if run is None:
            break
        assert_equal(left_by(run), straight, f"point {point}")
        survived += 1
    assert survived > 80


def killed_within(words: tuple[str, ...], after: float, folder: Path) -> bool:
    """Start a launch and kill it so many seconds later; False when it had ended by then."""
    process = fork(words, folder / "killed.log")
    process.join(after)
    process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), (folder / "killed.log").read_text()
    return bool(process.exitcode)


def duration(words: tuple[str, ...], folder: Path) -> float:
    """Take the time of a launch that nobody kills."""
    start = time.monotonic()
    resume(words, folder)
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
def test_kill_9_at_random_moments(moment: int, data: str, straight: dict[str, Any], tmp_path: Path) -> None:
    """Three kills in each run, wherever they fall between its start and its end."""
    draw = random.Random(moment)
    words = (*TINY, f"data.dir={data}", f"runs={tmp_path / 'runs'}", "resume=auto", "trainer.checkpoint_every=1")
    longest = duration(words, tmp_path)
    kills = 0
    for _ in range(100):
        if kills == 0:
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # the one of before had ended
        after = draw.uniform(0, longest)
        if killed_within(words, after, tmp_path):
            kills += 1
        else:
            longest, kills = longest if kills else after, 0  # a whole run takes less than that
        if kills == 3:
            break
    assert kills == 3
    resume(words, tmp_path)
    assert_equal(left_by(only_run(tmp_path)), straight)


def is_built(data: Path) -> bool:
    return any(".building" not in str(path.relative_to(data)) for path in data.rglob(MANIFEST))


@pytest.mark.slow
def test_kill_9_while_the_data_is_built(straight: dict[str, Any], tmp_path: Path) -> None:
    draw = random.Random(0)
    data = tmp_path / "data"
    words = (*TINY, f"data.dir={data}", f"runs={tmp_path / 'runs'}", "resume=auto")
    longest, kills = duration(words, tmp_path), 0
    for _ in range(100):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        if is_built(data):  # before the kill
            shutil.rmtree(data)
        after = draw.uniform(0, longest)
        killed_within(words, after, tmp_path)
        if is_built(data):
            longest = after
        elif data.exists():
            kills += 1
        if kills == 8:
            break
    assert kills == 8
    resume(words, tmp_path)
    assert_equal(left_by(only_run(tmp_path / "runs")), straight)
