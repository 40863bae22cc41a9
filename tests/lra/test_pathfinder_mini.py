"""Pathfinder's small images: paths of several lengths, no picture twice, none that can be read both ways."""

from pathlib import Path

import numpy as np
import pytest

from chela.core.errors import DataError
from lra.generators.pathfinder import apart, generate
from lra.source import DataConfig
from lra.tasks.pathfinder import BLOCK, Pathfinder, PathfinderOptions
from tests.lra.pathfinder_geometry import _along
from tests.lra.test_pathfinder_task import number

SMALL = dict(resolution=16, distractors=0, contour_lengths=[2, 3, 4, 5], train=600, validation=100, test=200)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Pathfinder:
    task = Pathfinder(**SMALL, distinct=True)
    task.prepare(DataConfig(dir=str(tmp_path_factory.mktemp("records")), processes=1))
    return task


def test_no_picture_comes_twice_in_or_across_the_splits(task: Pathfinder) -> None:
    pictures = [record["pixels"].tobytes() for split, n in counts() for record in task.records(split).read(range(n))]
    assert len(set(pictures)) == len(pictures) == 900


def counts() -> list[tuple[str, int]]:
    return [("train", 600), ("validation", 100), ("test", 200)]


def test_a_picture_that_came_before_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is made to draw the first block of images twice; labels and all else are as they were."""
    monkeypatch.setattr(
        "lra.generators.pathfinder.generate",
        lambda options, seed, start, count: generate(options, seed, 0 if start == BLOCK else start, count),
    )
    task = Pathfinder(**{**SMALL, "train": 200, "validation": 50, "test": 80}, distinct=True)
    task.prepare(DataConfig(dir=str(tmp_path), processes=1))
    records = [task.records(split).read(range(n)) for split, n in (("train", 200), ("validation", 50), ("test", 80))]
    pictures = [record["pixels"].tobytes() for part in records for record in part]
    assert len(set(pictures)) == 330 and max(number(record) for record in records[2]) >= 2 * BLOCK


def test_each_image_draws_one_of_the_lengths(task: Pathfinder) -> None:
    for split, n in counts():
        records = task.dataset(split)
        dashes = records.groups()
        assert dashes is not None and set(dashes.tolist()) == {2, 3, 4, 5} and len(dashes) == n
        made = [generate(task.options(), 0, number(records.stored(i)), 1) for i in range(20)]
        assert [int(one.lengths[0]) for one in made] == dashes[:20].tolist()
        assert [int(one.counts[0, 0]) for one in made] == (2 * dashes[:20]).tolist()
    shares = np.bincount(task.dataset("train").groups())[2:] / 600  # type: ignore[arg-type]
    assert shares.min() > 0.15  # longer paths come near each other more often, and are left out
    labels = task.dataset("train").labels()
    assert abs(labels.mean() - 0.5) < 0.06


def test_every_label_can_be_read_one_way_only(task: Pathfinder) -> None:
    """Of the dashes' ends, found by the test's own geometry, those of the two paths keep further apart than a gap."""
    records = task.dataset("test")
    for i in range(200):
        made = generate(task.options(), 0, number(records.stored(i)), 1)
        assert nearest(task.options(), made, 0) > 2


def nearest(options: PathfinderOptions, made: object, i: int) -> float:
    from lra.generators.pathfinder_stamps import make_setup

    angles = make_setup(options, 1).angle
    ends: list[list[tuple[float, float]]] = [[], []]
    for row, column, direction, path in made.paddles[i, : made.counts[i, 0]].tolist():  # type: ignore[attr-defined]
        angle = angles[direction]
        far = (row + options.paddle_length * np.sin(angle), column + options.paddle_length * np.cos(angle))
        assert (
            max(abs(a - b) for a, b in zip(far, _along((row, column), angle, options.paddle_length), strict=True)) <= 1
        )
        ends[path] += [(row, column), far]
    return min(float(np.hypot(a - c, b - d)) for a, b in ends[0] for c, d in ends[1])


def test_apart_is_that_distance_and_leaves_out_shared_ends() -> None:
    options = Pathfinder(**SMALL).options()  # type: ignore[arg-type]
    made = generate(options, 3, 0, 400)
    found = apart(options, made)
    assert found.tolist() == [nearest(options, made, i) > 2 for i in range(400)]
    assert 0.2 < found.mean() < 0.6
    tips = [made.paddles[i, 2 * n - 2 : 2 * n, :2] for i, n in enumerate(made.lengths)]
    same = np.array([(a == b).all() for a, b in tips])
    assert same.any() and not found[same].any()


def test_too_few_that_keep_apart_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lra.tasks.pathfinder._DRAWN_FOR_ONE", 1)
    task = Pathfinder(resolution=16, contour_lengths=[5], distractors=0, train=20, validation=5, test=5, distinct=True)
    with pytest.raises(DataError, match=r"lra_pathfinder: \w+ has \d+ records, expected"):
        task.prepare(DataConfig(dir=str(tmp_path), processes=1))
    with pytest.raises(ValueError, match=r"contour_lengths: expected 2 or more dashes, got \(1, 3\)"):
        Pathfinder(contour_lengths=[1, 3])
