"""The parameters of the Pathfinder generator and LRA's values for them. Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

CONTOUR_LENGTHS: dict[str, int] = {"easy": 6, "intermediate": 9, "hard": 14}


@dataclass(frozen=True)
class PathfinderOptions:
    """Every parameter of the generator; lengths in pixels. `preset` gives LRA's values for a size and a level."""

    size: int = 32
    """Side of the image."""
    padding: int = 1
    """Width of the border that paths keep off."""
    paddle_length: int = 2
    """Length of a dash."""
    paddle_thickness: float = 0.5
    """Width of a dash; times `antialias` it must be whole."""
    paddle_margins: tuple[int, ...] = (1,)
    """Free space around a dash; one of these is drawn per image."""
    marker_radius: float = 1.5
    """Radius of the two markers."""
    seed_distance: int = 7
    """Distance between the origins of the two paths; the first lies at least twice this far from the border."""
    contour_length: int = 14
    """Dashes in a long path."""
    distractor_length: int = 4
    """Dashes in a distractor."""
    distractors: int = 5
    """Distractors to try; one that does not fit is left out."""
    continuity: float = 1.0
    """How sharply turns are disfavoured: a turn by δ weighs cos²(min(continuity · δ, π/2))."""
    snake_contrasts: tuple[float, ...] = (2.0,)
    """Contrast of a path; a distractor's dashes use this alone."""
    paddle_contrasts: tuple[float, ...] = (0.75,)
    """Contrast of a dash of a long path, times the path's own."""
    antialias: int = 2
    """Enlargement at which dashes and markers are drawn."""
    segment_retries: int = 2
    """Further draws for a dash that does not fit."""
    distractor_retries: int = 4
    """Further attempts for a distractor that does not fit."""
    single_paddles: bool = False
    """Fill up with single dashes (LRA's wrapper has this off)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        width = self.paddle_thickness * self.antialias
        if width != round(width) or width < 1:
            raise ValueError(
                f"paddle_thickness * antialias must be a whole number of at least 1, got {self.paddle_thickness} * "
                f"{self.antialias} = {width}: change either"
            )
        for name in ("paddle_margins", "snake_contrasts", "paddle_contrasts"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive numbers, at least one, got {getattr(self, name)}")
        for name in ("size", "padding", "paddle_length", "seed_distance", "antialias", "distractor_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("distractors", "segment_retries", "distractor_retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.contour_length < 2:
            raise ValueError(f"contour_length must be at least 2, got {self.contour_length}")
        reach = self.paddle_length + max(self.paddle_margins)
        if 2 * self.seed_distance < reach or 4 * self.seed_distance >= self.size:
            raise ValueError(
                f"seed_distance must be at least half of paddle_length + margin ({reach}) and under a quarter of size "
                f"({self.size}), so that the first path starts in the middle; got {self.seed_distance}"
            )

    @classmethod
    def preset(cls, size: int, level: str = "hard") -> PathfinderOptions:
        """Return the values LRA states for a size and a level.

        LRA states the hard level only (in `lra_benchmarks/data/pathfinder.py`), for 32, 64, 128 and 256 pixels; what
        it leaves out is the reference generator's default: paddle length 5 and paddle contrast 1 from 64 pixels up,
        and at 256 also padding 22 and seed distance 27. The levels easy and intermediate differ in the contour length
        (6, 9) and apply LRA's formulas to it: distractor length = contour // 3, distractors = 20, 22, 35, 30 //
        distractor length at 32, 64, 128, 256 (hard: 5, 5, 8, 7). The reference's own script fixes the count once, at
        the easy level, and never again; if LRA's did too, all levels have 10, 11, 17, 15, and a report on the
        released Path-X does count 15–17: set `distractors` for that.

        Size 16 is ours, not LRA's: the 32-pixel dashes in a quarter of the room, contour 6, distractors of 2.

        Args:
            size: 16, 32, 64, 128 or 256 pixels.
            level: easy, intermediate or hard; size 16 has hard only.

        Returns:
            The options.

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
        options, distractor_paddles = _PRESETS[size]
        if size == 16:
            return options
        contour = CONTOUR_LENGTHS[level]
        length = contour // 3
        return dataclasses.replace(
            options, contour_length=contour, distractor_length=length, distractors=distractor_paddles // length
        )


_LARGE = PathfinderOptions(
    paddle_length=5, paddle_contrasts=(1.0,), continuity=1.8, snake_contrasts=(1.0,), paddle_thickness=1.5, size=128
)
_PRESETS: dict[int, tuple[PathfinderOptions, int]] = {
    16: (PathfinderOptions(size=16, seed_distance=3, contour_length=6, distractor_length=2, distractors=2), 0),
    32: (PathfinderOptions(), 20),
    64: (
        dataclasses.replace(
            _LARGE,
            size=64,
            seed_distance=12,
            marker_radius=2.5,
            paddle_thickness=1.0,
            snake_contrasts=(0.8,),
        ),
        22,
    ),
    128: (
        dataclasses.replace(_LARGE, paddle_margins=(2, 3), seed_distance=20, marker_radius=3.0, snake_contrasts=(0.9,)),
        35,
    ),
    256: (
        dataclasses.replace(
            _LARGE,
            size=256,
            padding=22,
            paddle_margins=(3,),
            seed_distance=27,
            marker_radius=5.0,
            paddle_thickness=2.0,
        ),
        30,
    ),
}
