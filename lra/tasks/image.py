"""Image: CIFAR-10 (Krizhevsky 2009) as a sequence of pixels, gray or RGB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lra import safe_pickle
from lra.builder import Example, Progress, RecordSet, RecordSpec, prepare
from lra.errors import DataError
from lra.schema import DataConfig, ImageConfig
from lra.source import Form, Remote, locate, members, read_tfds
from lra.tasks.base import Task, sample

ARCHIVE = Remote(
    file="cifar-10-binary.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
CONTENT = "0986e276e9a4dec8e941838372dcbefcbeb082320f292968919ddc5b333e15d7"
"""SHA-256 of labels and pixels of all images in the official order."""

COUNTS = {"train": 50_000, "test": 10_000}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BINARY = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_PYTHON = {split: [name.removesuffix(".bin") for name in names] for split, names in _BINARY.items()}
_BATCH = 10_000
_ROW = 1 + 3072

Images = dict[str, tuple[np.ndarray, np.ndarray]]
"""By split: labels uint8 `(N,)` and pixels uint8 `(N, 3, 32, 32)`, in the official order."""


def _binary(raw: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    if len(raw) != _BATCH * _ROW:
        raise DataError(f"{name} has {len(raw):,} bytes, expected {_BATCH * _ROW:,}: it is truncated or another file")
    rows = np.frombuffer(raw, np.uint8).reshape(_BATCH, _ROW)
    return rows[:, 0], rows[:, 1:].reshape(_BATCH, 3, 32, 32)


def _python(raw: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the Python version, read without running the pickle (`lra.safe_pickle`)."""
    try:
        batch = safe_pickle.read(raw)
        _, shape, _, _, pixels = batch["data"].state
        if isinstance(pixels, str):  # a byte string of Python 2
            pixels = pixels.encode("latin-1")
        labels = np.array(batch["labels"], np.uint8)
        if tuple(shape) != (_BATCH, 3072) or labels.shape != (_BATCH,):
            raise ValueError(f"{shape} pixels and {labels.shape} labels")
        return labels, np.frombuffer(pixels, np.uint8).reshape(_BATCH, 3, 32, 32)
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{name} is no batch of the Python version of CIFAR-10: {error}") from None


