"""How a Pathfinder image grows: two long paths, then short distractors. Compiled with numba.

A dash (paddle) is a row ``(row, column, direction, path)`` of an int64 array: where the centre of its stamp lies, which
stamp it is, and the path it was drawn for (0 and 1 are the long ones). It grows from a pivot: the next pivot lies
further on in its direction, and the next dash ends on a circle around that one.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from lra.batches import GOLDEN, MIX_1, mix
from lra.generators import below, uniform
from lra.generators.pathfinder_stamps import SEED_DIRECTIONS, Setup, merge, paint

RESTARTS = 100_000  # of the two long paths, where some tens suffice at LRA's sizes
_FREE = 76  # a pixel taken up to this is free for a path's first dash: ceil(k/255 - 0.3) = 0
_CLASH = 459  # 1.8 · 255: two masks may not add up to this anywhere
_MIN_FREE_SHARE = 0.01
_DEAD_END = 1e-4


class Scratch(NamedTuple):
    """The working memory of one thread, used for one image after the other.

    ``near`` is kept by widening each stamp: what would come from beyond the border lies within the widened frame.
    """

    state: np.ndarray  # (1,) uint64: the image's random stream
    taken: np.ndarray  # (size, size) uint8: 255 is taken. A path's newest dash stays out, so that the path can go on
    near: np.ndarray  # (size, size) uint8: taken, widened by a disc of radius margin; says where a head may lie
    paddles: np.ndarray  # (P, 6) int64: the dashes, each with row and column of the pivot it grew from
    contrasts: np.ndarray  # (P,) float64: contrast of each dash
    cumulative: np.ndarray  # (U,) float64: sums of the weights of the growth circle's pixels
    blocked: np.ndarray  # (size + 2·reach, size + 2·reach) uint8: pixels that are not free, with a rim of zeros
    forbidden: np.ndarray  # (size, size) uint8: pixels where a path cannot start


def make_scratch(setup: Setup, n_paddles: int) -> Scratch:
    """Allocate working memory for images of up to ``n_paddles`` dashes."""
    taken, near, forbidden = np.empty((3, setup.size, setup.size), np.uint8)
    side = setup.size + 2 * (setup.paddle_length + setup.margin)
    state, blocked = np.zeros(1, np.uint64), np.zeros((side, side), np.uint8)
    paddles, contrasts = np.zeros((n_paddles, 6), np.int64), np.zeros(n_paddles)
    return Scratch(state, taken, near, paddles, contrasts, np.empty(len(setup.circle)), blocked, forbidden)


def draw_heads(seed: int, first: int, count: int, n_margins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw what comes first for each image: uint8 labels, int64 which margin, uint64 streams after it, ``(count,)``."""
    index = np.arange(first, first + count, dtype=np.uint64)
    states = mix(mix(np.array([seed], np.uint64) + GOLDEN) ^ mix(index * GOLDEN + MIX_1))
    labels = (mix(states + GOLDEN) >> np.uint64(11)) * 2.0**-53 * 2
    margins = (mix(states + GOLDEN + GOLDEN) >> np.uint64(11)) * 2.0**-53 * n_margins
    return labels.astype(np.uint8), margins.astype(np.int64), states + GOLDEN + GOLDEN


@njit(nogil=True, cache=True)
def _inside(size, row, column):
    return 0 <= row < size and 0 <= column < size


@njit(nogil=True, cache=True)
def _clashes(taken, stamp, row, column, unit):
    """Return whether this mask and what is taken add up to 1.8 or more anywhere."""
    size, side = taken.shape[0], stamp.shape[0]
    top, left = row - side // 2, column - side // 2
    for i in range(max(0, -top), min(side, size - top)):
        for j in range(max(0, -left), min(side, size - left)):
            a, b = int(taken[top + i, left + j]), int(stamp[i, j])
            if a + b > _CLASH or (a + b == _CLASH and unit[a] + unit[b] >= 1.8):
                return True
    return False


@njit(nogil=True, cache=True)
def _put(paddles, n, row, column, direction, path, pivot_row, pivot_column):
    paddles[n, 0], paddles[n, 1], paddles[n, 2], paddles[n, 3] = row, column, direction, path
    paddles[n, 4], paddles[n, 5] = pivot_row, pivot_column


@njit(nogil=True, cache=True)
def _take(scratch, setup, n):
    """Take the room of dash ``n``."""
    row, column, direction = scratch.paddles[n, 0], scratch.paddles[n, 1], scratch.paddles[n, 2]
    merge(scratch.taken, setup.mask[direction], row, column)
    merge(scratch.near, setup.wide_mask[direction], row, column)


