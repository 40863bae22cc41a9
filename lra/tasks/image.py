"""Image: CIFAR-10 (Krizhevsky 2009) as a sequence of pixels, and what all tasks of pictures share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chela.core.errors import DataError
from chela.core.options import option
from lra.builder import Example, RecordSet, RecordSpec, prepare
from lra.source import DataConfig, Layout, Remote, check_content, locate, members
from lra.tasks.base import Encoded, numbers
from lra.tasks.stored import StoredTask


class PixelTask(StoredTask):
    """Pixels as values, normalised."""

    normalization: str  # an option: of which paper
    resolution: int  # an option: pixels a side
    statistics: ClassVar[dict[str, tuple[float, float]]]  # mean and deviation of the values in each
    retired: ClassVar[dict[str, Any]] = {"form": "gray"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.l_max = self.resolution**2

    def encode_values(self, levels: np.ndarray) -> np.ndarray:
        """Return what the network sees of gray levels ``(L,)`` from 0 to 255: float32 ``(L, 1)``."""
        mean, deviation = map(np.float32, self.statistics[self.normalization])
        values: np.ndarray = (levels.astype(np.float32)[:, None] / 255 - mean) / deviation
        return values

    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """Return ``l_max`` for every record."""
        return np.full(len(records), self.l_max, np.int64)

    def read_line(self, line: str) -> Encoded:
        """Return the input that whole numbers from 0 to 255 stand for. Raises ``ValueError``."""
        values = numbers(line)
        if (values < 0).any() or (values > 255).any() or (values % 1).any():
            raise ValueError(f"expected {self.input_help}")
        return self.encode({"pixels": values.astype(np.uint8)})


def shuffled(n: int) -> np.ndarray:
    """Return the order in which torch's ``random_split`` deals out n records, with a generator seeded 42."""
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(42)).numpy()


ARCHIVE = Remote(
    file="cifar-10-binary.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
CONTENT = "0986e276e9a4dec8e941838372dcbefcbeb082320f292968919ddc5b333e15d7"
"""SHA-256 of labels and pixels of all images in the official order."""

COUNTS = {"train": 50_000, "test": 10_000}
_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_BATCH = 10_000
_ROW = 1 + 3072


def read_batches(found: Path) -> dict[str, np.ndarray]:
    """Read the six batches from an archive, or from the folder in which one of them was found.

    Returns:
        Of each split uint8 ``(N, 3073)``: in each row a label and the pixels of an image, red, green, blue.
    """
    known = [name for names in _FILES.values() for name in names]
    source = found if found.name.endswith(".tar.gz") else found.parent
    files = members(source, lambda name: name.rsplit("/", 1)[-1] in known)
    read = {name.rsplit("/", 1)[-1]: raw for name, raw in files}
    if missing := [name for name in known if name not in read]:
        raise DataError(f"{found}: {', '.join(missing)} is missing: expected six batches; fetch or unpack them again")
    for name, raw in read.items():
        if (got := len(raw)) != (size := _BATCH * _ROW):
            raise DataError(f"{found}: {name} has {got:,} bytes, expected {size:,}: it is truncated or another file")
    whole = {split: b"".join(read[name] for name in names) for split, names in _FILES.items()}
    return {split: np.frombuffer(raw, np.uint8).reshape(-1, _ROW) for split, raw in whole.items()}


LAYOUTS = (
    Layout("the binary version", "cifar-10-batches-bin/data_batch_1.bin"),
    Layout("its archive", ARCHIVE.file, ARCHIVE),
)


@dataclass
class Image(PixelTask):
    """Ten classes, gray levels."""

    normalization: str = option("s4", "'s4': mean and sd of the data; 'mega': 0.48 and 0.24", choices=("s4", "mega"))
    resolution: int = option(32, "pixels a side: 32, or 16, 8 (means of blocks of pixels)")
    train: int = option(0, "images to train on; 0: all 45,000 that are not held out", ge=0)
    validation: int = option(5_000, "training images kept apart; 5,000 are S4's and MEGA's", ge=1, le=49_999)
    test: int = option(0, "images to test on; 0: all 10,000", ge=0)

    num_classes = 10
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    statistics: ClassVar = {"s4": (122.6 / 255, 61.0 / 255), "mega": (0.48, 0.24)}
    input_help = "32 × 32 pixels row by row, gray levels or RGB values, whole numbers from 0 to 255"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution not in (32, 16, 8):
            raise ValueError(f"task.resolution: expected 32, 16 or 8, got {self.resolution}")

    def build(self, data: DataConfig) -> Path:
        """Build the records of all images, in colour."""
        spec = RecordSpec("lra_image", "rgb", self.version, ("pixels",), COUNTS, ("pixels",))

        def splits() -> dict[str, Iterable[Example]]:
            layout, path = locate(self.name, data, LAYOUTS)
            rows = read_batches(path)
            parts = (part.tobytes() for split in COUNTS for part in np.split(rows[split], [1], axis=1))
            check_content("image", parts, CONTENT, ARCHIVE)
            spec.about.update(origin=f"{layout.name}: {path}", content_sha256=CONTENT)
            return {split: map(_example, rows[split]) for split in COUNTS}

        return prepare(data.folder(), spec, splits)

    def encode(self, record: dict[str, Any]) -> Encoded:
        """Return the pixels row by row, their gray levels as Pillow's mode ``L`` rounds them."""
        pixels: np.ndarray = record["pixels"]
        if pixels.size not in (1024, 3072):  # an input line may be gray
            raise ValueError(f"the image has {pixels.size} values, expected 3,072 (32 × 32 × 3)")
        from PIL.Image import fromarray

        colours = np.broadcast_to(pixels.reshape(32, 32, -1), (32, 32, 3))
        image, side, block = np.asarray(fromarray(colours).convert("L")), self.resolution, 32 // self.resolution
        if block > 1:
            image = image.reshape(side, block, side, block).mean((1, 3), dtype=np.float32)
        return self.encode_values(image.reshape(-1))

    def choose(self, split: str, policy: str) -> tuple[str, np.ndarray]:
        """Keep the training images for validation apart that S4 and MEGA keep apart, whatever the policy."""
        if split == "test":
            return super().choose(split, policy)
        train, held = np.split(shuffled(COUNTS["train"]), [COUNTS["train"] - self.validation])
        return "train", np.sort(held if split == "validation" else train)


def _example(row: np.ndarray) -> Example:
    return Example({"pixels": row[1:].reshape(3, 1024).T.reshape(-1)}, int(row[0]), (3072,))
