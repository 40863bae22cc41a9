"""Every option of every task and of the data pipeline, typed and explained. Standard library only.

`TASKS` maps a task's name to its configuration class; `DataConfig` holds what all tasks share. Each class has
`check()`, which raises `ValueError` with one line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lra.generators.pathfinder_options import PathfinderOptions


def option(default: Any, help: str) -> Any:
    """A dataclass field with its meaning beside it."""
    return field(default=default, metadata={"help": help})


_ENCODINGS = ("lra", "s4", "mega")


def _at_least(owner: str, low: int, **values: int) -> None:
    for key, value in values.items():
        if value < low:
            raise ValueError(f"{owner}.{key} is {value}: expected {low} or more")


def _at_most(owner: str, high: int, **values: int) -> None:
    for key, value in values.items():
        if value > high:
            raise ValueError(f"{owner}.{key} is {value}: expected {high:,} or less")


def _one_of(owner: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{key} is {value!r}: expected one of {', '.join(allowed)}")


@dataclass
class ListOpsConfig:
    """Generated nested list operations. The defaults are the Long Range Arena's task."""

    name: str = option("listops", "name of the task")
    train: int = option(96_000, "trees to train on")
    validation: int = option(2_000, "trees to validate on")
    test: int = option(2_000, "trees to test on")
    min_length: int = option(501, "shortest tree kept, in tokens (brackets closed, parentheses not counted)")
    max_length: int = option(1_999, "longest tree kept, in tokens")
    max_depth: int = option(10, "deepest level of a tree; at this depth every node is a digit")
    max_args: int = option(10, "most arguments of an operator (the least is 2)")
    seed: int = option(0, "seed of the trees; the run's own seed does not change the data")

    def check(self) -> None:
        """Raise `ValueError` where an option is out of range."""
        _at_least("task", 1, train=self.train, validation=self.validation, test=self.test)
        _at_least("task", 1, min_length=self.min_length, max_depth=self.max_depth)
        _at_least("task", 2, max_args=self.max_args)
        _at_least("task", 0, seed=self.seed)
        if self.max_length < self.min_length:
            raise ValueError(f"task.max_length is {self.max_length}: expected min_length ({self.min_length}) or more")
        if max(self.train, self.validation, self.test) > 1_000_000_000 or self.seed >= 2**63:
            raise ValueError("task: expected up to 1,000,000,000 trees a split and a seed below 2**63")
        if self.max_args > 64 or self.max_depth > 64 or self.max_length > 1_000_000:
            raise ValueError("task: expected max_args and max_depth up to 64 and max_length up to 1,000,000")


@dataclass
class TextConfig:
    """IMDb reviews as bytes: positive or negative. The defaults are the Long Range Arena's task."""

    name: str = option("text", "name of the task")
    encoding: str = option("lra", "'lra': bytes; 's4': characters, <eos> appended; 'mega': bytes, <eos> appended")
    max_length: int = option(0, "longest sequence, the rest is cut; 0: of the encoding (lra 4000, s4 4096, mega 4001)")
    min_frequency: int = option(15, "s4: characters rarer than this in the training texts become <unk>")
    train: int = option(0, "reviews to train on, after those held out; 0: all")
    validation: int = option(2_500, "training reviews kept apart for validation (data.validation=holdout)")
    test: int = option(0, "reviews to test on; 0: all 25,000")

    def check(self) -> None:
        """Raise `ValueError` where an option is out of range."""
        _one_of("task", "encoding", self.encoding, _ENCODINGS)
        _at_least("task", 0, max_length=self.max_length, train=self.train, test=self.test)
        _at_least("task", 1, min_frequency=self.min_frequency, validation=self.validation)
        _at_most("task", 1_000_000, max_length=self.max_length, train=self.train, test=self.test)
        _at_most("task", 1_000_000_000, min_frequency=self.min_frequency)
        _at_most("task", 24_998, validation=self.validation)
        if self.max_length == 1:
            raise ValueError("task.max_length is 1: expected 0, or 2 or more")


