"""How a Pathfinder image grows: two long paths, short distractors, markers. Compiled with numba.

`taken` is the occupancy of the image, `(size, size)` uint8, 255 fully taken; a path's newest paddle stays out of it, so
that the path can go on. `near` is `taken` widened by a disc of radius margin and tells where a head may lie; it is kept
by widening each stamp. (What a stamp would widen from beyond the border lies within the widened frame.) A paddle is the
row `(row, column, direction, path)` of an int64 array: where its stamp's centre lies, which stamp it is, and the path
it was drawn for (0 and 1 the long ones). An image's random stream is keyed by (seed, index) and nothing else.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from lra.generators.pathfinder_paint import merge, paint
from lra.generators.pathfinder_stamps import SEED_DIRECTIONS, Stamps
from lra.generators.splitmix import below, start, uniform

_FREE = 76  # occupancy up to this counts as free where a seed is looked for: ceil(k/255 - 0.3) = 0
_CLASH = 459  # 1.8 · 255: two masks may not add up to this anywhere
_MIN_FREE_SHARE = 0.01
_DEAD_END = 1e-4


class Plan(NamedTuple):
    """The numbers of `PathfinderOptions` that growing needs; see there."""

    seed_distance: int
    contour_length: int
    distractor_length: int
    distractors: int
    single_paddles: int
    segment_retries: int
    distractor_retries: int
    restarts: int
    snake_contrasts: np.ndarray
    paddle_contrasts: np.ndarray


@njit(nogil=True, cache=True)
def draw_heads(seed, first, count, n_margins):  # type: ignore[no-untyped-def]
    """Draw what comes first for each image: its label and which margin it has.

    Returns:
        `(count, 2)` int64.
    """
    state = np.zeros(1, np.uint64)
    heads = np.empty((count, 2), np.int64)
    for i in range(count):
        start(state, seed, first + i)
        heads[i, 0] = below(state, 2)
        heads[i, 1] = below(state, n_margins)
    return heads


@njit(nogil=True, cache=True)
def _inside(size, row, column):  # type: ignore[no-untyped-def]
    return 0 <= row < size and 0 <= column < size


@njit(nogil=True, cache=True)
def _clashes(taken, stamp, row, column, unit):  # type: ignore[no-untyped-def]
    """Would this mask and what is taken add up to 1.8 or more anywhere?"""
    size, side = taken.shape[0], stamp.shape[0]
    top, left = row - side // 2, column - side // 2
    for i in range(max(0, -top), min(side, size - top)):
        for j in range(max(0, -left), min(side, size - left)):
            a, b = int(taken[top + i, left + j]), int(stamp[i, j])
            if a + b > _CLASH or (a + b == _CLASH and unit[a] + unit[b] >= 1.8):
                return True
    return False


@njit(nogil=True, cache=True)
def _take(taken, near, stamps, paddle):  # type: ignore[no-untyped-def]
    """Take the room of a paddle, in the occupancy and in its widened copy."""
    merge(taken, stamps.mask[paddle[2]], paddle[0], paddle[1])
    merge(near, stamps.wide_mask[paddle[2]], paddle[0], paddle[1])


@njit(nogil=True, cache=True)
def _grow(taken, near, pivot_row, pivot_column, direction, stamps, retries, state, cumulative):  # type: ignore[no-untyped-def]
    """Find the next paddle of a path.

    Returns:
        `(circle pixel or -1, pivot row, pivot column)` of the next paddle; its head is pivot + circle pixel.
    """
    step = stamps.length + 2 * stamps.margin
    row = math.ceil(pivot_row + step * stamps.sine[direction])
    column = math.ceil(pivot_column + step * stamps.cosine[direction])
    total = 0.0
    for u in range(stamps.circle.shape[0]):
        y, x = row + stamps.circle[u, 0], column + stamps.circle[u, 1]
        weight = stamps.turn_weight[direction, u]
        if weight > 0.0 and _inside(stamps.size, y, x):
            total += weight * (1.0 - stamps.unit[near[y, x]])
        cumulative[u] = total
    if total < _DEAD_END:
        return -1, row, column
    for _ in range(retries + 1):
        threshold = uniform(state) * total
        u = 0
        while cumulative[u] <= threshold:
            u += 1
        y, x = row + stamps.circle[u, 0], column + stamps.circle[u, 1]
        if not _clashes(taken, stamps.mask[SEED_DIRECTIONS + u], y, x, stamps.unit):
            return u, row, column
    return -1, row, column


@njit(nogil=True, cache=True)
def _seed_pivot(row, column, direction, stamps):  # type: ignore[no-untyped-def]
    """Return `(fits, pivot row, pivot column)` of a path whose first paddle has its tail at (row, column)."""
    reach = stamps.length + stamps.margin
    head_row = math.ceil(row + stamps.length * stamps.sine[direction])
    head_column = math.ceil(column + stamps.length * stamps.cosine[direction])
    pivot_row = math.ceil(head_row + reach * stamps.back_sine[direction])
    pivot_column = math.ceil(head_column + reach * stamps.back_cosine[direction])
    fits = _inside(stamps.size, head_row, head_column) and _inside(stamps.size, pivot_row, pivot_column)
    return fits, pivot_row, pivot_column


@njit(nogil=True, cache=True)
def _central_seed(stamps, plan, state):  # type: ignore[no-untyped-def]
    """Place the first target's tail in the middle of the image.

    The forbidden frame is a rectangle, so the pixels whose footprint stays clear of it are one too.

    Returns:
        `(found, row, column, direction, pivot row, pivot column)`.
    """
    frame = max(2 * plan.seed_distance, stamps.padding)
    for _ in range(plan.segment_retries + 1):
        direction = below(state, SEED_DIRECTIONS)
        footprint = stamps.seed_footprint[direction, : stamps.seed_footprint_count[direction]]
        if footprint.shape[0] == 0:
            break
        top, left = frame - footprint[:, 0].min(), frame - footprint[:, 1].min()
        height = stamps.size - frame - footprint[:, 0].max() - top
        width = stamps.size - frame - footprint[:, 1].max() - left
        if height <= 0 or width <= 0:
            break
        row, column = top + below(state, height), left + below(state, width)
        fits, pivot_row, pivot_column = _seed_pivot(row, column, direction, stamps)
        if fits:
            return True, row, column, direction, pivot_row, pivot_column
    return False, 0, 0, 0, 0, 0


@njit(nogil=True, cache=True)
def _second_seed(row, column, stamps, plan, state):  # type: ignore[no-untyped-def]
    """Place the second target's tail at the seed distance from the first one's; returns as `_central_seed`."""
    for _ in range(plan.segment_retries + 1):
        direction = below(state, SEED_DIRECTIONS)
        bearing = below(state, 360) * math.pi / 180
        second_row = int(np.rint(row + plan.seed_distance * math.sin(bearing)))
        second_column = int(np.rint(column + plan.seed_distance * math.cos(bearing)))
        fits, pivot_row, pivot_column = _seed_pivot(second_row, second_column, direction, stamps)
        if fits:
            return True, second_row, second_column, direction, pivot_row, pivot_column
    return False, 0, 0, 0, 0, 0


@njit(nogil=True, cache=True)
def _free_seed(taken, stamps, plan, state, blocked, forbidden):  # type: ignore[no-untyped-def]
    """Place a distractor's tail anywhere its paddle is free; returns as `_central_seed`."""
    size, reach = stamps.size, stamps.length + stamps.margin
    n_free = 0
    for y in range(size):
        for x in range(size):
            busy = taken[y, x] > _FREE
            n_free += not busy
            blocked[y + reach, x + reach] = busy or y == 0 or x == 0 or y == size - 1 or x == size - 1
    if n_free < _MIN_FREE_SHARE * size * size:
        return False, 0, 0, 0, 0, 0
    for _ in range(plan.segment_retries + 1):
        direction = below(state, SEED_DIRECTIONS)
        if stamps.seed_footprint_count[direction] == 0:
            break
        forbidden[:] = 0
        for k in range(stamps.seed_footprint_count[direction]):
            down = reach + stamps.seed_footprint[direction, k, 0]
            right = reach + stamps.seed_footprint[direction, k, 1]
            for y in range(size):
                for x in range(size):
                    forbidden[y, x] |= blocked[y + down, x + right]
        n_open = size * size - np.sum(forbidden)
        if n_open == 0:
            break
        pixel, left = -1, below(state, n_open)
        while left >= 0:
            pixel += 1
            left -= 1 - int(forbidden[pixel // size, pixel % size])
        row, column = pixel // size, pixel % size
        fits, pivot_row, pivot_column = _seed_pivot(row, column, direction, stamps)
        if fits:
            return True, row, column, direction, pivot_row, pivot_column
    return False, 0, 0, 0, 0, 0


@njit(nogil=True, cache=True)
def _put(paddles, n, row, column, direction, path):  # type: ignore[no-untyped-def]
    paddles[n, 0], paddles[n, 1], paddles[n, 2], paddles[n, 3] = row, column, direction, path


@njit(nogil=True, cache=True)
def _draw_pair(taken, near, paddles, contrasts, tips, stamps, plan, state, cumulative):  # type: ignore[no-untyped-def]
    """Grow the two targets together, a paddle of each in turn; False when one of them gets stuck.

    Fills paddles 0, 2, … (path 0) and 1, 3, … (path 1), and tips `(path, origin or terminal, row or column)`.
    """
    size, padding = stamps.size, stamps.padding
    taken[:] = 255
    taken[padding : size - padding, padding : size - padding] = 0
    reach = padding + stamps.margin
    near[:] = 255
    near[reach : size - reach, reach : size - reach] = 0
    n_snake = plan.snake_contrasts.shape[0]
    first, second = below(state, 2 * n_snake), below(state, 2 * n_snake - 1)
    second += second >= first  # two of the doubled list, without putting back
    shades = (plan.snake_contrasts[first % n_snake], plan.snake_contrasts[second % n_snake])
    pivots = np.empty((2, 2), np.int64)
    row, column = 0, 0
    for path in range(2):
        if path == 0:
            found, row, column, direction, pivot_row, pivot_column = _central_seed(stamps, plan, state)
        else:
            found, row, column, direction, pivot_row, pivot_column = _second_seed(row, column, stamps, plan, state)
        if not found:
            return False
        _put(paddles, path, row, column, direction, path)
        contrasts[path] = shades[path] * plan.paddle_contrasts[below(state, plan.paddle_contrasts.shape[0])]
        pivots[path, 0], pivots[path, 1] = pivot_row, pivot_column
        tips[path, 0, 0], tips[path, 0, 1] = row, column
    for n in range(2, 2 * plan.contour_length, 2):
        contrast = plan.paddle_contrasts[below(state, plan.paddle_contrasts.shape[0])]
        for path in range(2):
            last = paddles[n - 2 + path]
            u, pivots[path, 0], pivots[path, 1] = _grow(
                taken, near, pivots[path, 0], pivots[path, 1], last[2], stamps, plan.segment_retries, state, cumulative
            )
            if u < 0:
                return False
            _take(taken, near, stamps, last)
            row, column = pivots[path, 0] + stamps.circle[u, 0], pivots[path, 1] + stamps.circle[u, 1]
            _put(paddles, n + path, row, column, SEED_DIRECTIONS + u, path)
            contrasts[n + path] = contrast * shades[path]
            tips[path, 1, 0], tips[path, 1, 1] = row, column
    last = paddles[2 * plan.contour_length - 1]
    _take(taken, near, stamps, last)  # of the last two paddles only the second path's is merged
    return True


@njit(nogil=True, cache=True)
def _draw_distractor(taken, near, paddles, contrasts, n, path, length, stamps, plan, state, buffers):  # type: ignore[no-untyped-def]
    """Grow one distractor into paddles n, n + 1, …; False when it gets stuck (the caller restores the occupancy)."""
    blocked, forbidden, cumulative = buffers
    n_snake = plan.snake_contrasts.shape[0]
    contrasts[n] = plan.snake_contrasts[below(state, n_snake)]
    found, row, column, direction, pivot_row, pivot_column = _free_seed(taken, stamps, plan, state, blocked, forbidden)
    if not found:
        return False
    _put(paddles, n, row, column, direction, path)
    for k in range(n + 1, n + length):
        contrasts[k] = plan.snake_contrasts[below(state, n_snake)]
        u, pivot_row, pivot_column = _grow(
            taken, near, pivot_row, pivot_column, paddles[k - 1, 2], stamps, plan.segment_retries, state, cumulative
        )
        if u < 0:
            return False
        _take(taken, near, stamps, paddles[k - 1])
        _put(paddles, k, pivot_row + stamps.circle[u, 0], pivot_column + stamps.circle[u, 1], SEED_DIRECTIONS + u, path)
    last = paddles[n + length - 1]
    _take(taken, near, stamps, last)
    return True


@njit(nogil=True, cache=True)
def _draw_distractors(taken, near, paddles, contrasts, n, path, counts, stamps, plan, state, buffers):  # type: ignore[no-untyped-def]
    """Grow distractors `(how many, paddles each, retries each)`; returns the paddles and paths drawn so far."""
    how_many, length, retries = counts
    before, near_before = taken.copy(), near.copy()
    for _ in range(how_many):
        for _ in range(retries + 1):
            if _draw_distractor(taken, near, paddles, contrasts, n, path, length, stamps, plan, state, buffers):
                n, path = n + length, path + 1
                before[:], near_before[:] = taken, near
                break
            taken[:], near[:] = before, near_before
    return n, path


@njit(nogil=True, cache=True)
def draw_images(seed, indices, stamps: Stamps, plan: Plan, n_margins, images, paddles, counts, marked):  # type: ignore[no-untyped-def]
    """Draw the images of these indices, all of this margin.

    Args:
        seed: Seed of the data set.
        indices: `(N,)` int64 numbers of the images.
        stamps: Stamps of the margin.
        plan: Numbers of the options.
        n_margins: How many margins there are, to draw what `draw_heads` drew.
        images: `(N, size, size)` uint8, filled.
        paddles: `(N, P, 4)` int64, filled.
        counts: `(N, 2)` int64, filled: paddles and paths drawn.
        marked: `(N, 2, 2)` int64, filled: the pixels of the origin and the terminal marker.

    Returns:
        The number of the first image whose targets could not be placed in `plan.restarts` attempts, or -1.
    """
    size, reach = stamps.size, stamps.length + stamps.margin
    state = np.zeros(1, np.uint64)
    taken, near = np.empty((size, size), np.uint8), np.empty((size, size), np.uint8)
    blocked = np.zeros((size + 2 * reach, size + 2 * reach), np.uint8)
    buffers = (blocked, np.empty((size, size), np.uint8), np.empty(stamps.circle.shape[0]))
    contrasts, tips = np.empty(paddles.shape[1]), np.zeros((2, 2, 2), np.int64)
    canvas, markers = np.empty((size, size)), np.empty((size, size), np.uint8)
    for k in range(indices.shape[0]):
        start(state, seed, indices[k])
        label = below(state, 2)
        below(state, n_margins)
        attempt = 0
        while not _draw_pair(taken, near, paddles[k], contrasts, tips, stamps, plan, state, buffers[2]):
            attempt += 1
            if attempt > plan.restarts:
                return indices[k]
        n, path = 2 * plan.contour_length, 2
        chains = (plan.distractors, plan.distractor_length, plan.distractor_retries)
        n, path = _draw_distractors(taken, near, paddles[k], contrasts, n, path, chains, stamps, plan, state, buffers)
        singles = (plan.single_paddles, 1, plan.segment_retries)
        n, path = _draw_distractors(taken, near, paddles[k], contrasts, n, path, singles, stamps, plan, state, buffers)
        counts[k, 0], counts[k, 1] = n, path
        origin = below(state, 2)
        terminal = origin if label == 1 else 1 - origin
        marked[k, 0], marked[k, 1] = tips[origin, 0], tips[terminal, 1]
        paint(images[k], paddles[k], contrasts, n, marked[k], stamps, canvas, markers)
    return -1
