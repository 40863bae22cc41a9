"""The Pathfinder generator: against the reference's images, against Pillow, and against itself."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chela.core.errors import DataError
from lra.generators.pathfinder import generate
from lra.generators.pathfinder_stamps import draw_marker, draw_markers, paint_marker
from lra.tasks.pathfinder import PathfinderOptions
from tests.lra.pathfinder_statistics import INK, Measured, components, measured, rejected

LEVEL = 0.01  # chance that any of the tests of one comparison rejects though the distributions are equal
Labelled = tuple[np.ndarray, np.ndarray]


def reference(shared: Path, size: int) -> Labelled:
    """Images and labels that the reference generator made."""
    file = np.load(shared / "pathfinder" / f"reference_pathfinder{size}_hard.npz", allow_pickle=False)
    return file["images"], file["labels"]


@pytest.fixture(scope="module")
def ours() -> Labelled:
    made = generate(PathfinderOptions.preset(32), seed=2, start=0, count=2000)
    return made.images, made.labels


@pytest.fixture(scope="module")
def theirs(shared: Path) -> Measured:
    return measured(*reference(shared, 32))


def erased(images: np.ndarray) -> np.ndarray:
    """Without the smallest component."""
    images = images.copy()
    for image, labels in zip(images, components(images > INK), strict=True):
        values, sizes = np.unique(labels[labels > 0], return_counts=True)
        image[labels == values[sizes.argmin()]] = 0
    return images


def drawn_with(**changes: float) -> Callable[[np.ndarray], np.ndarray]:
    """The same seed with other options."""
    options = dataclasses.replace(PathfinderOptions.preset(32), **changes)  # type: ignore[arg-type]
    return lambda images: generate(options, seed=2, start=0, count=len(images)).images


def test_statistics_match_the_reference_at_32_pixels(theirs: Measured, ours: Labelled) -> None:
    assert rejected(measured(*ours), theirs, LEVEL) == []


def test_statistics_match_the_reference_at_128_pixels(shared: Path) -> None:
    made = generate(PathfinderOptions.preset(128), seed=2, start=0, count=200)
    assert rejected(measured(made.images, made.labels), measured(*reference(shared, 128)), LEVEL) == []


@pytest.mark.parametrize("corrupt", [erased, drawn_with(distractors=4)])
def test_statistics_catch_a_corruption(
    theirs: Measured, ours: Labelled, corrupt: Callable[[np.ndarray], np.ndarray]
) -> None:
    assert rejected(measured(corrupt(ours[0]), ours[1]), theirs, LEVEL)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("level", ["easy", "intermediate", "hard"])
def test_every_preset_draws(size: int, level: str) -> None:
    if size == 16 and level != "hard":
        with pytest.raises(ValueError, match="16 pixels: hard only"):
            PathfinderOptions.preset(size, level)
        return
    options = PathfinderOptions.preset(size, level)
    made = generate(options, seed=0, start=0, count=4)
    assert made.images.shape == (4, size, size) and made.images.dtype == np.uint8
    assert (made.images.max(axis=(1, 2)) == 255).all() and (made.images.min(axis=(1, 2)) == 0).all()
    paths = [np.bincount(p[: c[0], 3]) for p, c in zip(made.paddles, made.counts, strict=True)]
    assert all((p[:2] == options.contour_length).all() for p in paths)
    assert all((p[2:] == options.distractor_length).all() and len(p) <= options.distractors + 2 for p in paths)


def test_lra_values_of_the_presets() -> None:
    assert [PathfinderOptions.preset(s).distractors for s in (32, 64, 128, 256)] == [5, 5, 8, 7]
    assert [PathfinderOptions.preset(32, lv).distractors for lv in ("easy", "intermediate")] == [10, 6]
    assert PathfinderOptions.preset(128).paddle_margins == (2, 3)
    assert PathfinderOptions.preset(32) == PathfinderOptions()


def test_an_image_depends_on_its_seed_and_number_alone() -> None:
    options = PathfinderOptions.preset(32)
    whole = generate(options, 3, 0, 600)
    parts = [generate(options, 3, start, count) for start, count in ((0, 1), (1, 256), (257, 343))]
    for k, field in enumerate(whole._fields):
        np.testing.assert_array_equal(np.concatenate([part[k] for part in parts]), whole[k], err_msg=field)
    np.testing.assert_array_equal(generate(options, 3, 599, 1).images[0], whole.images[599])
    other = generate(options, 4, 0, 50).images
    assert not any((a == b).all() for a, b in zip(other, whole.images[:50], strict=True))
    assert len({image.tobytes() for image in whole.images}) == 600


def test_bytes_of_the_first_version() -> None:
    """A change of these is a change of data: raise `Pathfinder.version` with it."""
    digests = [
        hashlib.sha256(generate(PathfinderOptions.preset(size), 0, 0, 20).images.tobytes()).hexdigest()[:12]
        for size in (16, 32, 64, 128, 256)
    ]
    assert digests == ["775aab79e7aa", "acc62747312a", "203d655e1be8", "b0bbbebf1df5", "d39f52be443f"]


def test_margins_are_drawn_evenly_and_labels_do_not_follow_them() -> None:
    options = PathfinderOptions(size=64, seed_distance=12, paddle_margins=(1, 2), contour_length=6, distractors=0)
    made = generate(options, 5, 0, 1000)
    assert abs((made.margins == 2).mean() - 0.5) < 0.05
    assert abs(made.labels.mean() - 0.5) < 0.05
    assert abs(np.corrcoef(made.margins, made.labels)[0, 1]) < 0.1


def test_paths_without_room_end_with_an_error() -> None:
    with pytest.raises(DataError, match=r"image 0 found no room .* lower task.contour_lengths \(60 dashes\)"):
        generate(PathfinderOptions(size=16, seed_distance=3, contour_length=60), 0, 0, 1)


@pytest.mark.parametrize(("size", "radius"), [(16, 1.5), (32, 1.5), (128, 3.0)])
def test_markers_are_those_of_a_whole_canvas_wherever_they_lie(size: int, radius: float) -> None:
    marker = draw_markers(size, radius, antialias=2)
    near = [0, 1, 2, 5, 6, 7, size // 2, size - 7, size - 5, size - 2, size - 1]
    for row in near:
        for column in near:
            canvas = np.zeros((size, size), np.uint8)
            paint_marker(canvas, marker, row, column)
            whole = draw_marker(size, (row, column), radius, 2)
            np.testing.assert_allclose(canvas.astype(int), whole.astype(int), atol=1)  # Pillow's weights round by place
