import errno
import io
import os
import random
import resource
import shutil
import signal
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from chela.core.errors import UsageError
from chela.training import resume as checkpoint
from chela.training.log import cut_after
from chela.training.run import LAST_KEYS, RunFolder
from tests.training.launches import TINY, assert_equal, fork, in_step, launch, left_by, only_run

STATE = {"fingerprint": "abc", "step": 3, "weights": torch.arange(1000.0)}
KEYS = ("step", "weights")
COLUMNS = ("step", "split", "loss", "accuracy", "lr", "tokens_per_second", "seconds", "evaluation")


@pytest.fixture(scope="module")
def half_done(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 9, with a checkpoint of step 8 before it."""
    from chela.training.step import LitModel

    runs = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitModel, "training_step", LitModel.training_step)
        in_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert launch(*TINY, f"data.dir={data}", f"runs={runs}").status == 128 + signal.SIGTERM
    return only_run(runs)


@pytest.fixture
def run(half_done: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(half_done, tmp_path / "run")
    return RunFolder(tmp_path / "run")


# ---- one file ------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint.save(path, STATE)
    assert_equal(checkpoint.load(path, KEYS, "abc"), {"format_version": checkpoint.FORMAT_VERSION, **STATE})
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_the_one_before_is_kept(tmp_path: Path) -> None:
    last, previous = tmp_path / "last", tmp_path / "previous"
    for step in range(3):
        checkpoint.save(last, {**STATE, "step": step}, previous)
    assert checkpoint.load(last, KEYS, "abc")["step"] == 2
    assert checkpoint.load(previous, KEYS, "abc")["step"] == 1


@pytest.mark.parametrize("seed", range(10))
def test_torn_anywhere_or_changed_anywhere(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint.save(path, STATE)
    whole, draw = path.read_bytes(), random.Random(seed)
    path.write_bytes(whole[: draw.randrange(len(whole))])
    with pytest.raises(checkpoint.TornError, match="torn or foreign"):
        checkpoint.load(path, KEYS, "abc")
    start = whole.index(STATE["weights"].numpy().tobytes()[:64])  # type: ignore[attr-defined]
    at = start + draw.randrange(4000)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(checkpoint.TornError, match="torn or foreign"):
        checkpoint.load(path, KEYS, "abc")


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "torn or foreign"),
        (b"hello", "torn or foreign"),
        (b"\x80\x02cos\nsystem\n(S'touch owned'\ntR.", "torn or foreign"),
        (zipped(a=b"b"), "torn or foreign"),
        (zipped(**{"x/data.pkl": b"garbage", "x/version": b"3\n"}), "torn or foreign"),
        (saved(Evil()), "torn or foreign"),
        (saved([1, 2]), "without a format version"),
        (saved({"state_dict": {}}), "without a format version"),
        (saved({"format_version": 2}), "it lacks step, weights, fingerprint"),
    ],
)
def test_foreign_files(content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(checkpoint.TornError, match=message):
        checkpoint.load(path, KEYS, "abc")
    assert not (tmp_path / "owned").exists()


def test_another_version_or_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for version in (0, 1, 3, "3", None):
        path.write_bytes(saved({**STATE, "format_version": version}))
        with pytest.raises(UsageError, match=f"expected format version 2 in .*, got {version!r}; use the version") as e:
            checkpoint.load(path, KEYS, "abc")
        assert not isinstance(e.value, checkpoint.TornError)
    path.write_bytes(saved({**STATE, "format_version": 2}))
    with pytest.raises(UsageError, match=r"of this run's configuration .abd. at .*, got one of another .abc."):
        checkpoint.load(path, KEYS, "abd")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    checkpoint.save(path, STATE, previous)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(
            UsageError, match=r"could not write .*last.ckpt \(No space left on device\); what was saved"
        ):
            checkpoint.save(path, {**STATE, "step": 4}, previous)
    assert checkpoint.load(path, KEYS, "abc")["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems refuse it of a folder, and only there may the refusal be passed over."""
    refused = stat.S_ISDIR
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(tmp_path / "last.ckpt", STATE)
    assert checkpoint.load(tmp_path / "last.ckpt", KEYS, "abc")["step"] == 3
    refused = stat.S_ISREG
    with pytest.raises(UsageError, match="Invalid argument"):
        checkpoint.save(tmp_path / "last.ckpt", {**STATE, "step": 4})


# ---- a run ---------------------------------------------------------------------------------------------------------


def goes_on(run: RunFolder) -> Any:
    ended = launch(f"resume={run.path}")
    assert ended.status == 0, ended.err
    return ended


def test_a_torn_checkpoint_gives_way_to_the_one_before(run: RunFolder, straight: dict[str, Any]) -> None:
    """Whatever is torn is seen: test_torn_anywhere_or_changed_anywhere."""
    run.last.write_bytes(run.last.read_bytes()[:-1])
    said = goes_on(run).out
    assert "torn or foreign" in said and "going on from the one before it, step 8" in said
    assert_equal(left_by(run.path), straight)


def test_a_torn_checkpoint_never_pushes_out_the_good_one(
    run: RunFolder, straight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped again, between the renames of the first save after a torn file: the good one must still be there."""
    run.last.write_bytes(run.last.read_bytes()[:1000])
    with monkeypatch.context() as patch:
        plain = os.replace

        def replace(old: Any, new: Any) -> None:
            if str(new).endswith("last.ckpt") and ".tmp" in str(old):
                raise KeyboardInterrupt  # before the new file takes its place
            plain(old, new)

        patch.setattr(os, "replace", replace)
        assert launch(f"resume={run.path}").status == 130
    goes_on(run)
    assert_equal(left_by(run.path), straight)


def test_both_torn(run: RunFolder) -> None:
    for path in (run.last, run.previous):
        path.write_bytes(path.read_bytes()[:-1])
    ended = launch(f"resume={run.path}")
    assert ended.status == 2
    assert "no checkpoint in" in ended.error and "start a new run" in ended.error


def test_no_checkpoint_yet(run: RunFolder, straight: dict[str, Any]) -> None:
    """As after a kill before the first one, its folder included: it begins anew, and says so."""
    shutil.rmtree(run.last.parent)
    assert "no checkpoint yet: from the first step" in goes_on(run).out
    assert_equal(left_by(run.path), straight)


def test_a_checkpoint_of_another_format_version(run: RunFolder) -> None:
    """Refused, not passed over: the one before it is of a run that was shorter."""
    before = run.metrics.read_bytes()
    state = torch.load(run.last, weights_only=True)
    run.last.write_bytes(saved({**state, "format_version": 99}))
    ended = launch(f"resume={run.path}")
    assert ended.status == 2
    assert ended.error.startswith(f"resume: expected format version {checkpoint.FORMAT_VERSION} in {run.last}, got 99")
    assert run.metrics.read_bytes() == before


def test_the_checkpoint_of_another_run(run: RunFolder, data: str, tmp_path: Path) -> None:
    other = (*TINY, f"data.dir={data}", f"runs={tmp_path / 'other'}", "seed=1", "trainer.max_steps=1")
    assert launch(*other).status == 0
    shutil.copy(RunFolder(only_run(tmp_path / "other")).last, run.last)
    ended = launch(f"resume={run.path}")
    assert ended.status == 2 and "expected a checkpoint of this run's configuration" in ended.error


@pytest.mark.parametrize("part", ["model", "optimizer", "state"])
@pytest.mark.parametrize("value", [{}, None], ids=repr)
def test_a_checkpoint_without_what_the_model_needs(part: str, value: Any, run: RunFolder) -> None:
    run.last.write_bytes(saved(torch.load(run.last, weights_only=True) | {part: value}))
    ended = launch(f"resume={run.path}")
    assert ended.status == 2 and "expected the weights and optimiser of this run's model, got others" in ended.error


@pytest.mark.parametrize(
    "tail", [b"\n", b"10,tra", bytes(300), bytes(300) + b"\n", b"noted by hand\n", b"10,\0,,,,,,\n"]
)
def test_lines_that_are_none(tail: bytes, run: RunFolder) -> None:
    """What an editor or a power cut leaves behind is dropped; the other lines stay, byte by byte."""
    path = run.metrics
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(whole + tail)
    cut_after(path, 9, COLUMNS)
    assert path.read_bytes() == whole
    path.write_bytes(lines[0] + tail.rstrip() + b"\n" + b"".join(lines[1:]))
    cut_after(path, 6, COLUMNS)
    assert path.read_bytes() == b"".join([lines[0], *(x for x in lines[1:] if int(x.split(b",")[0]) <= 6)])


@pytest.mark.parametrize("content", [b"", b"step,split,lo", None])
def test_a_torn_metrics_file(content: bytes | None, run: RunFolder, straight: dict[str, Any]) -> None:
    lines = run.metrics.read_bytes()
    if content is None:  # the last line is torn and of a later step
        run.metrics.write_bytes(lines + b"10,train,2.")
        goes_on(run)
        assert_equal(left_by(run.path), straight)
    else:
        run.metrics.write_bytes(content)
        goes_on(run)
        assert run.metrics.read_text().startswith(
            "step,split,loss,accuracy,lr,tokens_per_second,seconds,evaluation\n10,train,"
        )


# ---- a full disk ---------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_a_checkpoint(
    tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += "checkpoints/.last.ckpt.tmp" in os.readlink(f"/proc/self/fd/{descriptor}")
        if calls[0] == 2:  # the second checkpoint, of step 8
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to know which file is synced")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        ended = launch(*tiny)
    assert ended.status == 2
    assert "last.ckpt (No space left on device); what was saved before is kept: make room" in ended.error
    run = RunFolder(only_run(tmp_path))
    assert checkpoint.load(run.last, LAST_KEYS, straight["result"]["fingerprint"])["step"] == 4
    goes_on(run)
    assert_equal(left_by(run.path), straight)


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond a size: the kernel then refuses to write, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize("size", [300, 1000, 20_000, 60_000])
def test_a_kernel_that_refuses_to_write(
    size: int, tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path
) -> None:
    process = fork(tiny, tmp_path / "log", limit_files, size)
    process.join(120)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and "Traceback" not in log, log
    process = fork((*tiny, "resume=auto"), tmp_path / "log")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert_equal(left_by(only_run(tmp_path)), straight)