@dataclass
class ImageConfig:
    """CIFAR-10 as a sequence of pixels, row by row. The defaults are the Long Range Arena's task as S4 feeds it."""

    name: str = option("image", "name of the task")
    form: str = option("gray", "'gray': one value a pixel; 'rgb': three (scifar); 'tokens': gray levels as token ids")
    normalization: str = option("s4", "'s4': mean and sd of the data; 'mega': 0.48 and 0.24; unused by tokens")
    resolution: int = option(32, "pixels a side: 32, or 16, 8 (means of blocks of pixels)")
    train: int = option(0, "images to train on; 0: all 45,000 that are not held out")
    validation: int = option(5_000, "training images kept apart, the same ones as S4's and MEGA's when 5,000")
    test: int = option(0, "images to test on; 0: all 10,000")

    def check(self) -> None:
        """Raise `ValueError` where an option is out of range."""
        _one_of("task", "form", self.form, ("gray", "rgb", "tokens"))
        _one_of("task", "normalization", self.normalization, ("s4", "mega"))
        _at_least("task", 0, train=self.train, test=self.test)
        _at_least("task", 1, validation=self.validation)
        if self.resolution not in (32, 16, 8):
            raise ValueError(f"task.resolution is {self.resolution}: expected 32, 16 or 8")
        _at_most("task", 1_000_000, train=self.train, test=self.test)
        _at_most("task", 49_999, validation=self.validation)


@dataclass
class RetrievalConfig:
    """Pairs of papers: does one cite the other? The defaults are the Long Range Arena's task (AAN)."""

    name: str = option("retrieval", "name of the task")
    encoding: str = option("lra", "'lra': bytes; 's4': characters, <eos> appended; 'mega': bytes, <eos> appended")
    max_length: int = option(0, "longest document, the rest is cut; 0: the encoding's own (lra, s4 4000, mega 4001)")
    min_frequency: int = option(10, "s4: characters rarer than this in the training documents become <unk>")
    train: int = option(0, "pairs to train on; 0: all")
    validation: int = option(0, "pairs to validate on; 0: all")
    test: int = option(0, "pairs to test on; 0: all")

    def check(self) -> None:
        """Raise `ValueError` where an option is out of range."""
        _one_of("task", "encoding", self.encoding, _ENCODINGS)
        _at_least("task", 0, max_length=self.max_length, train=self.train, validation=self.validation, test=self.test)
        _at_least("task", 1, min_frequency=self.min_frequency)
        _at_most("task", 1_000_000, max_length=self.max_length, train=self.train, validation=self.validation)
        _at_most("task", 1_000_000_000, min_frequency=self.min_frequency, test=self.test)
        if self.max_length == 1:
            raise ValueError("task.max_length is 1: expected 0, or 2 or more")


@dataclass
class DataConfig:
    """What all tasks share: where data lies, where it comes from, how batches are made."""

    dir: str = option("", "folder for prepared records; empty: $CHELA_DATA, else ~/.cache/chela")
    root: str | None = option(None, "folder or archive of your own to take the data from")
    source: str = option("auto", "'auto': the task's own data; 'scisumm' (retrieval): a small real set, not LRA's")
    download: bool = option(True, "fetch data that is not there; false: say what is missing")
    validation: str = option(
        "holdout", "'holdout': validate on data kept apart; 'test': on the test set, as some papers do"
    )
    processes: int = option(0, "parallel workers that build records; 0: one per core")
    workers: int = option(0, "loader workers; 0: load in the training process")
    pool: int = option(8, "batches per bucketing pool: larger pools pad less and shuffle less")

    def check(self) -> None:
        """Raise `ValueError` where an option is out of range."""
        _one_of("data", "validation", self.validation, ("holdout", "test"))
        _one_of("data", "source", self.source, ("auto", "scisumm"))
        _at_least("data", 0, processes=self.processes, workers=self.workers)
        _at_least("data", 1, pool=self.pool)
        if self.workers > 256 or self.processes > 1024 or self.pool > 100_000:
            raise ValueError("data: expected up to 256 workers, 1,024 processes and pools of 100,000 batches")

    def folder(self) -> Path:
        """The folder for prepared records, with the environment and `~` resolved."""
        folder = self.dir or os.environ.get("CHELA_DATA") or "~/.cache/chela"
        return Path(os.path.expanduser(folder))  # leaves an unknown ~user alone, where Path.expanduser raises


