"""Pathfinder: do two marked tips lie on one dashed path? The picture as a sequence of pixels.

A folder of LRA's release, ``pathfinder32/curv_contour_length_14`` and so on, holds ``metadata/N.npy`` and
``imgs/N/sample_M.png``. The metadata has a row per image: folder, file, number, label and the generator's parameters.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chela.core.errors import DataError
from chela.core.options import option
from lra.builder import Example, RecordSpec, prefetch, prepare
from lra.source import DataConfig, Layout, digest, locate
from lra.tasks.base import SPLITS
from lra.tasks.image import PixelTask, shuffled

log = logging.getLogger(__name__)

BLOCK = 512  # images drawn by one call of a thread
_DRAWN_FOR_ONE = 20  # of distinct ones, at most; a third is taken where paths are short
_FIELDS = ("pixels", "number")
_NUMBER = np.dtype("<i8")
_AGAIN = "unpack the release again"
_RETIRED = (
    "padding paddle_length paddle_thickness paddle_margins marker_radius seed_distance contour_length "
    "distractor_length continuity snake_contrasts paddle_contrasts antialias segment_retries distractor_retries "
    "single_paddles"
)
FOLDERS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}

CONTOUR_LENGTHS: dict[str, int] = {"easy": 6, "intermediate": 9, "hard": 14}


@dataclass(frozen=True)
class PathfinderOptions:
    """Every parameter of the generator; lengths in pixels. ``preset`` gives LRA's values for a size and a level.

    A dash of a long path has the contrast of its path times one of ``paddle_contrasts``, a distractor's dash one of
    ``snake_contrasts`` alone. A distractor that finds no room is left out.
    """

    size: int = 32  # side of the image
    padding: int = 1  # border that paths keep off
    paddle_length: int = 2  # of a dash
    paddle_thickness: float = 0.5  # of a dash; times antialias it is whole
    paddle_margins: tuple[int, ...] = (1,)  # free space around a dash, one drawn per image
    marker_radius: float = 1.5
    seed_distance: int = 7  # between the starts of the two paths, and half the first's to the border
    contour_length: int = 14  # dashes of a long path
    contour_lengths: tuple[int, ...] = ()  # of which each image draws one; empty: contour_length
    distractor_length: int = 4  # dashes
    distractors: int = 5  # to try
    continuity: float = 1.0  # how much turns are avoided: a turn by δ weighs cos²(min(continuity · δ, π/2))
    snake_contrasts: tuple[float, ...] = (2.0,)  # of a path
    paddle_contrasts: tuple[float, ...] = (0.75,)  # of a dash of a long path, times the path's
    antialias: int = 2  # enlargement at which dashes and markers are drawn
    segment_retries: int = 2  # further draws for a dash that does not fit
    distractor_retries: int = 4  # further attempts for a distractor that does not fit

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for options of the task with which nothing can be drawn."""
        if self.contour_lengths and min(self.contour_lengths) < 2:
            raise ValueError(f"contour_lengths: expected 2 or more dashes, got {self.contour_lengths}")

    @classmethod
    def preset(cls, size: int, level: str = "hard") -> PathfinderOptions:
        """Return the values LRA states for a size and a level.

        LRA states the hard level only (``lra_benchmarks/data/pathfinder.py``), for 32, 64, 128 and 256 pixels; what it
        leaves out has the reference generator's default. The levels easy and intermediate differ in the contour length
        (6, 9), and LRA's formulas are applied to it: distractor length = contour // 3, so many dashes by that length.
        But the reference's own script computes the number of distractors once, at the easy level; if LRA's did too, all
        levels have 10, 11, 17, 15, as a report on the released Path-X counts: set ``distractors`` for that. Size 16 is
        ours, not LRA's: the dashes of 32 pixels in a quarter of the area.

        Raises:
            ValueError: There is no such preset.

        >>> PathfinderOptions.preset(128).distractors
        8
        """
        if size not in _PRESETS:
            raise ValueError(f"resolution: expected {', '.join(map(str, _PRESETS))} pixels, got {size}")
        if level not in CONTOUR_LENGTHS or (size == 16 and level != "hard"):
            raise ValueError(f"level: expected {', '.join(CONTOUR_LENGTHS)} (16 pixels: hard only), got {level!r}")
        values = {"size": size, **_PRESETS[size]}
        if size != 16:
            values["contour_length"], length = CONTOUR_LENGTHS[level], CONTOUR_LENGTHS[level] // 3
            values |= {"distractor_length": length, "distractors": _DISTRACTOR_DASHES[size] // length}
        return cls(**values)


_LARGE = {"paddle_length": 5, "paddle_contrasts": (1.0,), "continuity": 1.8}
_PRESETS: dict[int, dict[str, Any]] = {
    16: {"seed_distance": 3, "contour_length": 6, "distractor_length": 2, "distractors": 2},
    32: {},
    64: dict(_LARGE, seed_distance=12, paddle_thickness=1.0, marker_radius=2.5, snake_contrasts=(0.8,)),
    128: dict(_LARGE, seed_distance=20, paddle_thickness=1.5, marker_radius=3.0, snake_contrasts=(0.9,))
    | {"paddle_margins": (2, 3)},
    256: dict(_LARGE, seed_distance=27, paddle_thickness=2.0, marker_radius=5.0, snake_contrasts=(1.0,))
    | {"paddle_margins": (3,), "padding": 22},
}  # what differs from the defaults, which are those of 32 pixels
_DISTRACTOR_DASHES = {32: 20, 64: 22, 128: 35, 256: 30}


@dataclass
class Pathfinder(PixelTask):
    """Two classes; generated, or LRA's release where ``data.root`` is set. L = resolution².

    What is not an option here has the value that LRA states for the resolution and the level (``PathfinderOptions``).
    Records hold ``pixels``, row by row, and ``number``: which image of the seed, or row of the release, it is.
    """

    normalization: str = option("mega", "'mega': -1 … 1; 's4': 0 … 1", choices=("s4", "mega"))
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
    statistics: ClassVar = {"s4": (0.0, 1.0), "mega": (0.5, 0.5)}
    classes = ("the tips are on two paths", "the tips are on one path")
    generated = True
    grouped_by = "dashes"
    input_help = "gray levels row by row, whole numbers from 0 to 255"
    retired: ClassVar[dict[str, Any]] = PixelTask.retired | dict.fromkeys(_RETIRED.split())

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options()

    def options(self) -> PathfinderOptions:
        """Return the generator's parameters. Raises ``ValueError`` for what cannot be drawn."""
        own: dict[str, Any] = {} if self.distractors is None else {"distractors": self.distractors}
        try:
            preset = PathfinderOptions.preset(self.resolution, self.level)
            return replace(preset, contour_lengths=tuple(self.contour_lengths or ()), **own)
        except ValueError as error:
            raise ValueError(f"task.{error}") from None

    def build(self, data: DataConfig) -> Path:
        """Generate the images, or read those of the release in ``data.root``."""
        if data.root is not None:
            return self._build_released(data)
        self.note = "images of this program's generator with LRA's stated parameters or the task's own, not LRA's files"
        options, counts = asdict(self.options()), {split: getattr(self, split) for split in SPLITS}
        # single dashes are the reference generator's alone; they stand in the name of the records that people have
        options = {name: value for name, value in options.items() if value != ()} | {"single_paddles": False}
        choice = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:10]
        config = f"r{self.resolution}_{self.level}_n{'-'.join(map(str, counts.values()))}_seed{self.seed}_{choice}"
        config += "_distinct" if self.distinct else ""
        about = {"origin": "generated", "options": options, "seed": self.seed}
        spec = RecordSpec("lra_pathfinder", config, self.version, _FIELDS, counts, ("length", "dashes"), about)

        def splits() -> dict[str, Iterator[Example]]:
            examples = self._generated(sum(counts.values()), data.processes)
            return {split: itertools.islice(examples, n) for split, n in counts.items()}

        return prepare(data.folder(), spec, splits)

    def _generated(self, number: int, threads: int) -> Iterator[Example]:
        """Yield so many images, drawn ahead; with ``distinct`` none that came before or can be read both ways."""
        from lra.generators.pathfinder import apart, generate

        options, seen = self.options(), set[bytes]()
        number *= _DRAWN_FOR_ONE if self.distinct else 1
        starts = range(0, number, BLOCK)
        calls = (partial(generate, options, self.seed, at, min(BLOCK, number - at)) for at in starts)
        for start, made in zip(starts, prefetch(calls, threads), strict=True):
            chosen = apart(options, made) if self.distinct else np.ones(len(made.labels), bool)
            for i in np.flatnonzero(chosen).tolist():
                if self.distinct:
                    mark = hashlib.blake2b(made.images[i].tobytes(), digest_size=16).digest()
                    if mark in seen:
                        continue
                    seen.add(mark)
                yield _example(made.images[i], int(made.labels[i]), start + i, int(made.lengths[i]))

    def _build_released(self, data: DataConfig) -> Path:
        names = [f"{start}{FOLDERS[self.level]}" for start in (f"pathfinder{self.resolution}/", "")]
        layouts = [Layout(f"LRA's folder {name}", f"{name}/metadata/*.npy") for name in names]
        source = locate(self.name, data, layouts)[1].parents[1].resolve()
        config = f"released_r{self.resolution}_{self.level}_{digest(source)}"
        about = {"origin": f"LRA's release: {source}"}  # which tells the counts, but not the dashes
        spec = RecordSpec("lra_pathfinder", config, self.version, _FIELDS, {}, about=about)

        def splits() -> dict[str, Iterator[Example]]:
            images = list_release(source)
            parts = split_release(len(images))

            def read(i: int) -> Example:
                return _example(read_image(images[i][0], self.resolution), images[i][1], i)

            spec.counts.update({name: len(part) for name, part in parts.items()})
            return {name: map(read, part.tolist()) for name, part in parts.items()}

        return prepare(data.folder(), spec, splits)

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


