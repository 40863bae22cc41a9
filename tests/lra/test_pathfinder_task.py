"""The tasks pathfinder and pathx: builds, a released folder and what can be wrong with one, small images."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chela.core.errors import DataError
from lra.generators.pathfinder import apart, generate
from lra.generators.pathfinder_stamps import make_setup
from lra.source import DataConfig
from lra.tasks.pathfinder import BLOCK, Pathfinder, PathfinderOptions, PathX, split_release
from tests.lra.pathfinder_geometry import _along

PARAMETERS = ("1.0", "14", "4", "2", "0.5", "1", "1")  # continuity, lengths, thickness, margin, contrasts
SMALL = dict(resolution=16, train=300, validation=40, test=50)


def prepared(task: Pathfinder, folder: Path, root: Path | None = None) -> Pathfinder:
    task.prepare(DataConfig(dir=str(folder), root=None if root is None else str(root), processes=2))
    return task


def numbers(task: Pathfinder, split: str) -> list[int]:
    """Which image of the seed, or row of the release, each stored record is."""
    records = task.records(split)
    return [int(record["number"].view("<i8")[0]) for record in records.read(range(len(records)))]


def gray(values: np.ndarray) -> np.ndarray:
    """Gray levels of an encoded image, -1 … 1."""
    return np.rint((values[:, 0] + 1) * 127.5)


def test_records_are_the_images_of_the_seed(tmp_path: Path) -> None:
    task = prepared(Pathfinder(**SMALL), tmp_path)
    made = generate(PathfinderOptions.preset(16), 0, 0, 390)
    at = 0
    for split, n in (("train", 300), ("validation", 40), ("test", 50)):
        assert numbers(task, split) == list(range(at, at + n))
        for values, label in task.dataset(split).read(range(n)):
            assert label == made.labels[at]
            np.testing.assert_array_equal(gray(values), made.images[at].reshape(-1))
            at += 1
    assert task.l_max == 256 and task.vocab_size is None and task.input_dim == 1 and "not LRA's files" in task.note


def test_options_reach_the_generator_and_the_network() -> None:
    options = Pathfinder(resolution=32, contour_lengths=[4, 5], distractors=3).options()
    assert (options.contour_lengths, options.distractors) == ((4, 5), 3)
    assert PathX().options() == PathfinderOptions.preset(128)
    mega, s4 = (Pathfinder(normalization=name).encode_values(np.array([0, 255])) for name in ("mega", "s4"))
    assert mega.tolist() == [[-1], [1]] and s4.tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resolution": 48}, "task.resolution: expected 16, 32, 64, 128, 256 pixels, got 48"),
        ({"level": "harder"}, "task.level: expected easy, intermediate, hard"),
        ({"distractors": -1}, "task.distractors: expected at least 0, got -1"),
        ({"contour_lengths": [1, 3]}, r"contour_lengths: expected 2 or more dashes, got \(1, 3\)"),
    ],
)
def test_options_out_of_range(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pathfinder(**wrong)  # type: ignore[arg-type]


# ---- a released folder ----


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


WIDE = png(np.zeros((64, 64), np.uint8))


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    made = generate(PathfinderOptions.preset(32), 9, 0, 60)
    return made.images, made.labels


def write_release(root: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Three batches of 20 images, numbered 0, 2 and 10, as the release lays them out; image 5 of batch 2 is empty."""
    folder = root / "pathfinder32" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for k, batch in enumerate((0, 2, 10)):
        (folder / "imgs" / str(batch)).mkdir(parents=True)
        rows = []
        for i in range(20):
            path = folder / "imgs" / str(batch) / f"sample_{i}.png"
            path.write_bytes(png(images[20 * k + i]))
            rows.append([f"imgs/{batch}", path.name, str(i), str(labels[20 * k + i]), *PARAMETERS])
        file = folder / "metadata" / f"{batch}.npy"
        file.write_text("".join(" ".join(row) + "\n" for row in rows))
    (folder / "imgs" / "2" / "sample_5.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("given", ["", "pathfinder32", "pathfinder32/curv_contour_length_14"])
def test_a_release_is_read_from_wherever_root_points(
    tmp_path: Path, images: tuple[np.ndarray, np.ndarray], given: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_release(tmp_path / "lra_release", *images)
    task = prepared(Pathfinder(), tmp_path / "records", tmp_path / "lra_release" / given)
    sizes = {split: len(task.dataset(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 49, "validation": 5, "test": 5} and task.note == ""
    assert "imgs/2/sample_5.png is empty: left out" in caplog.text
    rows = np.delete(np.arange(60), 25)
    seen = set()
    for split in sizes:
        pairs = task.dataset(split).read(range(sizes[split]))
        for row, (values, label) in zip(rows[numbers(task, split)], pairs, strict=True):
            np.testing.assert_array_equal(gray(values), images[0][row].reshape(-1))
            assert label == images[1][row]
            seen.add(row)
    assert len(seen) == 59


def test_the_parts_of_a_release_are_those_of_random_split() -> None:
    import torch

    sets = torch.utils.data.random_split(range(59), [49, 5, 5], torch.Generator().manual_seed(42))  # type: ignore[arg-type]
    assert [list(part) for part in sets] == [part.tolist() for part in split_release(59).values()]


def test_a_smaller_part_of_a_release(tmp_path: Path, images: tuple[np.ndarray, np.ndarray]) -> None:
    write_release(tmp_path, *images)
    task = prepared(Pathfinder(train=20, validation=3, test=2), tmp_path / "records", tmp_path)
    assert [len(task.dataset(s)) for s in ("train", "validation", "test")] == [20, 3, 2]


PICTURE, ROWS = "imgs/2/sample_7.png", "metadata/2.npy"


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        (PICTURE, None, r"sample_7\.png is no whole picture .*No such file"),
        (PICTURE, lambda raw: raw[:100], r"sample_7\.png is no whole picture"),
        (PICTURE, lambda raw: b"hello", r"sample_7\.png is no whole picture"),
        (PICTURE, lambda raw: WIDE, r"sample_7\.png has 64 × 64 pixels, expected 32 × 32"),
        (ROWS, lambda raw: raw.replace(b"sample_7.png 7 ", b"sample_7.png 7 3"), r"no rows of .* that is not 0 or 1"),
        (ROWS, lambda raw: b"imgs/2 sample_0.png\n", r"2\.npy has no rows of folder, file"),
        (ROWS, lambda raw: b"\xff\xfe\x00\x01" * 10, r"2\.npy has no rows of folder, file"),
    ],
)
def test_a_damaged_release_is_one_line_that_names_the_file(
    tmp_path: Path,
    images: tuple[np.ndarray, np.ndarray],
    file: str,
    harm: Callable[[bytes], bytes] | None,
    message: str,
) -> None:
    path = write_release(tmp_path, *images) / file
    if harm is None:
        path.unlink()
    else:
        path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        prepared(Pathfinder(), tmp_path / "records", tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "records").glob("**/1.0.0"))


def test_no_release_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pathfinder: .* holds none of: LRA's folder pathfinder32/curv"):
        prepared(Pathfinder(), tmp_path / "records", tmp_path)


# ---- small images: paths of several lengths, no picture twice, none that can be read both ways ----

COUNTS = {"train": 600, "validation": 100, "test": 200}
MINI = dict(resolution=16, distractors=0, contour_lengths=[2, 3, 4, 5], **COUNTS)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Pathfinder:
    return prepared(Pathfinder(**MINI, distinct=True), tmp_path_factory.mktemp("records"))


def test_no_picture_comes_twice_in_or_across_the_splits(task: Pathfinder) -> None:
    pictures = [
        record["pixels"].tobytes() for split, n in COUNTS.items() for record in task.records(split).read(range(n))
    ]
    assert len(set(pictures)) == len(pictures) == 900


def test_a_picture_that_came_before_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is made to draw the first block of images twice; labels and all else are as they were."""
    monkeypatch.setattr(
        "lra.generators.pathfinder.generate",
        lambda options, seed, start, count: generate(options, seed, 0 if start == BLOCK else start, count),
    )
    task = prepared(Pathfinder(**{**MINI, "train": 200, "validation": 50, "test": 80}, distinct=True), tmp_path)
    sets = [(task.records(split), n) for split, n in (("train", 200), ("validation", 50), ("test", 80))]
    pictures = {record["pixels"].tobytes() for records, n in sets for record in records.read(range(n))}
    assert len(pictures) == 330 and max(numbers(task, "test")) >= 2 * BLOCK


def test_each_image_draws_one_of_the_lengths(task: Pathfinder) -> None:
    for split, n in COUNTS.items():
        records = task.dataset(split)
        dashes = records.groups()
        assert dashes is not None and set(dashes.tolist()) == {2, 3, 4, 5} and len(dashes) == n
        made = [generate(task.options(), 0, number, 1) for number in numbers(task, split)[:20]]
        assert [int(one.lengths[0]) for one in made] == dashes[:20].tolist()
        assert [int(one.counts[0, 0]) for one in made] == (2 * dashes[:20]).tolist()
        assert all(apart(task.options(), one).all() for one in made)
    shares = np.bincount(task.dataset("train").groups())[2:] / 600  # type: ignore[arg-type]
    assert shares.min() > 0.15  # longer paths come near each other more often, and are left out
    labels = task.dataset("train").labels()
    assert abs(labels.mean() - 0.5) < 0.06


def nearest(options: PathfinderOptions, made: object, i: int) -> float:
    """How near the two paths come, by the dashes' ends as the test's own geometry finds them."""
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
    options = Pathfinder(**MINI).options()  # type: ignore[arg-type]
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
