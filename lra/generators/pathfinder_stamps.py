"""What the Pathfinder images of one set of options share: stamps of dashes and markers, and tables for growing paths.

A dash (paddle) points in one of finitely many directions: 360 whole degrees for the first dash of a path; for the
others, the directions from a pixel to the pixels of a circle around it. So all stamps are drawn once, here, and
growing a path only looks them up. They are drawn as the reference generator does it: a line on a canvas enlarged by
``antialias``, stretched to 0–255 and shrunk with Pillow's Lanczos filter (what ``scipy.misc.imresize`` used to do).

Shape legend: A directions = 360 + U, U pixels on the growth circle, S = 2·half + 1 the side of a stamp, C border
classes of a marker, Q the side of a marker stamp. Coordinates are (row, column), angles radians from right to down.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from lra.tasks.pathfinder import PathfinderOptions


SEED_DIRECTIONS = 360
_LANCZOS_REACH = 3  # pixels of the shrunk image that the Lanczos window reaches to each side


class Setup(NamedTuple):
    """What growing and painting look up for one paddle margin. A named tuple, because numba reads those.

    The fields without a text are those of ``PathfinderOptions``; the integers among them are copied from there.
    """

    size: int
    padding: int
    paddle_length: int
    seed_distance: int
    contour_length: int
    segment_retries: int
    distractors: int
    distractor_length: int
    distractor_retries: int
    snake_contrasts: np.ndarray
    paddle_contrasts: np.ndarray
    margin: int
    half: int  # half of a stamp's side, in pixels
    angle: np.ndarray  # (A,) float64: of each stamp as it is drawn. A grown dash runs back from its head to the pivot
    ahead: np.ndarray  # (A, 2) float64: unit vector of the direction in which the path goes on
    back: np.ndarray  # (A, 2) float64: unit vector of the opposite direction
    line: np.ndarray  # (A, S, S) uint8: the dash, from the stamp's centre
    mask: np.ndarray  # (A, S, S) uint8: the dash widened by the margin; 255 is fully taken
    wide_mask: np.ndarray  # (A, S + 2·margin, S + 2·margin) uint8: the mask widened again, by the disc of radius margin
    circle: np.ndarray  # (U, 2) int64: pixels of the growth circle, relative to the pivot
    turn_weight: np.ndarray  # (A, U) float64: weight of a turn from direction a to circle pixel u if nothing is taken
    seed_footprint: np.ndarray  # (360, ·, 2) int64: pixels, relative to its tail, that a path's first dash needs free
    seed_footprint_count: np.ndarray  # (360,) int64: how many of its rows count; 0: no path starts in this direction
    marker: np.ndarray  # (C, C, Q, Q) uint8: the marker, by how close its centre is to the border in rows and columns
    unit: np.ndarray  # (256,) float64: k / 255 as the single-precision number that the reference generator stores


def _unit_vectors(angles: Iterable[float]) -> np.ndarray:
    """Return ``(A, 2)`` sines and cosines by ``math``: the last digit of numpy's depends on the machine."""
    return np.array([(math.sin(angle), math.cos(angle)) for angle in angles])


def shrink(canvas: np.ndarray, side: tuple[int, int]) -> np.ndarray:
    """Stretch ``canvas`` to 0–255, then shrink it to ``side`` (rows, columns) with Pillow's Lanczos filter; uint8."""
    low, high = float(canvas.min()), float(canvas.max())
    scale = 255.0 / (high - low) if high > low else 1.0
    stretched = ((canvas - low) * scale + 0.5).astype(np.uint8)
    return np.asarray(Image.fromarray(stretched).resize((side[1], side[0]), Image.Resampling.LANCZOS))


def _widen(canvas: np.ndarray, radius: int) -> np.ndarray:
    """Widen the nonzero pixels of ``canvas`` by a disc."""
    rows, columns = canvas.shape
    padded, wide = np.pad(canvas, radius), np.zeros_like(canvas)
    for row in range(2 * radius + 1):
        for column in range(2 * radius + 1):
            if (row - radius) ** 2 + (column - radius) ** 2 <= radius**2:
                np.maximum(wide, padded[row : row + rows, column : column + columns], out=wide)
    return wide


