import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from chela.core.errors import DataError, UsageError
from lra.builder import MANIFEST, Example, RecordSet, RecordSpec, check, prepare

SPEC = RecordSpec("lra_test", "tiny", "1.0.0", ("tokens",), {"train": 30, "test": 5})


def splits(spec: RecordSpec = SPEC, pause: float = 0.0) -> Mapping[str, Iterator[Example]]:
    def examples(n: int) -> Iterator[Example]:
        for i in range(n):
            time.sleep(pause)
            yield Example({"tokens": np.arange(i + 1, dtype=np.uint8)}, i % 3, (i + 1,))

    return {split: examples(n) for split, n in spec.counts.items()}


def names(root: Path) -> set[str]:
    return {p.name for p in (root / "lra_test" / "tiny").iterdir()} - {".1.0.0.lock"}


def test_records_come_back_in_order_with_sizes_and_labels(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, splits)
    assert folder == tmp_path / "lra_test" / "tiny" / "1.0.0"
    records = RecordSet(folder, "train")
    assert len(records) == 30
    assert records.sizes["length"].tolist() == list(range(1, 31))
    assert records.labels.tolist() == [i % 3 for i in range(30)]
    for i, record in zip((7, 0, 29), records.read([7, 0, 29]), strict=True):
        assert record["tokens"].tolist() == list(range(i + 1)) and record["label"] == i % 3
    assert check(folder, SPEC.counts, full=True)["counts"] == {"train": 30, "test": 5}


def test_a_plain_tensorflow_datasets_user_can_read_them(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(prepare(tmp_path, SPEC, splits)))
    assert builder.info.splits["train"].num_examples == 30
    assert builder.as_data_source("test")[4]["tokens"].tolist() == [0, 1, 2, 3, 4]
    assert "tensorflow" not in sys.modules


def raising(error: BaseException) -> Iterator[Example]:
    yield from list(splits()["train"])[:9]
    raise error


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda: Path("/no/where").read_bytes(), DataError, "/no/where: No such file or directory, while .* is built"),
        (lambda: {"train": list(splits()["train"])[:29]}, DataError, "train has 29 records, expected 30"),
        (lambda: {"train": raising(RuntimeError("odd"))}, RuntimeError, "odd"),
        (lambda: {"train": raising(KeyboardInterrupt())}, KeyboardInterrupt, None),
    ],
)
def test_a_failed_build_leaves_nothing_and_keeps_its_error(tmp_path: Path, broken, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        prepare(tmp_path, SPEC, broken)
    assert not (tmp_path / "lra_test" / "tiny").exists() or names(tmp_path) == set()
    prepare(tmp_path, SPEC, splits)
    prepare(tmp_path, SPEC, lambda: pytest.fail("built again"))


@pytest.mark.parametrize("change", ["cut", "gone", "counts", "manifest", "no manifest", "older"])
def test_damage_is_seen_and_nothing_is_deleted(tmp_path: Path, change: str) -> None:
    folder = prepare(tmp_path, SPEC, splits)
    (big,) = folder.glob("*train.array_record*")
    manifest = json.loads((folder / MANIFEST).read_text())
    if change == "cut":
        os.truncate(big, big.stat().st_size - 1)
    elif change == "gone":
        big.unlink()
    elif change == "manifest":
        (folder / MANIFEST).write_text("{")
    elif change == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        manifest |= {"counts": {"train": 29, "test": 5}} if change == "counts" else {"format_version": 0}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(DataError) as error:
        prepare(tmp_path, SPEC, splits)
        RecordSet(folder, "train")
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and "delete" in str(error.value)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_changed_byte_in_a_record_is_named(tmp_path: Path) -> None:
    folder = prepare(tmp_path, SPEC, splits)
    (big,) = folder.glob("*train.array_record*")
    raw = bytearray(big.read_bytes())
    raw[at if (at := raw.find(bytes(range(1, 25)))) >= 0 else 65_736] ^= 0xFF  # of a compressed chunk any will do
    big.write_bytes(raw)
    with pytest.raises(DataError, match="SHA-256"):
        check(folder, SPEC.counts, full=True)
    with pytest.raises(DataError, match=r"(record \d+ of split train|train cannot be read|records)"):
        RecordSet(folder, "train").read(range(30))


def _build(root: str, pause: float) -> None:
    prepare(Path(root), SPEC, lambda: splits(pause=pause))


def test_two_builds_at_once_make_one(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    other = spawn.Process(target=_build, args=(str(tmp_path), 0.05))
    other.start()
    lock = tmp_path / "lra_test" / "tiny" / ".1.0.0.lock"
    while not lock.exists():
        time.sleep(0.01)
    folder = prepare(tmp_path, SPEC, lambda: pytest.fail("built twice"))
    other.join()
    assert other.exitcode == 0
    assert len(RecordSet(folder, "train")) == 30


def test_kill_during_a_build_leaves_nothing_trusted(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    other = spawn.Process(target=_build, args=(str(tmp_path), 0.2))
    other.start()
    building = tmp_path / "lra_test" / "tiny" / ".1.0.0.building"
    while not building.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(other.pid, signal.SIGKILL)  # type: ignore[arg-type]
    other.join()
    assert building.exists() and not (tmp_path / "lra_test" / "tiny" / "1.0.0").exists()
    folder = prepare(tmp_path, SPEC, splits)
    check(folder, SPEC.counts, full=True)
    assert names(tmp_path) == {"1.0.0"}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit on a file's size fails writes as a full disk does, in Python and in C++."""
    code = f"""
import resource, signal, sys
import numpy as np
from pathlib import Path
from lra.builder import Example, RecordSpec, prepare
from chela.config.words import guarded
spec = RecordSpec("lra_test", "tiny", "1.0.0", ("tokens",), {{"train": 4000}})
noise = np.random.default_rng(0)
examples = (Example({{"tokens": noise.integers(0, 255, 1000).astype(np.uint8)}}, 0, (1000,)) for _ in range(4000))
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(guarded(lambda: prepare(Path({str(tmp_path)!r}), spec, lambda: {{"train": examples}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: expected a disk and folders that can be used" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert names(tmp_path) == set()


def test_a_note_after_a_build_has_no_level_before_it(tmp_path: Path) -> None:
    code = f"""
from lra.builder import Path, log, prepare
from tests.lra.test_builder import SPEC, splits
prepare(Path({str(tmp_path)!r}), SPEC, splits)
log.warning("12 of 30")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "12 of 30\n"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data.dir: expected a folder that can be written, .*\(Not a directory\)"):
        prepare(tmp_path / "file", SPEC, splits)


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_whole_set_or_none(tmp_path: Path) -> None:
    """Twenty kills spread over a build, its writing and its renaming included; every next build starts clean."""
    spawn = multiprocessing.get_context("spawn")
    whole = 0
    for kill in range(20):
        root = tmp_path / str(kill)
        other = spawn.Process(target=_build, args=(str(root), 0.005))
        other.start()
        while not (root / "lra_test" / "tiny" / ".1.0.0.lock").exists():
            time.sleep(0.001)
        time.sleep(0.05 * kill)
        os.kill(other.pid, signal.SIGKILL)  # type: ignore[arg-type]
        other.join()
        whole += (root / "lra_test" / "tiny" / "1.0.0").exists()
        check(prepare(root, SPEC, splits), SPEC.counts, full=True)
        assert names(root) <= {"1.0.0", ".1.0.0.building"}  # the emptied shell, when killed after the renaming
    assert 0 < whole < 20, "the kills missed the build"