def _join(parts: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> Images:
    return {split: (np.concatenate([x for x, _ in p]), np.concatenate([x for _, x in p])) for split, p in parts.items()}


def _read_folder(base: Path, folder: str, names: dict[str, list[str]], parse: Any) -> Images:
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for split, files in names.items():
        for name in files:
            path = base / folder / name
            if not path.is_file():
                raise DataError(f"{path} is missing: expected the six batches of CIFAR-10; unpack the archive again")
            parts.setdefault(split, []).append(parse(path.read_bytes(), str(path)))
    return _join(parts)


def _read_binary(base: Path) -> Images:
    return _read_folder(base, "cifar-10-batches-bin", _BINARY, _binary)


def _read_python(base: Path) -> Images:
    return _read_folder(base, "cifar-10-batches-py", _PYTHON, _python)


def _read_archive(archive: Path, names: dict[str, list[str]], parse: Any) -> Images:
    wanted = {name for files in names.values() for name in files}
    found = {}
    for name, raw in members(archive, lambda name: name.rsplit("/", 1)[-1] in wanted):
        found[name.rsplit("/", 1)[-1]] = parse(raw, f"{name} in {archive}")
    missing = sorted(wanted - set(found))
    if missing:
        raise DataError(f"{archive} lacks {', '.join(missing)}: fetch it again")
    return _join({split: [found[name] for name in files] for split, files in names.items()})


def _read_binary_archive(archive: Path) -> Images:
    return _read_archive(archive, _BINARY, _binary)


def _read_python_archive(archive: Path) -> Images:
    return _read_archive(archive, _PYTHON, _python)


def _read_prepared(info: Path) -> Images:
    """A prepared directory is shuffled; its ids `train_00001` … give the official order back."""
    images: Images = {}
    for split, number in COUNTS.items():
        labels, pixels = np.zeros(number, np.uint8), np.zeros((number, 3, 32, 32), np.uint8)
        seen = 0
        for _, record in read_tfds(info, [split]):
            place = int(bytes(record["id"]).decode().rsplit("_", 1)[1])
            if place >= number:
                raise DataError(f"{info.parent}: id {record['id']!r} is out of range: prepare it again")
            labels[place], pixels[place] = record["label"], record["image"].transpose(2, 0, 1)
            seen += 1
        if seen != number:
            raise DataError(f"{info.parent}: {split} has {seen:,} images, expected {number:,}: prepare it again")
        images[split] = labels, pixels
    return images


FORMS = (
    Form("the binary version", "cifar-10-batches-bin/data_batch_1.bin", _read_binary),
    Form("the Python version", "cifar-10-batches-py/data_batch_1", _read_python),
    Form("the binary archive", ARCHIVE.file, _read_binary_archive, file=True, remote=ARCHIVE),
    Form("the Python archive", "cifar-10-python.tar.gz", _read_python_archive, file=True),
    Form("a prepared directory", "cifar10/*/dataset_info.json", _read_prepared, file=True),
)


def _checked(images: Images, where: str) -> str:
    whole = hashlib.sha256()
    for split in COUNTS:
        labels, pixels = images[split]
        whole.update(labels.tobytes())
        whole.update(pixels.tobytes())
    if whole.hexdigest() != CONTENT:
        raise DataError(
            f"image: {where} does not hold the images of CIFAR-10 (digest {whole.hexdigest()[:12]}…, expected "
            f"{CONTENT[:12]}…): fetch {ARCHIVE.url} again"
        )
    return whole.hexdigest()


def gray(rgb: np.ndarray) -> np.ndarray:
    """Gray levels as Pillow's mode `L` rounds them (ITU-R 601), uint8.

    Args:
        rgb: uint8 `(..., 3)`.

    >>> gray(np.array([[255, 255, 255], [255, 0, 0], [0, 1, 2]], np.uint8)).tolist()
    [255, 76, 1]
    """
    red, green, blue = (rgb[..., i].astype(np.uint32) for i in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


_GRAY_STATISTICS = {"s4": (122.6 / 255, 61.0 / 255), "mega": (0.48, 0.24)}
_RGB_STATISTICS = {"s4": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), "mega": (0.48, 0.24)}


class Image(Task):
    """Ten classes. `gray` and `rgb` give float32 `(L, 1)` and `(L, 3)`; `tokens` gives ids 1 … 256 (gray level + 1)."""

    name = "image"
    version = "1.0.0"
    num_classes = 10

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.l_max = config.resolution**2
        self.vocab_size = 257 if config.form == "tokens" else None
        self.input_dim = 3 if config.form == "rgb" else 1
        statistics = _RGB_STATISTICS if config.form == "rgb" else _GRAY_STATISTICS
        mean, deviation = statistics[config.normalization]
        self._mean, self._deviation = np.asarray(mean, np.float32), np.asarray(deviation, np.float32)

    def _build(self, data: DataConfig, progress: Progress | None) -> Path:
        spec = RecordSpec(
            name="lra_image",
            config="rgb",
            version=self.version,
            fields=("pixels",),
            counts=COUNTS,
            sizes=("pixels",),
            expected_bytes=450_000_000,
        )

        def splits() -> dict[str, Iterator[Example]]:
            form, path = locate(self.name, data, FORMS, progress)
            images: Images = form.read(path)
            spec.about["origin"] = f"{form.name}: {path}"
            spec.about["content_sha256"] = _checked(images, str(path))
            return {split: _examples(*images[split]) for split in COUNTS}

        return prepare(data.folder(), spec, splits, progress)

    def encode(self, record: dict[str, Any]) -> np.ndarray:
        """Pixels row by row, as the configuration wants them."""
        pixels: np.ndarray = record["pixels"]
        if pixels.size != 3072:
            raise ValueError(f"the image has {pixels.size} values, expected 3,072 (32 × 32 × 3)")
        image = pixels.reshape(32, 32, 3)
        values = image if self.config.form == "rgb" else gray(image)[..., None]
        side = self.config.resolution
        if side < 32:
            block = 32 // side
            values = values.reshape(side, block, side, block, -1).mean((1, 3), dtype=np.float32)
        values = values.reshape(side * side, -1)
        if self.config.form == "tokens":
            tokens: np.ndarray = np.rint(values[:, 0]).astype(np.int64) + 1
            return tokens
        normalized: np.ndarray = (values.astype(np.float32) / 255 - self._mean) / self._deviation
        return normalized

    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """All the same."""
        return np.full(len(records), self.l_max, np.int64)

    def _choose(self, split: str, policy: str) -> tuple[str, np.ndarray | None]:
        if split == "test":
            return "test", sample(np.arange(COUNTS["test"]), self.config.test)
        train, held = holdout(COUNTS["train"], self.config.validation)
        return ("train", held) if split == "validation" else ("train", sample(train, self.config.train))


def holdout(n: int, held: int) -> tuple[np.ndarray, np.ndarray]:
    """The split that S4 and MEGA make: torch's `random_split` with a generator seeded 42; each part in stored order."""
    import torch

    order = torch.randperm(n, generator=torch.Generator().manual_seed(42)).numpy()
    return np.sort(order[: n - held]), np.sort(order[n - held :])


def _examples(labels: np.ndarray, pixels: np.ndarray) -> Iterator[Example]:
    for label, image in zip(labels.tolist(), pixels, strict=True):
        yield Example({"pixels": np.ascontiguousarray(image.transpose(1, 2, 0)).reshape(-1)}, label, (image.size,))


def make(config: ImageConfig) -> Image:
    """The task of a configuration."""
    return Image(config)