@njit(nogil=True, cache=True)
def _grow(scratch, setup, last, n):
    """Let dash ``last`` be followed by a new one, number ``n``; return whether there is room for it."""
    paddles, circle, unit, cumulative = scratch.paddles, setup.circle, setup.unit, scratch.cumulative
    direction, step = paddles[last, 2], setup.paddle_length + 2 * setup.margin
    weights, near = setup.turn_weight[direction], scratch.near
    row = math.ceil(paddles[last, 4] + step * setup.ahead[direction, 0])
    column = math.ceil(paddles[last, 5] + step * setup.ahead[direction, 1])
    total = 0.0
    for u in range(circle.shape[0]):
        y, x = row + circle[u, 0], column + circle[u, 1]
        if weights[u] > 0.0 and _inside(near.shape[0], y, x):
            total += weights[u] * (1.0 - unit[near[y, x]])
        cumulative[u] = total
    if total < _DEAD_END:
        return False
    for _ in range(setup.segment_retries + 1):
        threshold = uniform(scratch.state) * total
        u = 0
        while cumulative[u] <= threshold:
            u += 1
        y, x = row + circle[u, 0], column + circle[u, 1]
        if not _clashes(scratch.taken, setup.mask[SEED_DIRECTIONS + u], y, x, unit):
            _take(scratch, setup, last)
            _put(paddles, n, y, x, SEED_DIRECTIONS + u, paddles[last, 3], row, column)
            return True
    return False


@njit(nogil=True, cache=True)
def _begin(paddles, setup, n, row, column, direction, path):
    """Begin a path with dash ``n``, its tail at (row, column); return whether its head and pivot are in the image."""
    length = setup.paddle_length
    reach = length + setup.margin
    head_row = math.ceil(row + length * setup.ahead[direction, 0])
    head_column = math.ceil(column + length * setup.ahead[direction, 1])
    pivot_row = math.ceil(head_row + reach * setup.back[direction, 0])
    pivot_column = math.ceil(head_column + reach * setup.back[direction, 1])
    _put(paddles, n, row, column, direction, path, pivot_row, pivot_column)
    return _inside(setup.size, head_row, head_column) and _inside(setup.size, pivot_row, pivot_column)


@njit(nogil=True, cache=True)
def _begin_first(scratch, setup, path):
    """Begin long path 0, which ``path`` is, in the middle of the image; return whether there is room.

    The forbidden frame is a rectangle, so the pixels whose footprint stays clear of it are one too.
    """
    frame = max(2 * setup.seed_distance, setup.padding)
    for _ in range(setup.segment_retries + 1):
        direction = below(scratch.state, SEED_DIRECTIONS)
        footprint = setup.seed_footprint[direction, : setup.seed_footprint_count[direction]]
        if footprint.shape[0] == 0:
            return False
        top, left = frame - footprint[:, 0].min(), frame - footprint[:, 1].min()
        height = setup.size - frame - footprint[:, 0].max() - top
        width = setup.size - frame - footprint[:, 1].max() - left
        if height <= 0 or width <= 0:
            return False
        row, column = top + below(scratch.state, height), left + below(scratch.state, width)
        if _begin(scratch.paddles, setup, path, row, column, direction, path):
            return True
    return False


@njit(nogil=True, cache=True)
def _begin_second(scratch, setup, path):
    """Begin long path 1, which ``path`` is, at the seed distance from path 0's start; return whether there is room."""
    for _ in range(setup.segment_retries + 1):
        direction = below(scratch.state, SEED_DIRECTIONS)
        bearing = below(scratch.state, 360) * math.pi / 180
        row = int(np.rint(scratch.paddles[0, 0] + setup.seed_distance * math.sin(bearing)))
        column = int(np.rint(scratch.paddles[0, 1] + setup.seed_distance * math.cos(bearing)))
        if _begin(scratch.paddles, setup, path, row, column, direction, path):
            return True
    return False


@njit(nogil=True, cache=True)
def _block(taken, blocked):
    """Mark the blocked pixels, the image's edge among them; return how many are free when the edge is not counted."""
    size, rim, n_free = taken.shape[0], (blocked.shape[0] - taken.shape[0]) // 2, 0
    for y in range(size):
        for x in range(size):
            busy = taken[y, x] > _FREE
            n_free += not busy
            blocked[y + rim, x + rim] = busy or y == 0 or x == 0 or y == size - 1 or x == size - 1
    return n_free


@njit(nogil=True, cache=True)
def _forbid(blocked, footprint, forbidden):
    """Mark the pixels where a path's first dash would need a blocked one; return how many are left."""
    size, rim = forbidden.shape[0], (blocked.shape[0] - forbidden.shape[0]) // 2
    forbidden[:] = 0
    for k in range(footprint.shape[0]):
        down, right = rim + footprint[k, 0], rim + footprint[k, 1]
        for y in range(size):
            for x in range(size):
                forbidden[y, x] |= blocked[y + down, x + right]
    return size * size - np.sum(forbidden)


