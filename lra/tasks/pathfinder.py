"""Pathfinder: do two marked tips lie on one dashed path? The picture as a sequence of pixels.

A folder of LRA's release, ``pathfinder32/curv_contour_length_14`` and so on, holds ``metadata/N.npy`` and
``imgs/N/sample_M.png``. The metadata has a row per image: folder, file, number, label and the generator's parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chela.core.errors import DataError
from chela.core.options import option
from lra.builder import Example, Progress, RecordSpec, prepare
from lra.generators.pathfinder_options import PathfinderOptions
from lra.prefetch import prefetch
from lra.schema import DataConfig
from lra.source import Layout, digest, locate
from lra.tasks.base import SPLITS
from lra.tasks.image import PixelTask, shuffled

log = logging.getLogger(__name__)

BLOCK = 512  # images of a part: what a killed build loses at most, per worker
_DRAWN_FOR_ONE = 20  # of distinct ones, at most; a third is taken where paths are short
_STATISTICS = {"s4": (0.0, 1.0), "mega": (0.5, 0.5)}
_NUMBER = np.dtype("<i8")
_AGAIN = "unpack the release again"
_RETIRED = (
    "padding paddle_length paddle_thickness paddle_margins marker_radius seed_distance contour_length "
    "distractor_length continuity snake_contrasts paddle_contrasts antialias segment_retries distractor_retries "
    "single_paddles"
)
FOLDERS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}

Listed = tuple[Path, int]
"""An image of the release: its path, and its label, 1 if both markers lie on one path."""


@dataclass
class Pathfinder(PixelTask):
    """Two classes; generated, or LRA's release where ``data.root`` is set. L = resolution².

    What is not an option here has the value that LRA states for the resolution and the level
    (``lra.generators.pathfinder_options``).

    Records hold ``pixels``, row by row, and ``number``: which image of the seed, or row of the release, it is.
    """

    normalization: str = option("mega", "'mega': -1 … 1; 's4': 0 … 1; unused by tokens", choices=("s4", "mega"))
    resolution: int = option(32, "pixels a side: 32, 64, 128 or 256; 16 is our own, smaller than LRA's smallest")
    level: str = option("hard", "'easy', 'intermediate' or 'hard'; LRA's tasks are hard")
    contour_lengths: list[int] | None = option(None, "dashes of a long path, one drawn an image", neutral=None)
    distractors: int | None = option(None, "distractors to try; a distractor that finds no room is left out", ge=0)
    train: int = option(160_000, "images to train on (of a release: 80 % of what is there, at most so many)", ge=1)
    validation: int = option(20_000, "images to validate on (of a release: 10 %)", ge=1)
    test: int = option(20_000, "images to test on (of a release: 10 %)", ge=1)
    seed: int = option(0, "seed of the images; the run's own seed does not change the data", ge=0, lt=2**63)
    distinct: bool = option(False, "no image twice, and none whose label can be read both ways", neutral=False)

    num_classes = 2
    classes = ("the tips are on two paths", "the tips are on one path")
    generated = True
    grouped_by = "dashes"
    input_help = "gray levels row by row, whole numbers from 0 to 255"
    retired: ClassVar[dict[str, Any]] = dict.fromkeys(_RETIRED.split())

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options()
        self.set_pixels(self.resolution, *_STATISTICS[self.normalization])

    def options(self) -> PathfinderOptions:
        """Return the generator's parameters. Raises ``ValueError`` for what cannot be drawn."""
        try:
            options = PathfinderOptions.preset(self.resolution, self.level)
            if self.distractors is not None:
                options = replace(options, distractors=self.distractors)
            return replace(options, contour_lengths=tuple(self.contour_lengths or ()))
        except ValueError as error:
            raise ValueError(f"task.{error}") from None

    def _spec(self, config: str, counts: dict[str, int], about: dict[str, Any]) -> RecordSpec:
        fields, size = ("pixels", "number"), sum(counts.values()) * (2 * self.l_max // 5 + 200)
        sizes = ("length", "dashes") if "options" in about else ("length",)  # of a release they are not known
        return RecordSpec("lra_pathfinder", config, self.version, fields, counts, sizes, about, size)

    def build(self, data: DataConfig, progress: Progress | None) -> Path:
        """Generate the images, or read those of the release in ``data.root``."""
        if data.root is not None:
            return self._build_released(data, progress)
        self.note = "images of this program's generator with LRA's stated parameters or the task's own, not LRA's files"
        options, counts = asdict(self.options()), {split: getattr(self, split) for split in SPLITS}
        options = {name: value for name, value in options.items() if value != ()}
        choice = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:10]
        config = f"r{self.resolution}_{self.level}_n{'-'.join(map(str, counts.values()))}_seed{self.seed}_{choice}"
        config += "_distinct" if self.distinct else ""
        spec = self._spec(config, counts, {"origin": "generated", "options": options, "seed": self.seed})
        parts = spec.folder(data.folder()).parent / f".{spec.version}.parts"

        def splits() -> dict[str, Iterator[Example]]:
            parts.mkdir(parents=True, exist_ok=True)
            if self.distinct:
                drawn = range(_DRAWN_FOR_ONE * sum(counts.values()))
                examples = _each_once(self._generated(parts, drawn, data.processes))
                return {split: itertools.islice(examples, n) for split, n in counts.items()}
            ends = zip(counts.items(), itertools.accumulate(counts.values()), strict=True)
            return {split: self._generated(parts, range(end - n, end), data.processes) for (split, n), end in ends}

        folder = prepare(data.folder(), spec, splits, progress)
        shutil.rmtree(parts, ignore_errors=True)
        return folder

    def _generated(self, parts: Path, images: range, threads: int) -> Iterator[Example]:
        """Yield the images of these numbers, drawn ahead; each block is kept until the build is whole."""
        blocks = [images[at : at + BLOCK] for at in range(0, len(images), BLOCK)]
        made = prefetch((partial(self._block, parts, block) for block in blocks), threads)
        for block, (drawn, labels, dashes, chosen) in zip(blocks, made, strict=True):
            for i in np.flatnonzero(chosen).tolist():
                yield _example(drawn[i], int(labels[i]), block[i], int(dashes[i]))

    def _block(self, parts: Path, numbers: range) -> list[np.ndarray]:
        """Return images, labels, dashes and which are to be taken of one block: left by an earlier build, or drawn."""
        from lra.generators.pathfinder import apart, generate

        path, names = parts / f"{numbers.start}-{numbers.stop}.npz", ("images", "labels", "lengths", "chosen")
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as kept:
            return [kept[name] for name in names]  # else not there, or cut off by a crash of the machine
        options = self.options()
        made = generate(options, self.seed, numbers.start, len(numbers))
        chosen = apart(options, made) if self.distinct else np.ones(len(numbers), bool)
        values = [made.images, made.labels, made.lengths, chosen]
        writing = path.with_suffix(".writing.npz")
        np.savez_compressed(writing, **dict(zip(names, values, strict=True)))  # type: ignore[arg-type]
        os.replace(writing, path)
        return values

    def _build_released(self, data: DataConfig, progress: Progress | None) -> Path:
        names = [f"{start}{FOLDERS[self.level]}" for start in (f"pathfinder{self.resolution}/", "")]
        layouts = [Layout(f"LRA's folder {name}", f"{name}/metadata/*.npy") for name in names]
        source = locate(self.name, data, layouts)[1].parents[1].resolve()
        config = f"released_r{self.resolution}_{self.level}_{digest(source)}"
        spec = self._spec(config, {}, {"origin": f"LRA's release: {source}"})  # which tells the counts

        def splits() -> dict[str, Iterator[Example]]:
            images, empty = list_release(source)
            spec.about["empty"] = [str(path.relative_to(source)) for path in empty]
            parts = split_release(len(images))
            spec.counts.update({name: len(part) for name, part in parts.items()})
            return {name: self._read(images, part) for name, part in parts.items()}

        return prepare(data.folder(), spec, splits, progress)

    def _read(self, images: list[Listed], part: np.ndarray) -> Iterator[Example]:
        for i in part.tolist():
            path, label = images[i]
            yield _example(read_image(path, self.resolution), label, i)

    def encode(self, record: dict[str, Any]) -> np.ndarray:
        """Return the pixels row by row."""
        pixels: np.ndarray = record["pixels"]
        if pixels.size != self.l_max:
            raise ValueError(f"the image has {pixels.size:,} pixels, expected {self.l_max:,}")
        return self.encode_values(pixels)