@dataclass
class PathfinderConfig:
    """Pathfinder: are two marked tips on one dashed path? Generated, or LRA's release where data.root is set.

    An option of the generator that is left empty has the value LRA states for the resolution and the level
    (`lra.generators.pathfinder_options`, which also says what each means).
    """

    name: str = option("pathfinder", "name of the task")
    resolution: int = option(32, "pixels a side: 32, 64, 128 or 256; 16 is our own, smaller than LRA's smallest")
    level: str = option("hard", "'easy', 'intermediate' or 'hard'; LRA's tasks are hard")
    form: str = option("gray", "'gray': one value a pixel; 'tokens': gray levels as token ids")
    normalization: str = option("mega", "'mega': -1 … 1; 's4': 0 … 1; unused by tokens")
    train: int = option(160_000, "images to train on (of a release: 80 % of what is there, at most so many)")
    validation: int = option(20_000, "images to validate on (of a release: 10 %)")
    test: int = option(20_000, "images to test on (of a release: 10 %)")
    seed: int = option(0, "seed of the images; the run's own seed does not change the data")
    padding: int | None = option(None, "border that paths keep off")
    paddle_length: int | None = option(None, "length of a dash")
    paddle_thickness: float | None = option(None, "width of a dash")
    paddle_margins: list[int] | None = field(
        default=None, metadata={"help": "free space around a dash, one drawn per image"}
    )
    marker_radius: float | None = option(None, "radius of the markers")
    seed_distance: int | None = option(None, "distance between the starts of the two paths")
    contour_length: int | None = option(None, "dashes of a long path")
    distractor_length: int | None = option(None, "dashes of a distractor")
    distractors: int | None = option(
        None, "distractors to try; LRA states 8 for Path-X, its release seems to have 15-17"
    )
    continuity: float | None = option(None, "how sharply turns are disfavoured")
    snake_contrasts: list[float] | None = field(default=None, metadata={"help": "contrast of a path"})
    paddle_contrasts: list[float] | None = field(
        default=None, metadata={"help": "contrast of a dash of a long path, times the path's"}
    )
    antialias: int | None = option(None, "enlargement at which dashes and markers are drawn")
    segment_retries: int | None = option(None, "further draws for a dash that does not fit")
    distractor_retries: int | None = option(None, "further attempts for a distractor that does not fit")
    single_paddles: bool | None = option(None, "fill up with single dashes")

    def options(self) -> PathfinderOptions:
        """The generator's parameters. Raises `ValueError` for what cannot be drawn."""
        given = {
            f.name: getattr(self, f.name) for f in fields(PathfinderOptions) if getattr(self, f.name, None) is not None
        }
        for name in ("paddle_margins", "snake_contrasts", "paddle_contrasts"):
            if name in given:
                given[name] = tuple(given[name])
        try:
            return replace(PathfinderOptions.preset(self.resolution, self.level), **given)
        except ValueError as error:
            raise ValueError(f"task: {error}") from None

    def check(self) -> None:
        """Raise `ValueError` where an option is out of range."""
        _one_of("task", "form", self.form, ("gray", "tokens"))
        _one_of("task", "normalization", self.normalization, ("s4", "mega"))
        _at_least("task", 1, train=self.train, validation=self.validation, test=self.test)
        _at_least("task", 0, seed=self.seed)
        if self.seed >= 2**63:
            raise ValueError(f"task.seed is {self.seed}: expected less than 2^63")
        self.options()


@dataclass
class PathXConfig(PathfinderConfig):
    """Path-X: Pathfinder at 128 pixels, a sequence of 16,384."""

    name: str = option("pathx", "name of the task")
    resolution: int = option(128, "pixels a side: 128; Pathfinder has others")


TASKS: dict[str, type] = {
    "listops": ListOpsConfig,
    "text": TextConfig,
    "image": ImageConfig,
    "retrieval": RetrievalConfig,
    "pathfinder": PathfinderConfig,
    "pathx": PathXConfig,
}

GENERATED = ("listops", "pathfinder", "pathx")
"""Tasks whose data is generated, or read from the Long Range Arena's release where data.root is set."""
