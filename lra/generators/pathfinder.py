"""Pathfinder images: do two marked tips lie on one dashed path?

The task is LRA's (arXiv 2011.04006, section 2.2.5), the pictures those of Linsley et al. (arXiv 1805.08315). Every
image holds two long dashed paths and some short distractors. Two round markers lie on the origin tip of one long path
and on a terminal tip: of the same path (label 1) or of the other (label 0).

The algorithm is that of the reference generator (`drewlinsley/pathfinder`, the version LRA used), written anew: image n
of a seed is a pure function of (options, seed, n), so any worker may make any part. Where paths and stamps come from:
`pathfinder_growth`, `pathfinder_stamps`.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lra.errors import DataError
from lra.generators.pathfinder_growth import Plan, draw_heads, draw_images
from lra.generators.pathfinder_options import PathfinderOptions
from lra.generators.pathfinder_stamps import SEED_DIRECTIONS, Stamps, draw_stamps, turn_back

VERSION = "1.0.0"  # of the images: a change that moves any byte raises it
BLOCK = 256  # images drawn by one call of a worker
_RESTARTS = 100_000  # of the two targets, where some tens do at LRA's sizes


class Pathfinder(NamedTuple):
    """A run of images and how they were made."""

    images: np.ndarray
    """`(N, size, size)` uint8."""
    labels: np.ndarray
    """`(N,)` uint8: 1 if both markers lie on one path."""
    markers: np.ndarray
    """`(N, 2, 2)` int64: row and column of the marked origin tip, then of the marked terminal tip."""
    margins: np.ndarray
    """`(N,)` int64: the paddle margin of each image."""
    paddles: np.ndarray
    """`(N, P, 4)` int64: row, column, direction (see `paddle_angles`), path; only the first `counts[:, 0]` count."""
    counts: np.ndarray
    """`(N, 2)` int64: paddles and paths (two targets, then distractors) of each image."""


@lru_cache(maxsize=16)
def _stamps(options: PathfinderOptions, margin: int) -> Stamps:
    return draw_stamps(
        size=options.size,
        padding=options.padding,
        length=options.paddle_length,
        thickness=options.paddle_thickness,
        margin=margin,
        marker_radius=options.marker_radius,
        continuity=options.continuity,
        antialias=options.antialias,
    )


def paddle_angles(options: PathfinderOptions, margin: int) -> np.ndarray:
    """Return `(A,)` the angle (radians, rows down) in which a paddle of each direction is drawn from its centre."""
    stamps = _stamps(options, margin)
    grown = np.arctan2(stamps.circle[:, 0], stamps.circle[:, 1])
    seeds = np.arange(SEED_DIRECTIONS) - 180
    return np.concatenate([seeds * math.pi / 180, [turn_back(float(angle)) for angle in grown]])


def _single_paddles(options: PathfinderOptions, margin: int) -> int:
    """Return how many single dashes fill an image up, by the reference generator's rule of room per dash."""
    if not options.single_paddles:
        return 0
    room = int(150 * 123.5 / (7.5 + 13 * margin + 4 * margin * margin))
    return max(0, room - 2 * options.contour_length - options.distractors * options.distractor_length)


def generate(options: PathfinderOptions, seed: int, start: int, count: int) -> Pathfinder:
    """Make images `start`, …, `start + count - 1` of a seed.

    Image n depends on (options, seed, n) alone, whatever else is made beside it.

    Args:
        options: Parameters of the generator.
        seed: Seed of the data set, 0 … 2⁶³ − 1.
        start: Number of the first image.
        count: How many images.

    Returns:
        The images, their labels and how they were made.

    Raises:
        DataError: If the two long paths cannot be placed with these options.

    Example:
        >>> made = generate(PathfinderOptions.preset(32), seed=0, start=0, count=3)
        >>> made.images.shape, made.images.dtype
        ((3, 32, 32), dtype('uint8'))
        >>> alone = generate(PathfinderOptions.preset(32), seed=0, start=2, count=1)
        >>> bool((alone.images[0] == made.images[2]).all())
        True
    """
    heads = draw_heads(seed, start, count, len(options.paddle_margins))
    singles = [_single_paddles(options, margin) for margin in options.paddle_margins]
    n_paddles = 2 * options.contour_length + options.distractors * options.distractor_length + max(singles)
    images = np.zeros((count, options.size, options.size), np.uint8)
    paddles = np.zeros((count, n_paddles, 4), np.int64)
    counts = np.zeros((count, 2), np.int64)
    markers = np.zeros((count, 2, 2), np.int64)
    for which, margin in enumerate(options.paddle_margins):
        mine = np.flatnonzero(heads[:, 1] == which)
        part = (images[mine], paddles[mine], counts[mine], markers[mine])
        plan = Plan(
            seed_distance=options.seed_distance,
            contour_length=options.contour_length,
            distractor_length=options.distractor_length,
            distractors=options.distractors,
            single_paddles=singles[which],
            segment_retries=options.segment_retries,
            distractor_retries=options.distractor_retries,
            restarts=_RESTARTS,
            snake_contrasts=np.array(options.snake_contrasts, np.float64),
            paddle_contrasts=np.array(options.paddle_contrasts, np.float64),
        )
        stuck = draw_images(seed, mine + start, _stamps(options, margin), plan, len(options.paddle_margins), *part)
        if stuck >= 0:
            raise DataError(
                f"pathfinder: the two paths of image {stuck} found no room in {_RESTARTS:,} attempts: lower "
                f"task.contour_length ({options.contour_length}), task.paddle_length ({options.paddle_length}), "
                f"task.paddle_margins ({margin}) or task.padding ({options.padding}), or raise task.resolution "
                f"({options.size})"
            )
        images[mine], paddles[mine], counts[mine], markers[mine] = part
    margins = np.array(options.paddle_margins, np.int64)[heads[:, 1]]
    return Pathfinder(images, heads[:, 0].astype(np.uint8), markers, margins, paddles, counts)


def generate_blocks(
    options: PathfinderOptions, seed: int, start: int, count: int, threads: int = 0
) -> Iterator[Pathfinder]:
    """Make images `start`, …, `start + count - 1` in blocks of at most `BLOCK`, in order.

    Args:
        options: Parameters of the generator.
        seed: Seed of the data set.
        start: Number of the first image.
        count: How many images.
        threads: Workers that draw ahead, 0 for one per core; drawing releases the interpreter lock. The images do not
            depend on it.

    Yields:
        Blocks as `generate` makes them.
    """
    threads = threads or os.cpu_count() or 1
    waiting: deque[Future[Pathfinder]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for first in range(start, start + count, BLOCK):
                size = min(BLOCK, start + count - first)
                waiting.append(pool.submit(generate, options, seed, first, size))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
