"""What every Pathfinder image of one set of options shares: paddle and marker stamps, turn weights, trigonometry.

A paddle takes one of finitely many directions: 360 whole degrees for the first paddle of a path, and for a grown one
the directions from a pixel to the pixels of a circle around it. So all stamps are drawn once, here, and growing a
path only looks them up. Drawing follows the reference generator: a line on a canvas enlarged by `antialias`, shrunk
with Pillow's Lanczos filter after the canvas was stretched to 0–255 (what `scipy.misc.imresize` used to do).

Shape legend: A directions = 360 + U, U pixels on the growth circle, S = 2·half + 1 the side of a stamp, C border
classes of a marker, Q the side of a marker stamp. Coordinates are (row, column).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SEED_DIRECTIONS = 360
_LANCZOS_REACH = 3  # pixels of the shrunk image that the Lanczos window reaches to each side


class Stamps(NamedTuple):
    """Everything that growing and painting look up, for one paddle margin (a NamedTuple because numba reads those)."""

    size: int
    padding: int
    length: int
    margin: int
    half: int
    """Half of a stamp's side, in pixels."""
    sine: np.ndarray
    """`(A,)` row part of each direction."""
    cosine: np.ndarray
    """`(A,)` column part of each direction."""
    back_sine: np.ndarray
    """`(360,)` row part of the seed directions turned by π."""
    back_cosine: np.ndarray
    line: np.ndarray
    """`(A, S, S)` uint8: the paddle, from the stamp's centre; a grown paddle runs back from its head to the pivot."""
    mask: np.ndarray
    """`(A, S, S)` uint8: the paddle widened by the margin; 255 is fully taken."""
    wide_mask: np.ndarray
    """`(A, S + 2·margin, S + 2·margin)` uint8: the mask widened once more, by the disc of radius margin."""
    circle: np.ndarray
    """`(U, 2)` int64: pixels of the growth circle relative to the pivot."""
    turn_weight: np.ndarray
    """`(A, U)` float64: cos² of the turn from direction a to circle pixel u, before the mask has its say."""
    seed_footprint: np.ndarray
    """`(360, ·, 2)` int64: pixels, relative to its tail, that a seed paddle must find free."""
    seed_footprint_count: np.ndarray
    """`(360,)` int64: how many rows of `seed_footprint` count; 0: no path starts in this direction."""
    marker: np.ndarray
    """`(C, C, Q, Q)` uint8: the marker, by how close its centre is to the border in rows and in columns."""
    unit: np.ndarray
    """`(256,)` float64: k / 255 as the single-precision number that the reference generator stores."""


def translate(start: tuple[int, int], angle: float, distance: float) -> tuple[int, int]:
    """Return the pixel `distance` away from `start` along `angle` (radians), rounded up in both coordinates."""
    return (math.ceil(start[0] + distance * math.sin(angle)), math.ceil(start[1] + distance * math.cos(angle)))


def turn_back(angle: float) -> float:
    """Turn an angle by π and keep it within [−π, π]."""
    return angle + math.pi if angle < 0 else angle - math.pi


def shrink(canvas: np.ndarray, side: tuple[int, int]) -> np.ndarray:
    """Stretch `canvas` to 0–255, then shrink it to `side` (rows, columns) with Pillow's Lanczos filter; uint8."""
    low, high = float(canvas.min()), float(canvas.max())
    scale = 255.0 / (high - low) if high > low else 1.0
    stretched = ((canvas - low) * scale + 0.5).astype(np.uint8)
    return np.asarray(Image.fromarray(stretched).resize((side[1], side[0]), Image.Resampling.LANCZOS))


def disc_offsets(radius: int) -> np.ndarray:
    """Return `(·, 2)` the pixels within `radius` of the origin."""
    rows, columns = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    inside = rows**2 + columns**2 <= radius**2
    return np.stack([rows[inside], columns[inside]], axis=1).astype(np.int64)


def circle_offsets(radius: int) -> np.ndarray:
    """Return `(U, 2)` the distinct pixels on a walk round a circle of `radius`, in steps of one pixel of arc."""
    angles = np.arange(math.ceil(2 * math.pi * radius)) / radius
    walk = np.stack([np.floor(radius * np.sin(angles)), np.floor(radius * np.cos(angles))], axis=1)
    return np.unique(walk.astype(np.int64), axis=0)


