"""Signals, locks, limits of time, and what a run says when it ends early."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chela.core.errors import UsageError
from chela.training import loop as fitting
from chela.training.resume import SIGNALS, Signals, Stopped, load
from chela.training.run import LAST_KEYS, RunFolder, lock_run
from chela.training.step import LitModel
from tests.training.launches import assert_equal, fork, in_step, launch, left_by, only_run

AtStep = Callable[[int, Callable[[], None]], None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])  # SIGTERM: test_resume
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    number: signal.Signals, tiny: tuple[str, ...], tmp_path: Path, at_step: AtStep
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    at_step(3, lambda: os.kill(os.getpid(), number))
    ended = launch(*tiny)
    assert ended.status == 128 + number
    assert f"stopped ({number.name}) at step 3; saved. To go on: chela train resume=" in ended.out
    run = RunFolder(only_run(tmp_path))
    assert load(run.last, LAST_KEYS, run.path.name[-8:])["step"] == 3
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_signal_before_the_first_step(
    tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "Launch", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        ended = launch(*tiny)
    assert ended.status == 128 + signal.SIGTERM
    assert "stopped (SIGTERM); nothing new to save. To go on: chela train resume=" in ended.out
    assert launch(*tiny, "resume=auto").status == 0
    assert_equal(left_by(only_run(tmp_path)), straight)


def test_a_signal_in_the_test(
    tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LitModel, "test_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        ended = launch(*tiny)
    assert ended.status == 128 + signal.SIGINT and "nothing new to save" in ended.out and not ended.err
    assert launch(*tiny, "resume=auto").status == 0
    assert_equal(left_by(only_run(tmp_path)), straight)


def test_ctrl_c_before_anything(monkeypatch: pytest.MonkeyPatch, tiny: tuple[str, ...]) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "find_run", interrupt)
    ended = launch(*tiny)
    assert ended.status == 130 and ended.error == "stopped by Ctrl-C, nothing was saved"


def sleep() -> None:
    (Path.cwd() / "asleep").touch()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.1)


def in_folder(folder: Path) -> None:
    os.chdir(folder)
    in_step(3, sleep)


def fall_asleep(words: tuple[str, ...], folder: Path) -> Any:
    """Start a launch that sleeps in its third step, and return its process once it does."""
    process = fork(words, folder / "log", in_folder, folder)
    end = time.monotonic() + 60
    while not (folder / "asleep").exists():
        assert time.monotonic() < end and process.is_alive(), (folder / "log").read_text()
        time.sleep(0.02)
    return process


def test_a_second_ctrl_c_does_not_wait(tiny: tuple[str, ...], tmp_path: Path) -> None:
    process = fall_asleep(tiny, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)  # passed on by a launcher: not a second one
    process.join(Signals.SECOND_AFTER + 0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == -signal.SIGINT
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_signals_are_noted_or_raise() -> None:
    with Signals() as signals:
        with pytest.raises(Stopped) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.value.status, stop.value.step) == (143, None)
    with Signals() as signals:
        signals.patient = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == signal.SIGTERM  # the first one names the reason


def test_a_limit_of_time(tiny: tuple[str, ...], tmp_path: Path, at_step: AtStep) -> None:
    """The limit counts from the start of the launch; that of this process is long ago."""
    ended = launch(*tiny, "trainer.max_time=1s")
    assert ended.status == 0
    assert "stopped (trainer.max_time=1s) at step 1; saved" in ended.out
    assert not (only_run(tmp_path) / "result.json").exists()


def test_checkpoints_by_the_minute(tiny: tuple[str, ...], tmp_path: Path, at_step: AtStep) -> None:
    words = (*tiny, "trainer.checkpoint_every=1000", "trainer.val_every=1000")

    def stop() -> None:
        raise RuntimeError("stop here")

    for minutes, step in (("1e-9", 4), ("100", None)):
        runs = tmp_path / minutes
        at_step(5, stop)
        with pytest.raises(RuntimeError, match="stop here"):
            launch(*words, f"trainer.checkpoint_minutes={minutes}", f"runs={runs}")
        state = RunFolder(only_run(runs)).load_last(only_run(runs).name[-8:], lambda _: None)
        assert (state and state["step"]) == step


# ---- one launch at a time ------------------------------------------------------------------------------------------


def test_two_launches_of_one_run(tiny: tuple[str, ...], tmp_path: Path) -> None:
    first = fall_asleep(tiny, tmp_path)
    run = only_run(tmp_path)
    for words in ((*tiny, "resume=auto"), (f"resume={run}",)):
        second = fork(words, tmp_path / "second.log")
        second.join(60)
        assert second.exitcode == 2
        (line,) = [x for x in (tmp_path / "second.log").read_text().splitlines() if x.startswith("error:")]
        assert f"expected that nobody works on {run}, another launch does (process {first.pid} on " in line
    first.kill()
    first.join()
    lock = lock_run(run)  # it fell with the process
    lock.release()


def test_many_launches_at_the_same_moment(tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path) -> None:
    """One of them makes the run, whoever comes first; the others are refused or find it finished."""
    several = [fork((*tiny, "resume=auto"), tmp_path / f"{i}.log") for i in range(4)]
    for process in several:
        process.join(120)
    assert {process.exitcode for process in several} <= {0, 2} and 0 in [process.exitcode for process in several]
    assert_equal(left_by(only_run(tmp_path)), straight)


def test_a_folder_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    lock_run(tmp_path).release()

    def held(*_: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "held")

    monkeypatch.setattr("fcntl.flock", held)
    with pytest.raises(UsageError, match=r"another launch does \(unknown\)"):
        lock_run(tmp_path)


@pytest.mark.slow
def test_ctrl_c_of_a_real_command(tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path) -> None:
    """As from a terminal: a process of its own, its start included."""
    words = [sys.executable, "-m", "chela.train", *tiny, "resume=auto"]
    for delay in (0.5, 2.0, 4.0, 6.0):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode in (130, 0, -signal.SIGINT), (out, err)
        assert "Traceback" not in err or "import" in err, err  # the interpreter itself may still be starting
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "test accuracy" in done.stdout
    assert_equal(left_by(only_run(tmp_path)), straight)
