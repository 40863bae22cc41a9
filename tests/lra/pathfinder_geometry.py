"""Follow Pathfinder's paths from the drawn dashes alone: where each lies and which way it points.

Nothing here is taken from the generator but its list of dashes, shuffled and without the paths they were drawn for,
and the margin. The rules are those of the task's specification, written a second time: a dash grown from a pivot ends
`length + margin` or a rounding less away from it, the next pivot lies `length + 2 · margin` further along the dash,
rounded up, and a first dash starts at a tip. The picture is held to the same list by painting it a second time with
Pillow and numpy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from lra.tasks.pathfinder import PathfinderOptions

Pixel = tuple[int, int]
Dash = tuple[int, int, float, bool, int]
"""Row and column of the stamp, the angle it was drawn in, whether it starts a path, a number to tell equal ones
apart."""


def _along(start: Pixel, angle: float, distance: float) -> Pixel:
    return math.ceil(start[0] + distance * math.sin(angle)), math.ceil(start[1] + distance * math.cos(angle))


def _reversed(angle: float) -> float:
    return angle + math.pi if angle < 0 else angle - math.pi


@lru_cache(maxsize=4096)
def _to_heads(angle: float, reach: int) -> list[Pixel]:
    """Offsets from pivot to head that a grown dash drawn in `angle` may have: a direction does not tell its length.

    A head is the truncated point of a circle of radius `reach`, so the pixel's square is crossed by the circle.
    """
    found = []
    for row in range(-reach - 1, reach + 1):
        for column in range(-reach - 1, reach + 1):
            corners = [math.hypot(row + i, column + j) for i in (0, 1) for j in (0, 1)]
            crossed = min(corners) <= reach <= max(corners)
            turned = abs(math.remainder(math.atan2(-row, -column) - angle, 2 * math.pi))
            if crossed and turned < 1e-9 and (row, column) != (0, 0):
                found.append((row, column))
    return found


def _pivots(dash: Dash, length: int, margin: int) -> list[tuple[Pixel, Pixel]]:
    """Return the pivots a dash may have grown from, each with the one the next dash would grow from."""
    row, column, angle, first, _ = dash
    if first:
        head = _along((row, column), angle, length)
        pivot = _along(head, _reversed(angle), length + margin)
        return [(pivot, _along(pivot, angle, length + 2 * margin))]
    found = []
    for down, right in _to_heads(angle, length + margin):
        pivot = (row - down, column - right)
        found.append((pivot, _along(pivot, math.atan2(down, right), length + 2 * margin)))
    return found


def chains(dashes: list[Dash], length: int, margin: int, most: int) -> list[list[list[Dash]]]:
    """Follow every path from its first dash, one joint at a time.

    Returns:
        For each first dash, all the ways of going on to the end of a path or to `most` dashes.
    """
    grown: dict[Pixel, list[tuple[Dash, Pixel]]] = defaultdict(list)
    starts = []
    for dash in dashes:
        for pivot, onward in _pivots(dash, length, margin):
            if dash[3]:
                starts.append((dash, onward))
            else:
                grown[pivot].append((dash, onward))

    def follow(way: list[Dash], onward: Pixel) -> list[list[Dash]]:
        after = [step for step in grown[onward] if step[0] not in way]
        if not after or len(way) == most:
            return [way]
        return [longer for dash, further in after for longer in follow([*way, dash], further)]

    return [follow([dash], onward) for dash, onward in starts]


@lru_cache(maxsize=4096)
def _stamp(angle: float, length: int, thickness: float, half: int, scale: int) -> np.ndarray:
    centre = half * scale
    big = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    end = _along((centre, centre), angle, length * scale)
    ImageDraw.Draw(big).line([centre, centre, end[1], end[0]], fill=255, width=round(thickness * scale))
    return np.asarray(big.resize((2 * half + 1, 2 * half + 1), Image.Resampling.LANCZOS)) / 255.0


def _disc(size: int, centre: Pixel, radius: float, scale: int) -> np.ndarray:
    rows, columns = np.ogrid[: size * scale, : size * scale]
    inside = (rows - centre[0] * scale) ** 2 + (columns - centre[1] * scale) ** 2 <= (radius * scale) ** 2
    big = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
    return np.asarray(big.resize((size, size), Image.Resampling.LANCZOS)) / 255.0


def paint(
    options: PathfinderOptions, margin: int, targets: list[Dash], others: list[Dash], markers: list[Pixel]
) -> np.ndarray:
    """Paint an image from its dashes and markers (one contrast each for targets and others), uint8."""
    half = options.paddle_length + math.ceil(options.paddle_thickness) + margin
    canvas = np.zeros((options.size + 2 * half, options.size + 2 * half))
    snake = options.snake_contrasts[0]
    for dashes, contrast in ((targets, options.paddle_contrasts[0] * snake), (others, snake)):
        for row, column, angle, _, _ in dashes:
            stamp = _stamp(angle, options.paddle_length, options.paddle_thickness, half, options.antialias)
            window = canvas[row : row + 2 * half + 1, column : column + 2 * half + 1]
            np.maximum(window, stamp * contrast, out=window)
    image = canvas[half:-half, half:-half]
    for centre in markers:
        image = np.maximum(image, _disc(options.size, centre, options.marker_radius, options.antialias))
    return (image * (255 / image.max()) + 0.5).astype(np.uint8)
