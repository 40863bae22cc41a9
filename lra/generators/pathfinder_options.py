"""The parameters of the Pathfinder generator, and LRA's values for them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    single_paddles: bool = False  # the reference generator can fill up with single dashes; LRA's wrapper does not

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for options of the task with which nothing can be drawn."""
        if self.contour_lengths and min(self.contour_lengths) < 2:
            raise ValueError(f"contour_lengths: expected 2 or more dashes, got {self.contour_lengths}")

    @classmethod
    def preset(cls, size: int, level: str = "hard") -> PathfinderOptions:
        """Return the values LRA states for a size and a level.

        LRA states the hard level only (``lra_benchmarks/data/pathfinder.py``), for 32, 64, 128 and 256 pixels. What it
        leaves out has the reference generator's default: from 64 pixels up paddle length 5 and paddle contrast 1, at
        256 also padding 22 and seed distance 27. The levels easy and intermediate differ in the contour length (6, 9),
        and LRA's formulas are applied to it: distractor length = contour // 3; distractors = 20, 22, 35, 30 //
        distractor length at 32, 64, 128, 256 pixels (hard: 5, 5, 8, 7). But the reference's own script computes the
        number of distractors once, at the easy level. If LRA's did too, all levels have 10, 11, 17, 15. A report on the
        released Path-X does count 15–17: set ``distractors`` for that.

        Size 16 is ours, not LRA's: the dashes of 32 pixels in a quarter of the area, contour 6, distractors of 2.

        Args:
            size: 16, 32, 64, 128 or 256 pixels.
            level: easy, intermediate or hard; size 16 has hard only.

        Raises:
            ValueError: If there is no such preset.

        Example:
            >>> PathfinderOptions.preset(128).distractors
            8
        """
        if size not in _PRESETS:
            raise ValueError(f"resolution: expected {', '.join(map(str, _PRESETS))} pixels, got {size}")
        if level not in CONTOUR_LENGTHS or (size == 16 and level != "hard"):
            raise ValueError(f"level: expected {', '.join(CONTOUR_LENGTHS)} (16 pixels: hard only), got {level!r}")
        values = {"size": size, **_PRESETS[size]}
        if size != 16:
            contour = CONTOUR_LENGTHS[level]
            length = contour // 3
            values |= {"contour_length": contour, "distractor_length": length}
            values["distractors"] = _DISTRACTOR_DASHES[size] // length
        return cls(**values)


_LARGE = {"paddle_length": 5, "paddle_contrasts": (1.0,), "continuity": 1.8}
_PRESETS: dict[int, dict[str, Any]] = {
    16: {"seed_distance": 3, "contour_length": 6, "distractor_length": 2, "distractors": 2},
    32: {},
    64: _LARGE | {"seed_distance": 12, "paddle_thickness": 1.0, "marker_radius": 2.5, "snake_contrasts": (0.8,)},
    128: _LARGE
    | {"seed_distance": 20, "paddle_thickness": 1.5, "marker_radius": 3.0, "snake_contrasts": (0.9,)}
    | {"paddle_margins": (2, 3)},
    256: _LARGE
    | {"seed_distance": 27, "paddle_thickness": 2.0, "marker_radius": 5.0, "snake_contrasts": (1.0,)}
    | {"paddle_margins": (3,), "padding": 22},
}
"""What differs from the defaults, which are those of 32 pixels."""
_DISTRACTOR_DASHES = {32: 20, 64: 22, 128: 35, 256: 30}
