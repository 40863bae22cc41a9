"""Two processes (gloo, CPU) against one with the same global batch."""

import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chela.core.errors import UsageError
from chela.training import log as metrics
from chela.training import resume as checkpoint
from chela.training.step import LitModel
from tests.training.launches import TINY, assert_equal, fork, in_step, launch, left_by, metrics_of, only_run

# Ragged evaluation batches. A bias just before a batch norm has no gradient but rounding, which Adam blows up to whole
# steps: a larger eps keeps it small, so that weights can be compared, and not only losses.
PAIR = (*TINY, "model.dropout=0", "task.validation=29", "task.test=43", "optimizer.eps=1e-4")


def join_group(rank: int, port: int, count: int = 2) -> None:
    """Set what torchrun sets for each of its processes."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(words: tuple[str, ...], folder: Path, join: Callable[..., None] = join_group, count: int = 2) -> list[Any]:
    words, port = (*words, f"trainer.devices={count}"), free_port()
    return [fork(words, folder / f"rank{rank}.log", join, rank, port, count) for rank in range(count)]


def finish(pair: list[Any], folder: Path) -> list[int]:
    for process in pair:
        process.join(120)
        if process.exitcode is None:
            for each in pair:
                each.kill()
            pytest.fail(f"hangs: {(folder / 'rank0.log').read_text()}\n{(folder / 'rank1.log').read_text()}")
    return [process.exitcode for process in pair]


def assert_close(run: Path, other: Path) -> None:
    """Every loss, accuracy and weight of two runs within 1e-5; the same lines."""
    rows, others = metrics_of(run), metrics_of(other)
    assert [(row["step"], row["split"]) for row in rows] == [(row["step"], row["split"]) for row in others]
    for row, reference in zip(rows, others, strict=True):
        assert float(row["loss"]) == pytest.approx(float(reference["loss"]), abs=1e-5), row
        assert float(row["accuracy"]) == pytest.approx(float(reference["accuracy"]), abs=1e-9), row
    a, b = left_by(run), left_by(other)
    for name, value in a["last"]["model"].items():
        torch.testing.assert_close(value, b["last"]["model"][name], rtol=0, atol=1e-5)
    for key in ("best_step", "majority_accuracy"):
        assert a["result"][key] == b["result"][key]
    assert a["result"]["test"] == pytest.approx(b["result"]["test"], abs=1e-5)
    assert a["last"]["state"]["totals"] == b["last"]["state"]["totals"]


@pytest.fixture(scope="module")
def alone(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    runs = tmp_path_factory.mktemp("alone")
    ended = launch(*PAIR, f"data.dir={data}", f"runs={runs}")
    assert ended.status == 0, ended.err
    return only_run(runs)


@pytest.fixture(scope="module")
def pair(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes."""
    runs = tmp_path_factory.mktemp("pair")
    assert finish(start((*PAIR, f"data.dir={data}", f"runs={runs}"), runs), runs) == [0, 0], logs(runs)
    return only_run(runs)


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("rank*.log")))


def test_two_processes_are_one(alone: Path, pair: Path) -> None:
    assert_close(pair, alone)
    assert (pair.parents[1] / "rank1.log").read_text() == ""  # the first one alone speaks
    assert left_by(pair)["result"]["test"]["count"] == 43


def test_two_parts_are_two_processes(data: str, tmp_path: Path) -> None:
    """One process in two parts, dropout and batch norms included: each of two processes in one sees the same."""
    words = (*TINY, f"data.dir={data}", "model.norm=layer", "model.mixer.reparam=false", "model.dropout=0.1")
    assert launch(*words, f"runs={tmp_path / 'parts'}", "trainer.accumulate=2").status == 0
    assert finish(start((*words, f"runs={tmp_path / 'pair'}"), tmp_path), tmp_path) == [0, 0], logs(tmp_path)
    assert_close(only_run(tmp_path / "parts"), only_run(tmp_path / "pair"))