@njit(nogil=True, cache=True)
def _begin_distractor(scratch, setup, n, path):
    """Begin a distractor with dash ``n`` anywhere that is free; return whether there is room."""
    size, forbidden = setup.size, scratch.forbidden
    if _block(scratch.taken, scratch.blocked) < _MIN_FREE_SHARE * size * size:
        return False
    for _ in range(setup.segment_retries + 1):
        direction = below(scratch.state, SEED_DIRECTIONS)
        footprint = setup.seed_footprint[direction, : setup.seed_footprint_count[direction]]
        n_left = _forbid(scratch.blocked, footprint, forbidden) if footprint.shape[0] > 0 else 0
        if n_left == 0:
            return False
        pixel, left = -1, below(scratch.state, n_left)
        while left >= 0:
            pixel += 1
            left -= 1 - int(forbidden[pixel // size, pixel % size])
        if _begin(scratch.paddles, setup, n, pixel // size, pixel % size, direction, path):
            return True
    return False


@njit(nogil=True, cache=True)
def _pick(values, state):
    return values[below(state, values.shape[0])]


@njit(nogil=True, cache=True)
def _clear(taken, frame):
    """Free all but a frame."""
    taken[:] = 255
    taken[frame : taken.shape[0] - frame, frame : taken.shape[1] - frame] = 0


@njit(nogil=True, cache=True)
def _draw_pair(scratch, setup):
    """Grow the two long paths, a dash of each in turn; return False when one of them gets stuck.

    Fills dashes 0, 2, … (path 0) and 1, 3, … (path 1).
    """
    _clear(scratch.taken, setup.padding)
    _clear(scratch.near, setup.padding + setup.margin)
    state, snakes = scratch.state, setup.snake_contrasts
    first, second = below(state, 2 * snakes.shape[0]), below(state, 2 * snakes.shape[0] - 1)
    second += second >= first  # two of the doubled list, without putting back
    shades = (snakes[first % snakes.shape[0]], snakes[second % snakes.shape[0]])
    for path in range(2):
        if not (_begin_first(scratch, setup, path) if path == 0 else _begin_second(scratch, setup, path)):
            return False
        scratch.contrasts[path] = shades[path] * _pick(setup.paddle_contrasts, state)
    for n in range(2, 2 * setup.contour_length, 2):
        contrast = _pick(setup.paddle_contrasts, state)
        for path in range(2):
            if not _grow(scratch, setup, n - 2 + path, n + path):
                return False
            scratch.contrasts[n + path] = contrast * shades[path]
    _take(scratch, setup, 2 * setup.contour_length - 1)  # of the two last dashes only path 1's, as in the reference
    return True


@njit(nogil=True, cache=True)
def _copy(source, target):
    """Copy values, by loops: a slice assignment compiles for ten seconds, as it can raise an error with a text."""
    for i in range(source.shape[0]):
        for j in range(target.shape[1]):
            target[i, j] = source[i, j]


@njit(nogil=True, cache=True)
def _go_on(scratch, setup, n):
    """Grow a distractor that began with dash ``n``; return False when it gets stuck, its room still taken."""
    for k in range(n + 1, n + setup.distractor_length):
        scratch.contrasts[k] = _pick(setup.snake_contrasts, scratch.state)
        if not _grow(scratch, setup, k - 1, k):
            return False
    _take(scratch, setup, n + setup.distractor_length - 1)
    return True


@njit(nogil=True, cache=True)
def _draw_distractors(scratch, setup, n, path):
    """Grow distractors, from dash and path of these numbers on; return how many dashes and paths the image then has."""
    taken, near = scratch.taken.copy(), scratch.near.copy()
    for _ in range(setup.distractors):
        for _ in range(setup.distractor_retries + 1):
            scratch.contrasts[n] = _pick(setup.snake_contrasts, scratch.state)
            if not _begin_distractor(scratch, setup, n, path):
                continue
            if _go_on(scratch, setup, n):
                n, path = n + setup.distractor_length, path + 1
                _copy(scratch.taken, taken)
                _copy(scratch.near, near)
                break
            _copy(taken, scratch.taken)
            _copy(near, scratch.near)
    return n, path


@njit(nogil=True, cache=True)
def draw_images(made, chosen, states, setup, scratch):
    """Draw the chosen images of a run, all of one margin, into ``made``, ``Pictures`` with labels.

    ``states`` are the streams of all images, as ``draw_heads`` leaves them. Returns the place of the first image whose
    long paths found no room in ``RESTARTS`` attempts, or -1.
    """
    contour, paddles = setup.contour_length, scratch.paddles
    canvas, discs = np.empty((setup.size, setup.size)), np.empty((setup.size, setup.size), np.uint8)
    for k in chosen:
        scratch.state[0] = states[k]
        attempt = 0
        while not _draw_pair(scratch, setup):
            attempt += 1
            if attempt > RESTARTS:
                return k
        # Read, not written here: for a number in the code numba compiles once more all that it is handed on to.
        n, path = _draw_distractors(scratch, setup, 2 * contour, paddles[1, 3] + 1)
        made.counts[k, 0], made.counts[k, 1] = n, path
        _copy(paddles[:n], made.paddles[k])
        origin = below(scratch.state, 2)
        terminal = 2 * contour - 2 + (origin if made.labels[k] == 1 else 1 - origin)
        for axis in range(2):
            made.markers[k, 0, axis], made.markers[k, 1, axis] = paddles[origin, axis], paddles[terminal, axis]
        paint(made.images[k], paddles[:n], scratch.contrasts, made.markers[k], setup, canvas, discs)
    return -1
