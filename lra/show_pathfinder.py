"""A Pathfinder record drawn for people: the picture, the two marked tips and, where they are known, the paths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lra.generators.pathfinder import generate
from lra.tasks.base import Task
from lra.tasks.pathfinder import Pathfinder, number

_SIDE = 384  # pixels of the drawing
_COLOURS = ("#e6550d", "#3182bd")


def drawing(task: Task, record: dict[str, Any], picture: str) -> str:
    """HTML of the picture with the tips ringed and the two long paths traced over it.

    The paths are known for generated images alone: the image is made again from its number and compared. In a released
    image only the tips are found, by looking for the two brightest discs.

    Args:
        task: a prepared `Pathfinder`.
        record: as stored.
        picture: an `<img>` of it.
    """
    assert isinstance(task, Pathfinder)
    side = task.config.resolution
    image = record["pixels"].reshape(side, side)
    paths, tips = _made(task, image, number(record))
    told = "" if paths else "<p>not made by this generator: tips found in the picture, paths not known</p>"
    shapes = [
        f'<polyline points="{" ".join(_point(p) for p in path)}" fill="none" stroke="{colour}" stroke-width=".35"/>'
        for path, colour in zip(paths, _COLOURS, strict=False)
    ]
    radius = side / 16
    for y, x in tips:
        shapes.append(
            f'<circle cx="{x + 0.5:g}" cy="{y + 0.5:g}" r="{radius:g}" fill="none" stroke="#31a354" stroke-width=".5"/>'
        )
    overlay = (
        f'<svg viewBox="0 0 {side} {side}" width="{_SIDE}" height="{_SIDE}" '
        f'style="position:absolute;left:0;top:0">{"".join(shapes)}</svg>'
    )
    sized = picture.replace("<img ", f'<img style="width:{_SIDE}px;height:{_SIDE}px;border:0" ', 1)
    return f'<div style="position:relative;width:{_SIDE}px">{sized}{overlay}</div>{told}'


def _point(pixel: tuple[int, int]) -> str:
    return f"{pixel[1] + 0.5:g},{pixel[0] + 0.5:g}"


def _made(task: Pathfinder, image: np.ndarray, n: int) -> tuple[list[list[tuple[int, int]]], list[tuple[int, int]]]:
    """The long paths (each its tips in order) and the marked tips; no paths where the image is not the generator's."""
    made = generate(task.config.options(), task.config.seed, n, 1)
    if not np.array_equal(made.images[0], image):
        return [], find_tips(image)
    paddles = made.paddles[0, : made.counts[0, 0]]
    paths = [[(row, column) for row, column, _, path in paddles.tolist() if path == which] for which in (0, 1)]
    return paths, [(row, column) for row, column in made.markers[0].tolist()]


def find_tips(image: np.ndarray) -> list[tuple[int, int]]:
    """The centres of the two brightest discs of a picture, brighter first."""
    side = len(image)
    radius = max(1.5, 3 * side / 128)
    reach = math.ceil(radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image.astype(np.float64), reach), disc.shape)
    score = (windows * disc).sum(axis=(2, 3))
    tips = []
    for _ in range(2):
        y, x = (int(i) for i in np.unravel_index(int(score.argmax()), score.shape))
        tips.append((y, x))
        score[max(0, y - 2 * reach) : y + 2 * reach + 1, max(0, x - 2 * reach) : x + 2 * reach + 1] = -1
    return tips
