"""Pathfinder and Path-X: do two marked tips lie on one dashed path? The picture as a sequence of pixels."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lra import released_pathfinder as release
from lra.builder import MANIFEST, Example, Progress, RecordSet, RecordSpec, check, prepare
from lra.errors import DataError
from lra.generators.pathfinder import VERSION, generate
from lra.schema import DataConfig, PathfinderConfig
from lra.source import digest
from lra.tasks.base import Task, sample

BLOCK = 512  # images of a part: what a killed build loses at most, per worker
_STATISTICS = {"s4": (0.0, 1.0), "mega": (0.5, 0.5)}
_NUMBER = np.dtype("<i8")


class Pathfinder(Task):
    """Two classes. `gray` gives float32 `(L, 1)`, `tokens` ids 1 … 256 (gray level + 1); L = resolution².

    Records hold `pixels`, row by row, and `number`: which image of the seed, or row of the release, it is.
    """

    version = VERSION
    num_classes = 2

    def __init__(self, config: PathfinderConfig) -> None:
        super().__init__()
        self.config = config
        self.name = config.name
        self.l_max = config.resolution**2
        self.vocab_size = 257 if config.form == "tokens" else None
        self._wanted = {"train": config.train, "validation": config.validation, "test": config.test}
        self._mean, self._deviation = (np.float32(x) for x in _STATISTICS[config.normalization])

    def _build(self, data: DataConfig, progress: Progress | None) -> Path:
        if data.root is not None:
            return self._build_released(data, progress)
        self.note = "images of this program's generator with LRA's stated parameters or the task's own, not LRA's files"
        options = self.config.options()
        c = self.config
        deciding = json.dumps(asdict(options), sort_keys=True)
        choice = hashlib.sha256(deciding.encode()).hexdigest()[:10]
        spec = RecordSpec(
            name="lra_pathfinder",
            config=f"r{c.resolution}_{c.level}_n{c.train}-{c.validation}-{c.test}_seed{c.seed}_{choice}",
            version=self.version,
            fields=("pixels", "number"),
            counts=self._wanted,
            about={"origin": "generated", "options": asdict(options), "seed": c.seed},
            expected_bytes=sum(self._wanted.values()) * (2 * self.l_max // 5 + 200),
        )
        parts = spec.folder(data.folder()).parent / f".{spec.version}.parts"

        def splits() -> dict[str, Iterator[Example]]:
            bounds = np.cumsum([0, *self._wanted.values()]).tolist()
            return {
                split: self._generated(parts, bounds[k], bounds[k + 1], data.processes)
                for k, split in enumerate(self._wanted)
            }

        folder = prepare(data.folder(), spec, splits, progress)
        shutil.rmtree(parts, ignore_errors=True)
        return folder

    def _generated(self, parts: Path, start: int, end: int, threads: int) -> Iterator[Example]:
        """Images `start` … `end - 1`, drawn ahead by threads; each block is kept until the build is whole."""
        threads = threads or os.cpu_count() or 1
        parts.mkdir(parents=True, exist_ok=True)
        make = partial(_part, parts, self.config)
        waiting: deque[tuple[int, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for first in range(start, end, BLOCK):
                    waiting.append((first, pool.submit(make, first, min(BLOCK, end - first))))
                    if len(waiting) > 2 * threads:
                        yield from _examples(*_done(waiting.popleft()))
                while waiting:
                    yield from _examples(*_done(waiting.popleft()))
            finally:
                for _, future in waiting:
                    future.cancel()

    def _build_released(self, data: DataConfig, progress: Progress | None) -> Path:
        c = self.config
        source = release.find(self.name, c.resolution, c.level, data).resolve()
        spec = RecordSpec(
            name="lra_pathfinder",
            config=f"released_r{c.resolution}_{c.level}_{digest(source)}",
            version=self.version,
            fields=("pixels", "number"),
            counts={},
            about={"origin": f"LRA's release: {source}"},
        )
        folder = spec.folder(data.folder())
        if (folder / MANIFEST).is_file():
            check(folder)
            return folder
        images, empty = release.present(release.listing(source))
        if len(images) < 10:
            raise DataError(f"{source} lists {len(images)} images, expected 10 at the least: unpack the release again")
        numbers = {image: i for i, image in enumerate(images)}
        parts = release.split(images)
        spec.about["empty"] = [str(image.path.relative_to(source)) for image in empty]
        spec = RecordSpec(**{**vars(spec), "counts": {name: len(part) for name, part in parts.items()}})

        def splits() -> dict[str, Iterator[Example]]:
            return {name: self._released(part, numbers) for name, part in parts.items()}

        return prepare(data.folder(), spec, splits, progress)

    def _released(self, images: list[release.Listed], numbers: dict[release.Listed, int]) -> Iterator[Example]:
        for image in images:
            yield _example(release.read(image, self.config.resolution), image.label, numbers[image])

    def encode(self, record: dict[str, Any]) -> np.ndarray:
        """Pixels row by row, as the configuration wants them."""
        pixels: np.ndarray = record["pixels"]
        if pixels.size != self.l_max:
            raise ValueError(f"the image has {pixels.size:,} pixels, expected {self.l_max:,}")
        if self.config.form == "tokens":
            return pixels.astype(np.int64) + 1
        values: np.ndarray = (pixels.astype(np.float32)[:, None] / 255 - self._mean) / self._deviation
        return values

    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """All the same."""
        return np.full(len(records), self.l_max, np.int64)

    def _choose(self, split: str, policy: str) -> tuple[str, np.ndarray | None]:
        stored = len(self.records(split))
        if stored <= self._wanted[split]:
            return split, None
        return split, sample(np.arange(stored), self._wanted[split])


def _part(parts: Path, config: PathfinderConfig, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one block: from the part an earlier build left, or drawn and left for a later one."""
    path = parts / f"{first}-{first + count}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            images, labels = kept["images"], kept["labels"]
        if images.shape == (count, config.resolution, config.resolution) and labels.shape == (count,):
            return images, labels
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # not there, or cut off by a crash of the machine: draw it again
    made = generate(config.options(), config.seed, first, count)
    writing = path.with_suffix(".writing.npz")
    np.savez_compressed(writing, images=made.images, labels=made.labels)
    os.replace(writing, path)
    return made.images, made.labels


def _done(part: tuple[int, Future[tuple[np.ndarray, np.ndarray]]]) -> tuple[int, np.ndarray, np.ndarray]:
    first, future = part
    return first, *future.result()


def _examples(first: int, images: np.ndarray, labels: np.ndarray) -> Iterator[Example]:
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        yield _example(image, label, first + i)


def _example(image: np.ndarray, label: int, number: int) -> Example:
    fields = {"pixels": image.reshape(-1), "number": np.frombuffer(_NUMBER.type(number).tobytes(), np.uint8)}
    return Example(fields, label, (image.size,))


def number(record: dict[str, Any]) -> int:
    """Which image of the seed, or row of the release, a stored record is."""
    return int(record["number"].view(_NUMBER)[0])


def make(config: PathfinderConfig) -> Pathfinder:
    """The task of a configuration."""
    return Pathfinder(config)
