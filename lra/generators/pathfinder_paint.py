"""Painting a Pathfinder image from its paddles and markers. Compiled with numba.

Paddles: see `pathfinder_growth`.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def merge(taken, stamp, row, column):  # type: ignore[no-untyped-def]
    """Take the pixels of a stamp: the larger of the two occupancies, cut off at the border."""
    size, side = taken.shape[0], stamp.shape[0]
    top, left = row - side // 2, column - side // 2
    for i in range(max(0, -top), min(side, size - top)):
        for j in range(max(0, -left), min(side, size - left)):
            taken[top + i, left + j] = max(taken[top + i, left + j], stamp[i, j])


@njit(nogil=True, cache=True)
def paint_marker(canvas, stamps, row, column):  # type: ignore[no-untyped-def]
    """Paint the marker at a pixel into the uint8 canvas, in the shape it has that close to the border."""
    size, classes = stamps.size, stamps.marker.shape[0]
    i, j = row, column
    if classes < size:
        middle = classes // 2
        i = min(row, middle) if row < size - middle else row - size + classes
        j = min(column, middle) if column < size - middle else column - size + classes
    merge(canvas, stamps.marker[i, j], row, column)


@njit(nogil=True, cache=True)
def paint(image, paddles, contrasts, n, marked, stamps, canvas, markers):  # type: ignore[no-untyped-def]
    """Paint paddles and markers and stretch the result to 0–255, uint8."""
    size, side = stamps.size, 2 * stamps.half + 1
    canvas[:] = 0.0
    for p in range(n):
        stamp = stamps.line[paddles[p, 2]]
        top, left = paddles[p, 0] - stamps.half, paddles[p, 1] - stamps.half
        for i in range(max(0, -top), min(side, size - top)):
            for j in range(max(0, -left), min(side, size - left)):
                ink = float(np.float32(stamp[i, j] / 255.0 * contrasts[p]))
                canvas[top + i, left + j] = max(canvas[top + i, left + j], ink)
    markers[:] = 0
    for tip in range(2):
        paint_marker(markers, stamps, marked[tip, 0], marked[tip, 1])
    for y in range(size):
        for x in range(size):
            canvas[y, x] = max(canvas[y, x], markers[y, x] / 255.0)
    low, high = canvas.min(), canvas.max()
    scale = 255.0 / (high - low)
    for y in range(size):
        for x in range(size):
            image[y, x] = np.uint8((canvas[y, x] - low) * scale + 0.5)