def _draw_dash(options: PathfinderOptions, margin: int, half: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a dash from the centre along ``angle``, and its widened mask, each ``(S, S)`` uint8."""
    scale, side = options.antialias, (2 * half + 1, 2 * half + 1)
    centre, length = half * scale, options.paddle_length * scale
    big = Image.new("L", (2 * centre + 1, 2 * centre + 1), 0)
    row, column = math.ceil(centre + length * math.sin(angle)), math.ceil(centre + length * math.cos(angle))
    ImageDraw.Draw(big).line([centre, centre, column, row], fill=255, width=round(options.paddle_thickness * scale))
    canvas = np.asarray(big)
    return shrink(canvas, side), shrink(_widen(canvas, margin * scale), side)


def draw_marker(size: int, centre: tuple[int, int], radius: float, antialias: int) -> np.ndarray:
    """Draw one marker, a disc, on a whole image, ``(size, size)`` uint8."""
    axis = np.arange(size * antialias)
    rows = (axis - centre[0] * antialias)[:, None]
    columns = (axis - centre[1] * antialias)[None, :]
    return shrink((rows**2 + columns**2 <= (radius * antialias) ** 2).astype(np.float64), (size, size))


def draw_markers(size: int, radius: float, antialias: int) -> np.ndarray:
    """Draw the marker once for each class of closeness to the border: ``(C, C, Q, Q)`` uint8, outside the image 0.

    The Lanczos window is cut off at the border. So a marker looks different where its centre is closer to the border
    than its radius and the window's reach together: each such row is a class, all other rows are one. Columns likewise.
    """
    reach = math.ceil(radius) + _LANCZOS_REACH
    positions = sorted({*range(min(reach + 1, size)), *range(max(0, size - reach), size)})
    stamps = np.zeros((len(positions), len(positions), 2 * reach + 1, 2 * reach + 1), np.uint8)
    for i, row in enumerate(positions):
        for j, column in enumerate(positions):
            image = np.pad(draw_marker(size, (row, column), radius, antialias), reach)
            stamps[i, j] = image[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
    return stamps


def _growth_circle(radius: int) -> np.ndarray:
    """Return ``(U, 2)`` the distinct pixels on a walk round a circle, in steps of one pixel of arc."""
    angles = np.arange(math.ceil(2 * math.pi * radius)) / radius
    walk = np.stack([np.floor(radius * np.sin(angles)), np.floor(radius * np.cos(angles))], axis=1)
    return np.unique(walk.astype(np.int64), axis=0)


def _turn_weights(angles: np.ndarray, circle_angles: np.ndarray, continuity: float) -> np.ndarray:
    """Return ``(A, U)`` max(cos(min(continuity·δ, π/2)), 0)², δ in [0, π] the turn between two directions."""
    difference = np.abs(circle_angles[None, :] - angles[:, None])
    turn = np.minimum(difference, 2 * math.pi - difference)
    weight: np.ndarray = np.maximum(np.cos(np.minimum(turn * continuity, 0.5 * math.pi)), 0.0) ** 2
    return weight


def _seed_footprints(mask: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """List the pixels that a path's first dash must find free, relative to its tail.

    They are those that its mask takes fully, moved by (1, 1) and cut at ``reach``. The move and the cut are the
    reference generator's, which draws this mask one pixel off the centre of a smaller canvas. It looks for free pixels
    with OpenCV's dilation, whose value is −∞ where the whole footprint lies outside the image, and gives up when it
    sees a negative value. So no path can start in a direction whose footprint leaves the image at some corner. At 32
    pixels that holds for most directions, and is why most distractors fail there: of these none of the pixels count.
    """
    found = []
    for stamp in mask:
        offsets = np.argwhere(stamp == 255) - stamp.shape[0] // 2 + 1
        offsets = offsets[(np.abs(offsets) <= reach).all(axis=1)]
        at_corners = [(offsets * (down, right) >= 0).all(axis=1).any() for down in (1, -1) for right in (1, -1)]
        found.append(offsets if all(at_corners) else offsets[:0])
    counts = np.array([len(offsets) for offsets in found], np.int64)
    footprint = np.zeros((len(mask), max(1, int(np.max(counts))), 2), np.int64)
    for row, offsets in zip(footprint, found, strict=True):
        row[: len(offsets)] = offsets
    return footprint, counts


@lru_cache(maxsize=16)
def make_setup(options: PathfinderOptions, margin: int) -> Setup:
    """Draw all stamps and compute all tables for one paddle margin (pixels)."""
    half = options.paddle_length + math.ceil(options.paddle_thickness) + margin
    circle = _growth_circle(options.paddle_length + margin)
    circle_angles = np.arctan2(circle[:, 0], circle[:, 1])
    ahead = np.concatenate([np.arange(-180, 180) * math.pi / 180, circle_angles])
    back = [angle + math.pi if angle < 0 else angle - math.pi for angle in ahead.tolist()]  # within [−π, π]
    angle = np.array([*ahead[:SEED_DIRECTIONS], *back[SEED_DIRECTIONS:]])
    line, mask = map(np.stack, zip(*(_draw_dash(options, margin, half, float(a)) for a in angle), strict=True))
    footprint, counts = _seed_footprints(mask[:SEED_DIRECTIONS], options.paddle_length + margin)
    return Setup(
        **{name: getattr(options, name) for name in Setup._fields[:9]},
        snake_contrasts=np.array(options.snake_contrasts, np.float64),
        paddle_contrasts=np.array(options.paddle_contrasts, np.float64),
        margin=margin,
        half=half,
        angle=angle,
        ahead=_unit_vectors(ahead),
        back=_unit_vectors(back),
        line=line,
        mask=mask,
        wide_mask=np.stack([_widen(np.pad(stamp, margin), margin) for stamp in mask]),
        circle=circle,
        turn_weight=_turn_weights(ahead, circle_angles, options.continuity),
        seed_footprint=footprint,
        seed_footprint_count=counts,
        marker=draw_markers(options.size, options.marker_radius, options.antialias),
        unit=(np.arange(256) / 255.0).astype(np.float32).astype(np.float64),
    )


@njit(nogil=True, cache=True)
def merge(canvas, stamp, row, column):
    """Lay a stamp on a canvas, its middle at (row, column), cut off at the border: the larger value stays."""
    size, side = canvas.shape[0], stamp.shape[0]
    top, left = row - side // 2, column - side // 2
    for i in range(max(0, -top), min(side, size - top)):
        for j in range(max(0, -left), min(side, size - left)):
            canvas[top + i, left + j] = max(canvas[top + i, left + j], stamp[i, j])


@njit(nogil=True, cache=True)
def paint_marker(canvas, marker, row, column):
    """Paint the marker at a pixel of a uint8 canvas, in the shape it has that close to the border."""
    size, classes = canvas.shape[0], marker.shape[0]
    middle = classes // 2
    i = min(row, middle) if row < size - middle else row - size + classes
    j = min(column, middle) if column < size - middle else column - size + classes
    merge(canvas, marker[i, j], row, column)


@njit(nogil=True, cache=True)
def paint(image, paddles, contrasts, tips, setup, canvas, discs):
    """Paint dashes and the two marked tips, and stretch the result to 0–255; overwrites ``canvas`` and ``discs``."""
    size, side = setup.size, 2 * setup.half + 1
    discs[:] = 0
    for tip in range(2):
        paint_marker(discs, setup.marker, tips[tip, 0], tips[tip, 1])
    for y in range(size):
        for x in range(size):
            canvas[y, x] = discs[y, x] / 255.0
    for p in range(paddles.shape[0]):
        stamp = setup.line[paddles[p, 2]]
        top, left = paddles[p, 0] - setup.half, paddles[p, 1] - setup.half
        for i in range(max(0, -top), min(side, size - top)):
            for j in range(max(0, -left), min(side, size - left)):
                ink = float(np.float32(stamp[i, j] / 255.0 * contrasts[p]))
                canvas[top + i, left + j] = max(canvas[top + i, left + j], ink)
    low, high = canvas.min(), canvas.max()
    scale = 255.0 / (high - low)
    for y in range(size):
        for x in range(size):
            image[y, x] = np.uint8((canvas[y, x] - low) * scale + 0.5)
