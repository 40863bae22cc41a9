import hashlib
from pathlib import Path

import numpy as np
import pytest

from chela.core.errors import DataError
from chela.core.files import sha256
from lra.source import DataConfig, Layout, Remote
from lra.tasks import image
from lra.tasks.image import Image
from tests.lra.test_source import archive

SMALL = 20  # images a batch


Batches = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Six batches of 20 images, and the digest that these have."""
    noise = np.random.default_rng(0)
    made = {
        name: (noise.integers(0, 10, SMALL).astype(np.uint8), noise.integers(0, 256, (SMALL, 3072)).astype(np.uint8))
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    }
    parts = ((part, names) for names in (list(made)[:5], ["test_batch"]) for part in (0, 1))
    whole = hashlib.sha256(b"".join(made[name][part].tobytes() for part, names in parts for name in names))
    monkeypatch.setattr(image, "_BATCH", SMALL)
    monkeypatch.setattr(image, "COUNTS", {"train": 5 * SMALL, "test": SMALL})
    monkeypatch.setattr(image, "CONTENT", whole.hexdigest())
    return made


def binary(made: Batches) -> dict[str, bytes]:
    return {f"{n}.bin": np.concatenate([labels[:, None], pixels], 1).tobytes() for n, (labels, pixels) in made.items()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_records_do_not_depend_on_the_form_they_came_in(
    tmp_path: Path, batches: Batches, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    if form == "folder":
        write(mine / "cifar-10-batches-bin", binary(batches))
    else:
        mine.mkdir()
        files = {f"cifar-10-batches-bin/{n}": raw for n, raw in binary(batches).items()}
        path = archive(mine / "cifar-10-binary.tar.gz", files | {"cifar-10-batches-bin/batches.meta.txt": b"dog"})
        remote = Remote(path.name, "", path.stat().st_size, sha256(path))
        monkeypatch.setattr(image, "LAYOUTS", (Layout("the archive", path.name, remote),))
    task = Image(validation=10)
    task.prepare(DataConfig(dir=str(tmp_path / "records"), root=str(mine)))
    records = task.records("train")
    assert records.labels.tolist() == np.concatenate([batches[f"data_batch_{i}"][0] for i in range(1, 6)]).tolist()
    for i, record in zip((0, 47, 99), records.read([0, 47, 99]), strict=True):
        planes = batches[f"data_batch_{i // SMALL + 1}"][1][i % SMALL].reshape(3, 1024)
        assert np.array_equal(record["pixels"].reshape(1024, 3).T, planes)
    assert len(task.dataset("train")) == 90 and len(task.dataset("validation")) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("size", r"data_batch_2.bin has 61,459 bytes, expected 61,460: it is truncated or another file"),
        ("missing", r"test_batch.bin is missing: expected six batches"),
        ("content", r"this is not the content of the release"),
    ],
)
def test_bad_batches_are_named(tmp_path: Path, batches: Batches, change: str, message: str) -> None:
    folder = write(tmp_path / "cifar-10-batches-bin", binary(batches))
    bad = folder / "data_batch_2.bin"
    if change == "size":
        bad.write_bytes(bad.read_bytes()[:-1])
    elif change == "missing":
        (folder / "test_batch.bin").unlink()
    else:
        bad.write_bytes(bad.read_bytes()[::-1])
    with pytest.raises(DataError, match=message):
        Image().prepare(DataConfig(dir=str(tmp_path / "r"), root=str(tmp_path)))
    assert not list((tmp_path / "r").rglob("*.array_record*"))


def test_the_truncated_official_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="has 2 bytes, expected 170,052,171"):
        Image().prepare(DataConfig(dir=str(tmp_path / "r"), root=str(tmp_path)))


def gray(rgb: np.ndarray) -> np.ndarray:
    """As Pillow's mode ``L`` rounds it (ITU-R 601)."""
    red, green, blue = (rgb[..., i].astype(np.uint32) for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


def test_encodings() -> None:
    record = {"pixels": np.arange(3072).astype(np.uint8)}
    levels = gray(record["pixels"].reshape(32, 32, 3)).reshape(-1)
    s4, mega = Image(), Image(normalization="mega")
    assert s4.vocab_size is None and s4.input_dim == 1 and s4.l_max == 1024
    np.testing.assert_allclose(s4.encode(record)[:, 0], (levels / 255 - 122.6 / 255) / (61 / 255), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mega.encode(record)[:, 0], (levels / 255 - 0.48) / 0.24, rtol=1e-5, atol=1e-6)
    small = Image(resolution=16, normalization="mega")
    mean = levels.reshape(32, 32)[:2, 2:4].mean()
    assert small.l_max == 256 and small.encode(record).dtype == np.float32
    np.testing.assert_allclose(small.encode(record)[1, 0], (mean / 255 - 0.48) / 0.24, rtol=1e-5)
    with pytest.raises(ValueError, match=r"3,071|3071"):
        s4.encode({"pixels": record["pixels"][1:]})


def test_facts_of_the_real_images(real_image: DataConfig) -> None:
    task = Image()
    task.prepare(real_image)
    records = task.records("train")
    assert records.labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert np.bincount(records.labels).tolist() == [5000] * 10
    assert real_image.root is not None
    rows = image.read_batches(Path(real_image.root) / "cifar-10-batches-bin" / "test_batch.bin")["train"]
    levels = gray(rows[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1))
    assert f"{levels.mean():.2f} {levels.std():.2f}" == "122.62 60.99"
    for i, record in zip((0, 17, 49_999), records.read([0, 17, 49_999]), strict=True):
        np.testing.assert_allclose(task.encode(record)[:, 0] * 61 + 122.6, levels[i].reshape(-1), atol=1e-3)
    assert [len(task.dataset(s)) for s in ("train", "validation", "test")] == [45_000, 5_000, 10_000]
    values = np.stack([x for x, _ in task.dataset("test").read(range(1000))])
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05


def test_the_split_is_that_of_s4_and_mega() -> None:
    import torch
    from torch.utils.data import random_split

    train, held = random_split(range(50_000), [45_000, 5_000], torch.Generator().manual_seed(42))  # type: ignore[arg-type]
    kept, held_out = (Image().choose(split, "holdout")[1].tolist() for split in ("train", "validation"))
    assert kept == sorted(train.indices) and held_out == sorted(held.indices)