def test_parts_and_processes_weigh_by_their_targets(data: str, tmp_path: Path) -> None:
    """Records with one target and with five, which do not fall evenly into parts: as one batch all the same."""
    mix = "task.train=150 of 1 in 24, 150 of 5 in 24"
    words = ("task=recall", "preset=tiny", mix, "data.pool=1", "optimizer.eps=1e-4", f"data.dir={data}")
    words += ("trainer.max_steps=4", "trainer.batch_size=8", "trainer.threads=1")
    for name, more in {"whole": (), "parts": ("trainer.accumulate=4",)}.items():
        assert launch(*words, *more, f"runs={tmp_path / name}").status == 0
    assert finish(start((*words, f"runs={tmp_path / 'pair'}"), tmp_path), tmp_path) == [0, 0], logs(tmp_path)
    assert_close(only_run(tmp_path / "parts"), only_run(tmp_path / "whole"))
    assert_close(only_run(tmp_path / "pair"), only_run(tmp_path / "whole"))


def join_group_and_get_a_signal(rank: int, *group: int) -> None:
    """The second process alone is asked to stop, in step 3."""
    join_group(rank, *group)
    if rank == 1:
        in_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


def test_a_signal_to_one_stops_both_and_both_go_on(data: str, pair: Path, tmp_path: Path) -> None:
    words = (*PAIR, f"data.dir={data}", f"runs={tmp_path}", "resume=auto")
    both = start(words, tmp_path, join_group_and_get_a_signal)
    assert finish(both, tmp_path) == [128 + signal.SIGTERM, 0], logs(tmp_path)
    assert "stopped (SIGTERM) at step 3; saved" in (tmp_path / "rank0.log").read_text()
    assert finish(start(words, tmp_path), tmp_path) == [0, 0], logs(tmp_path)
    assert_equal(left_by(only_run(tmp_path)), left_by(pair))


def test_a_launcher_with_another_number_of_processes(data: str, tmp_path: Path) -> None:
    words = (*PAIR, f"data.dir={data}", f"runs={tmp_path}")
    process = fork(words, tmp_path / "rank0.log", join_group, 0, free_port())
    process.join(60)
    assert process.exitcode == 2
    assert "expected trainer.devices x trainer.num_nodes = 2, the processes that torchrun started" in logs(tmp_path)


@pytest.mark.slow
def test_both_killed_at_random_moments(data: str, pair: Path, tmp_path: Path) -> None:
    """Four kills in one run, wherever they fall between its start and its end."""
    draw = random.Random(0)
    runs = tmp_path / "runs"
    words = (*PAIR, f"data.dir={data}", f"runs={runs}", "resume=auto", "trainer.checkpoint_every=1")
    begun = time.monotonic()
    assert finish(start(words, tmp_path), tmp_path) == [0, 0], logs(tmp_path)
    longest, kills = time.monotonic() - begun, 0
    for _ in range(60):
        if kills == 0:
            shutil.rmtree(runs, ignore_errors=True)  # the one of before had ended
        both = start(words, tmp_path)
        after = draw.uniform(0, longest)
        both[0].join(after)
        for process in both:
            process.kill()
            process.join()
        if both[0].exitcode == -signal.SIGKILL:
            kills += 1
        else:
            longest, kills = longest if kills else after, 0  # a whole run takes less than that
        if kills == 4:
            break
    assert kills == 4, logs(tmp_path)
    assert finish(start(words, tmp_path), tmp_path) == [0, 0], logs(tmp_path)
    assert_equal(left_by(only_run(tmp_path)), left_by(pair))


def command(launcher: list[str], words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, "-m", "chela.train", *words, "trainer.devices=2"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"],
    ],
    ids=["devices", "torchrun"],
)
def test_as_a_person_starts_it(launcher: list[str], alone: Path, data: str, tmp_path: Path) -> None:
    words = (*PAIR, f"data.dir={data}", f"runs={tmp_path}", "resume=auto")
    stopped = command(launcher, (*words, "trainer.max_time=0s"))
    assert stopped.returncode == 0 and "at step 1; saved" in stopped.stdout, stopped.stderr
    done = command(launcher, words)
    assert done.returncode == 0 and done.stdout.count("test accuracy") == 1, done.stderr
    assert_close(only_run(tmp_path), alone)
    again = command(launcher, words)  # a finished run is reported by the first process, and the second waits for nobody
    assert again.returncode == 0 and again.stdout.count("test accuracy") == 1, again.stderr


