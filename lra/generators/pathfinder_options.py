"""The parameters of the Pathfinder generator, and LRA's values for them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chela.core.options import check_options, option

CONTOUR_LENGTHS: dict[str, int] = {"easy": 6, "intermediate": 9, "hard": 14}


@dataclass(frozen=True)
class PathfinderOptions:
    """Every parameter of the generator; lengths in pixels. ``preset`` gives LRA's values for a size and a level.

    A dash of a long path has the contrast of its path times one of ``paddle_contrasts``, a distractor's dash one of
    ``snake_contrasts`` alone. A distractor that finds no room is left out.
    """

    size: int = option(32, "side of the image", ge=1)
    padding: int = option(1, "border that paths keep off", ge=1)
    paddle_length: int = option(2, "length of a dash", ge=1)
    paddle_thickness: float = option(0.5, "width of a dash; times antialias it must be whole")
    paddle_margins: tuple[int, ...] = option((1,), "free space around a dash, one drawn per image")
    marker_radius: float = option(1.5, "radius of the two markers")
    seed_distance: int = option(
        7, "distance between the starts of the two paths, and half the first's to the border", ge=1
    )
    contour_length: int = option(14, "dashes of a long path", ge=2)
    contour_lengths: tuple[int, ...] = option(
        (), "dashes of a long path, of which each image draws one; empty: contour_length", neutral=None
    )
    distractor_length: int = option(4, "dashes of a distractor", ge=1)
    distractors: int = option(5, "distractors to try", ge=0)
    continuity: float = option(1.0, "how much turns are avoided: a turn by δ weighs cos²(min(continuity · δ, π/2))")
    snake_contrasts: tuple[float, ...] = option((2.0,), "contrast of a path")
    paddle_contrasts: tuple[float, ...] = option((0.75,), "contrast of a dash of a long path, times the path's")
    antialias: int = option(2, "enlargement at which dashes and markers are drawn", ge=1)
    segment_retries: int = option(2, "further draws for a dash that does not fit", ge=0)
    distractor_retries: int = option(4, "further attempts for a distractor that does not fit", ge=0)
    single_paddles: bool = option(False, "fill up with single dashes; off in LRA's wrapper")

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for options with which nothing can be drawn."""
        check_options(self)
        width = self.paddle_thickness * self.antialias
        if width != round(width) or width < 1:
            raise ValueError(
                f"paddle_thickness * antialias must be a whole number of at least 1, got {self.paddle_thickness} * "
                f"{self.antialias} = {width}: change either"
            )
        for name in ("paddle_margins", "snake_contrasts", "paddle_contrasts"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive numbers, at least one, got {getattr(self, name)}")
        if self.contour_lengths and min(self.contour_lengths) < 2:
            raise ValueError(f"contour_lengths: expected 2 or more dashes, got {self.contour_lengths}")
        reach = self.paddle_length + max(self.paddle_margins)
        if 2 * self.seed_distance < reach or 4 * self.seed_distance >= self.size:
            raise ValueError(
                f"seed_distance must be at least half of paddle_length + margin ({reach}) and under a quarter of size "
                f"({self.size}), so that the first path starts in the middle; got {self.seed_distance}"
            )

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
            raise ValueError(f"expected a size of {', '.join(map(str, _PRESETS))} pixels, got {size}")
        if level not in CONTOUR_LENGTHS or (size == 16 and level != "hard"):
            raise ValueError(f"expected a level of {', '.join(CONTOUR_LENGTHS)} (16 pixels: hard only), got {level!r}")
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