def list_release(folder: Path) -> list[tuple[Path, int]]:
    """List path and label of the images of a folder in the order of the metadata, files by number, then rows.

    Empty files are left out with a warning: the release has one. Raises ``DataError`` for metadata that does not parse.
    """
    listed = []
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
                log.warning("%s is empty: left out", path)
            else:
                listed.append((path, int(label)))
    if len(listed) < 10:
        raise DataError(f"{folder} lists {len(listed)} images, expected 10 at the least: {_AGAIN}")
    return listed


def read_image(path: Path, resolution: int) -> np.ndarray:
    """Return an image's gray levels, uint8 ``(resolution, resolution)``. Raises ``DataError`` if it is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is no whole picture ({error}): {_AGAIN}") from None
    if pixels.shape != (resolution, resolution):
        got = f"{path} has {' × '.join(map(str, pixels.shape))} pixels, expected {resolution} × {resolution}"
        raise DataError(f"{got}: set task.resolution or data.root to another folder")
    return pixels


def split_release(number: int) -> dict[str, np.ndarray]:
    """Return which of so many images S4 and MEGA take for each part, 80 / 10 / 10 %."""
    held = number // 10
    parts = np.split(shuffled(number), [number - 2 * held, number - held])
    return dict(zip(SPLITS, parts, strict=True))