@pytest.mark.slow
def test_two_nodes(alone: Path, data: str, tmp_path: Path) -> None:
    """As torchrun starts them on two machines, of which only the first one's folder is ever written to."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=tests"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous]
    nodes = []
    for name in ("one", "other"):
        words = (*PAIR, f"data.dir={data}", f"runs={tmp_path / name}", "trainer.num_nodes=2")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*torchrun, "-m", "chela.train", *words]
        nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment))
    printed = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    (run,) = {path.parent for path in tmp_path.rglob("result.json")}
    assert_close(run, alone)
    assert sum(b"test accuracy" in out for out, _ in printed) == 1


def join_group_and_diverge(rank: int, *group: int) -> None:
    """The loss of the second process alone is no number at step 6."""
    join_group(rank, *group)
    plain = LitModel.training_step

    def training_step(self: LitModel, batch: Any, batch_idx: int) -> Any:
        out = plain(self, batch, batch_idx)
        return out * float("nan") if rank == 1 and self.step == 5 else out

    LitModel.training_step = training_step  # type: ignore[method-assign]


def join_group_and_have_no_account(rank: int, *group: int) -> None:
    """Weights & Biases, which the first process alone talks to, refuses."""
    join_group(rank, *group)

    def refuse(*_: Any) -> Any:
        raise UsageError("wandb=true: expected to begin a run, got: no account")

    sys.modules.setdefault("wandb", sys)  # installed, as far as importlib can tell
    metrics.open_wandb = refuse


def join_group_and_write_no_line(rank: int, *group: int) -> None:
    """No room is left for the third line of ``metrics.csv``, which the first process alone writes."""
    join_group(rank, *group)
    plain, calls = metrics.append, [0]

    def append(path: Path, *row: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        plain(path, *row)

    metrics.append = append


@pytest.mark.parametrize(
    ("join", "status", "said"),
    [
        (join_group_and_diverge, 3, "error: step 6: expected finite numbers, "),
        (join_group_and_have_no_account, 2, "error: wandb=true: expected to begin a run"),
        (join_group_and_write_no_line, 2, "metrics.csv); mend it, then resume"),
    ],
)
def test_what_happens_to_one_ends_both(
    join: Callable[..., None], status: int, said: str, data: str, tmp_path: Path
) -> None:
    wandb = f"wandb={'wandb' in said}".lower()
    both = start((*PAIR, f"data.dir={data}", f"runs={tmp_path}", wandb), tmp_path, join)
    assert finish(both, tmp_path) == [status, 0], logs(tmp_path)
    assert logs(tmp_path).count(said) == logs(tmp_path).count("error: ") == 1
    assert "Traceback" not in logs(tmp_path)


def join_group_and_fill_the_disk(rank: int, *group: int) -> None:
    """No room is left for the second checkpoint, which the first process alone writes."""
    join_group(rank, *group)
    plain, calls = checkpoint.save, [0]

    def save(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise UsageError("could not write it (No space left on device)")
        plain(*arguments, **options)

    checkpoint.save = save


def test_a_full_disk_of_one_ends_both_and_both_go_on(data: str, pair: Path, tmp_path: Path) -> None:
    words = (*PAIR, f"data.dir={data}", f"runs={tmp_path}", "resume=auto")
    both = start(words, tmp_path, join_group_and_fill_the_disk)
    assert finish(both, tmp_path) == [2, 0], logs(tmp_path)
    assert logs(tmp_path).count("error: ") == 1 and "No space left on device" in logs(tmp_path)
    assert "Traceback" not in logs(tmp_path)
    assert finish(start(words, tmp_path), tmp_path) == [0, 0], logs(tmp_path)
    assert_equal(left_by(only_run(tmp_path)), left_by(pair))