def _dilate(canvas: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Widen the nonzero pixels of `canvas` by a structuring element symmetric about the origin."""
    reach = int(np.abs(offsets).max())
    padded = np.pad(canvas, reach)
    rows, columns = canvas.shape
    wide = np.zeros_like(canvas)
    for row, column in offsets + reach:
        np.maximum(wide, padded[row : row + rows, column : column + columns], out=wide)
    return wide


def draw_paddle(
    angle: float, length: int, thickness: float, margin: int, antialias: int, half: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a paddle from the centre of a stamp along `angle`.

    Returns:
        The line and its widened mask, each `(2·half + 1, 2·half + 1)` uint8.
    """
    centre = half * antialias
    big = Image.new("L", (2 * centre + 1, 2 * centre + 1), 0)
    end = translate((centre, centre), angle, length * antialias)
    width = round(thickness * antialias)
    ImageDraw.Draw(big).line([(centre, centre), (end[1], end[0])], fill=255, width=width)
    canvas = np.asarray(big)
    side = (2 * half + 1, 2 * half + 1)
    return shrink(canvas, side), shrink(_dilate(canvas, disc_offsets(margin * antialias)), side)


def draw_marker(size: int, centre: tuple[int, int], radius: float, antialias: int) -> np.ndarray:
    """Draw one marker disc on a whole image, `(size, size)` uint8."""
    axis = np.arange(size * antialias)
    rows = (axis - centre[0] * antialias)[:, None]
    columns = (axis - centre[1] * antialias)[None, :]
    return shrink((rows**2 + columns**2 <= (radius * antialias) ** 2).astype(np.float64), (size, size))


def _marker_stamps(size: int, radius: float, antialias: int) -> np.ndarray:
    """Draw the marker once for each class of closeness to the border.

    The Lanczos window is cut off at the border, so a marker closer to it than its radius plus the window's reach is
    drawn differently; `marker_class` names the class of a coordinate.

    Returns:
        `(C, C, Q, Q)` uint8, Q = 2·reach + 1; pixels outside the image are 0.
    """
    reach = math.ceil(radius) + _LANCZOS_REACH
    positions = marker_positions(size, reach)
    stamps = np.zeros((len(positions), len(positions), 2 * reach + 1, 2 * reach + 1), np.uint8)
    for i, row in enumerate(positions):
        for j, column in enumerate(positions):
            image = np.pad(draw_marker(size, (row, column), radius, antialias), reach)
            stamps[i, j] = image[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
    return stamps


def marker_positions(size: int, reach: int) -> list[int]:
    """Return one coordinate for each border class: all those close to a border, and one in the middle."""
    if size <= 2 * reach + 1:
        return list(range(size))
    return [*range(reach), reach, *range(size - reach, size)]


def _turn_weights(angles: np.ndarray, circle_angles: np.ndarray, continuity: float) -> np.ndarray:
    """Return `(A, U)` max(cos(min(continuity·δ, π/2)), 0)², δ in [0, π] the turn between two directions."""
    difference = np.abs(circle_angles[None, :] - angles[:, None])
    turn = np.minimum(difference, 2 * math.pi - difference)
    weight: np.ndarray = np.maximum(np.cos(np.minimum(turn * continuity, 0.5 * math.pi)), 0.0) ** 2
    return weight


def _seed_footprints(mask: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """List the pixels a seed paddle must find free: those its mask takes fully, moved by (1, 1) and cut at `reach`.

    The move and the cut are the reference generator's: it draws the mask one pixel off the centre of a smaller
    canvas. So is this: it looks for free pixels with OpenCV's dilation, whose value is −∞ where the whole footprint
    lies outside the image, and gives up when it sees a negative one. A direction whose footprint leaves the image at
    some corner can therefore never start a path. At 32 pixels that is most directions, and why most distractors fail
    there.

    Returns:
        `(360, ·, 2)` the pixels, and `(360,)` how many count, 0 for a direction that cannot be used.
    """
    half = mask.shape[1] // 2
    found = []
    for stamp in mask:
        offsets = np.argwhere(stamp == 255) - half + 1
        offsets = offsets[(np.abs(offsets) <= reach).all(axis=1)]
        covers_corners = all(
            (offsets * np.array([down, right]) >= 0).all(axis=1).any() for down in (1, -1) for right in (1, -1)
        )
        found.append(offsets if covers_corners else offsets[:0])
    counts = np.array([len(offsets) for offsets in found], np.int64)
    footprint = np.zeros((len(mask), max(1, int(counts.max())), 2), np.int64)
    for row, offsets in zip(footprint, found, strict=True):
        row[: len(offsets)] = offsets
    return footprint, counts


def draw_stamps(
    size: int,
    padding: int,
    length: int,
    thickness: float,
    margin: int,
    marker_radius: float,
    continuity: float,
    antialias: int,
) -> Stamps:
    """Draw all stamps of one paddle margin.

    Args:
        size: Side of the image in pixels.
        padding: Width of the taken border in pixels.
        length: Length of a paddle in pixels.
        thickness: Width of a paddle in pixels; `thickness * antialias` must be whole.
        margin: Free space around a paddle in pixels.
        marker_radius: Radius of the markers in pixels.
        continuity: How sharply turns are disfavoured.
        antialias: Enlargement at which stamps are drawn.

    Returns:
        The stamps and tables.
    """
    half = length + math.ceil(thickness) + margin
    circle = circle_offsets(length + margin)
    seed_angles = np.arange(-180, 180) * math.pi / 180
    circle_angles = np.arctan2(circle[:, 0], circle[:, 1])
    angles = np.concatenate([seed_angles, circle_angles])
    drawn = [*seed_angles, *map(turn_back, circle_angles)]
    stamps = [draw_paddle(float(angle), length, thickness, margin, antialias, half) for angle in drawn]
    mask = np.stack([stamp[1] for stamp in stamps])
    footprint, counts = _seed_footprints(mask[:SEED_DIRECTIONS], length + margin)
    back = [turn_back(float(angle)) for angle in seed_angles]
    return Stamps(
        size=size,
        padding=padding,
        length=length,
        margin=margin,
        half=half,
        sine=_each(math.sin, angles),
        cosine=_each(math.cos, angles),
        back_sine=_each(math.sin, back),
        back_cosine=_each(math.cos, back),
        line=np.stack([stamp[0] for stamp in stamps]),
        mask=mask,
        wide_mask=np.stack([_dilate(np.pad(stamp, margin), disc_offsets(margin)) for stamp in mask]),
        circle=circle,
        turn_weight=_turn_weights(angles, circle_angles, continuity),
        seed_footprint=footprint,
        seed_footprint_count=counts,
        marker=_marker_stamps(size, marker_radius, antialias),
        unit=(np.arange(256) / 255.0).astype(np.float32).astype(np.float64),
    )


def _each(function: Callable[[float], float], values: list[float] | np.ndarray) -> np.ndarray:
    """Apply a function of `math` (not numpy's vector code, whose last digit depends on the machine) to each value."""
    return np.array([function(float(value)) for value in values])
