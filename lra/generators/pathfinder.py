"""Pathfinder images: do two marked tips lie on one dashed path?

The task is LRA's (arXiv 2011.04006, section 2.2.5), the pictures those of Linsley et al. (arXiv 1805.08315). Every
image holds two long dashed paths and some short distractors. Two round markers lie on the origin tip of one long path
and on a terminal tip: of the same path (label 1) or of the other (label 0).

The algorithm is that of the reference generator (``drewlinsley/pathfinder``, the version LRA used), written anew. Image
n is a pure function of (options, seed, n), so any worker may make any part. ``pathfinder_growth`` grows the paths,
``pathfinder_stamps`` draws the dashes and paints the image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from chela.core.errors import DataError
from lra.generators.pathfinder_growth import RESTARTS, draw_heads, draw_images, make_scratch
from lra.generators.pathfinder_stamps import make_setup

if TYPE_CHECKING:
    from lra.tasks.pathfinder import PathfinderOptions


class Pictures(NamedTuple):
    """A run of images and how they were made."""

    images: np.ndarray  # (N, size, size) uint8
    labels: np.ndarray  # (N,) uint8: 1 if both markers lie on one path
    markers: np.ndarray  # (N, 2, 2) int64: row and column of the marked origin tip, then of the marked terminal tip
    margins: np.ndarray  # (N,) int64: the paddle margin of each image
    lengths: np.ndarray  # (N,) int64: the dashes of each of an image's two long paths
    paddles: np.ndarray  # (N, P, 4) int64: row, column, direction (``Setup.angle``) and path of each dash
    counts: np.ndarray  # (N, 2) int64: how many of an image's paddles count, and its paths, two of them long


def generate(options: PathfinderOptions, seed: int, start: int, count: int) -> Pictures:
    """Make images ``start``, …, ``start + count - 1`` of a seed, 0 … 2⁶³ − 1.

    Raises:
        DataError: If the two long paths cannot be placed with these options.

    Example:
        >>> from lra.tasks.pathfinder import PathfinderOptions
        >>> made = generate(PathfinderOptions.preset(32), seed=0, start=0, count=3)
        >>> alone = generate(PathfinderOptions.preset(32), seed=0, start=2, count=1)
        >>> bool((alone.images[0] == made.images[2]).all())
        True
    """
    lengths = options.contour_lengths or (options.contour_length,)
    ways = [(replace(options, contour_length=n), margin) for n in lengths for margin in options.paddle_margins]
    setups = [make_setup(*way) for way in ways]
    labels, which, states = draw_heads(seed, start, count, len(setups))
    n_paddles = 2 * max(lengths) + options.distractors * options.distractor_length
    made = Pictures(
        images=np.zeros((count, options.size, options.size), np.uint8),
        labels=labels,
        markers=np.zeros((count, 2, 2), np.int64),
        margins=np.array([margin for _, margin in ways], np.int64)[which],
        lengths=np.array([way.contour_length for way, _ in ways], np.int64)[which],
        paddles=np.zeros((count, n_paddles, 4), np.int64),
        counts=np.zeros((count, 2), np.int64),
    )
    for k, setup in enumerate(setups):
        stuck = draw_images(made, np.flatnonzero(which == k), states, setup, make_scratch(setup, n_paddles))
        if stuck >= 0:
            raise DataError(
                f"pathfinder: the two paths of image {start + stuck} found no room in {RESTARTS:,} attempts: lower "
                f"task.contour_lengths ({setup.contour_length} dashes) or raise task.resolution ({options.size})"
            )
    return made


def apart(options: PathfinderOptions, made: Pictures) -> np.ndarray:
    """Return for each image whether its label is unambiguous, bool ``(N,)``.

    It is where the two long paths stay further apart, from any end of a dash to any of the other path's, than the gap
    between a path's own dashes: linking each dash to the nearest then never leads from one path to the other.
    """
    used = np.arange(made.paddles.shape[1]) < made.counts[:, :1]
    row, column, direction, path = np.moveaxis(made.paddles, -1, 0)
    out = np.empty(len(made.labels), bool)
    for margin in options.paddle_margins:
        angle = make_setup(options, margin).angle
        for i in np.flatnonzero(made.margins == margin):
            turned = angle[direction[i]]
            ends = np.stack([row[i], column[i]], -1)
            ends = np.stack([ends, ends + options.paddle_length * np.stack([np.sin(turned), np.cos(turned)], -1)], 1)
            first, second = (ends[used[i] & (path[i] == which)].reshape(-1, 1, 2) for which in (0, 1))
            out[i] = np.linalg.norm(first - second.swapaxes(0, 1), axis=-1).min() > 2 * margin
    return out
