"""Paint a Pathfinder image from its dashes and markers. Compiled with numba; dashes: see ``pathfinder_growth``."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit


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