@dataclass
class PathX(Pathfinder):
    """Pathfinder at 128 pixels a side, a sequence of 16,384."""

    resolution: int = option(128, "pixels a side: 128; Pathfinder has others")

    title = "Path-X"


def _example(image: np.ndarray, label: int, number: int, *dashes: int) -> Example:
    raw = np.frombuffer(_NUMBER.type(number).tobytes(), np.uint8)
    return Example({"pixels": image.reshape(-1), "number": raw}, label, (image.size, *dashes))


def _each_once(examples: Iterator[Example]) -> Iterator[Example]:
    """Leave out the pictures that came before."""
    seen: set[bytes] = set()
    for example in examples:
        before = len(seen)
        seen.add(hashlib.blake2b(example.fields["pixels"].tobytes(), digest_size=16).digest())
        if len(seen) > before:
            yield example


def list_release(folder: Path) -> tuple[list[Listed], list[Path]]:
    """List the images of a folder in the order of the metadata, files by number, then rows.

    Returns:
        The images, and the empty files (the release has one).

    Raises:
        DataError: Metadata that does not parse.
    """
    listed: list[Listed] = []
    empty: list[Path] = []
    for file in sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem)):
        try:  # the release's arrays are plain text in spite of their name
            rows = np.loadtxt(file, str, comments=None, usecols=range(4), ndmin=2)
            if not np.isin(rows[:, 3], ("0", "1")).all():
                raise ValueError("a label that is not 0 or 1")
        except (ValueError, OSError) as error:
            raise DataError(f"{file} has no rows of folder, file, number and label ({error}): {_AGAIN}") from None
        for inside, name, _, label in rows.tolist():
            path = folder / inside / name
            if path.is_file() and path.stat().st_size == 0:
                empty.append(path)
            else:
                listed.append((path, int(label)))
    if empty:
        log.warning("%d empty image(s) left out, the first is %s", len(empty), empty[0])
    if len(listed) < 10:
        raise DataError(f"{folder} lists {len(listed)} images, expected 10 at the least: {_AGAIN}")
    return listed, empty


def read_image(path: Path, resolution: int) -> np.ndarray:
    """Return an image's gray levels, uint8 ``(resolution, resolution)``. Raises ``DataError`` if it is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is no whole picture ({error}): {_AGAIN}") from None
    if pixels.shape != (resolution, resolution):
        rows, columns = pixels.shape
        raise DataError(
            f"{path} has {rows} × {columns} pixels, expected {resolution} × {resolution}: set task.resolution or "
            f"data.root to another folder"
        )
    return pixels


def split_release(number: int) -> dict[str, np.ndarray]:
    """Return which of so many images S4 and MEGA take for each part, 80 / 10 / 10 %."""
    held = number // 10
    parts = np.split(shuffled(number), [number - 2 * held, number - held])
    return dict(zip(SPLITS, parts, strict=True))
