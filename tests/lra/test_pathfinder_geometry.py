"""Does a positive image really have its markers on one path, and a negative on two? Asked of the dashes alone."""

import numpy as np
import pytest

from lra.generators.pathfinder import Pictures, generate
from lra.generators.pathfinder_stamps import SEED_DIRECTIONS, make_setup
from lra.tasks.pathfinder import PathfinderOptions
from tests.lra.pathfinder_geometry import Dash, chains, paint


def dashes(options: PathfinderOptions, made: Pictures, i: int) -> tuple[list[Dash], list[Dash]]:
    """The dashes of an image, shuffled: of the long paths, and of the distractors."""
    angles = make_setup(options, int(made.margins[i])).angle
    rows = made.paddles[i, : made.counts[i, 0]]
    parts: tuple[list[Dash], list[Dash]] = ([], [])
    for k in np.random.default_rng(i).permutation(len(rows)):
        row, column, direction, path = rows[k].tolist()
        parts[path > 1].append((row, column, float(angles[direction]), direction < SEED_DIRECTIONS, int(k)))
    return parts


def readings(options: PathfinderOptions, made: Pictures, i: int) -> set[int]:
    """Every label that image i can be read to have from its dashes: {0}, {1}, both or none.

    1: a path of full length leads from the origin marker to the terminal one. 0: two paths of full length and without a
    common dash, one from the origin marker, the other to the terminal marker. Both hold where the two targets run
    over each other or end in one pixel. The reference generator lets them, for each one's newest dash is not yet
    taken when the other grows.
    """
    targets, others = dashes(options, made, i)
    ways = chains(targets + others, options.paddle_length, int(made.margins[i]), options.contour_length)
    full = [way for each in ways for way in each if len(way) == options.contour_length]
    origin, terminal = (tuple(tip) for tip in made.markers[i].tolist())
    leaving = [way for way in full if way[0][:2] == origin]
    arriving = [way for way in full if way[-1][:2] == terminal]
    found = {1} if any(way in arriving for way in leaving) else set()
    if any(set(way).isdisjoint(other) for way in leaving for other in arriving):
        found.add(0)
    return found


def check(options: PathfinderOptions, count: int, seed: int) -> tuple[int, int]:
    """Read `count` images; returns how many cannot be read as labelled, and how many can be read both ways."""
    made = generate(options, seed, 0, count)
    found = [readings(options, made, i) for i in range(count)]
    wrong = sum(int(label) not in labels for label, labels in zip(made.labels, found, strict=True))
    return wrong, sum(len(labels) == 2 for labels in found)


@pytest.mark.parametrize(
    ("size", "count", "most"),
    [
        *((size, count, count // 10) for size, count in ((16, 200), (32, 500), (64, 100), (128, 100), (256, 10))),
        *(pytest.param(size, 10_000, most, marks=pytest.mark.slow) for size, most in ((32, 400), (128, 20))),
    ],
)
def test_markers_lie_on_one_path_or_on_two(size: int, count: int, most: int) -> None:
    wrong, ambiguous = check(PathfinderOptions.preset(size), count, seed=12 if count == 10_000 else 11)
    assert wrong == 0
    assert ambiguous <= most


def test_the_reading_depends_on_the_markers() -> None:
    options = PathfinderOptions()
    made = generate(options, 11, 0, 50)
    clear = [i for i in range(50) if readings(options, made, i) == {int(made.labels[i])}]
    assert len(clear) > 45
    elsewhere = made._replace(markers=np.stack([made.markers[:, 0], np.roll(made.markers[:, 1], 1, axis=0)], axis=1))
    assert not any(
        readings(options, elsewhere, i) for i in range(50) if (elsewhere.markers[i] != made.markers[i]).any()
    )


@pytest.mark.parametrize(("size", "count"), [(16, 50), (32, 200), (64, 40), (128, 40), (256, 5)])
def test_the_picture_is_that_of_its_dashes(size: int, count: int) -> None:
    options = PathfinderOptions.preset(size)
    made = generate(options, 13, 0, count)
    for i in range(count):
        margin = int(made.margins[i])
        markers = [tuple(tip) for tip in made.markers[i].tolist()]
        again = paint(options, margin, *dashes(options, made, i), markers)
        np.testing.assert_allclose(made.images[i].astype(int), again.astype(int), atol=1)  # float32 against float64
