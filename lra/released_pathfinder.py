"""Reading LRA's released Pathfinder folders, `pathfinder32/curv_contour_length_14` and so on.

A folder holds `metadata/N.npy` and `imgs/N/sample_M.png`. The metadata of the release is plain text in spite of its
name; the public generator writes true numpy string arrays. Both have a row per image: folder, file, number, label and
the generator's parameters.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from lra.errors import DataError
from lra.schema import DataConfig
from lra.source import Form, locate

log = logging.getLogger(__name__)

FOLDERS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}
_MAGIC = b"\x93NUMPY"
_COLUMNS = 4  # folder, file, number, label; more follow


@dataclass(frozen=True)
class Listed:
    """One image as the metadata lists it.

    Attributes:
        path: of the image.
        label: 1 if both markers lie on one path.
        where: the metadata's file and row, for errors.
    """

    path: Path
    label: int
    where: str


def find(task: str, resolution: int, level: str, data: DataConfig) -> Path:
    """The released folder of a resolution and a level at or below `data.root`. Raises `DataError` if there is none."""
    name = FOLDERS[level]
    forms = [
        Form(f"LRA's folder {start}{name}", f"{start}{name}/metadata/*.npy", lambda base: base)
        for start in (f"pathfinder{resolution}/", "")
    ]
    form, base = locate(task, data, forms)
    return base / PurePosixPath(form.mark).parent.parent


def listing(folder: Path) -> list[Listed]:
    """All images of a folder, in the order of the metadata: files by number, then rows. Raises `DataError`."""
    files = sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    found = []
    for file in files:
        for number, row in enumerate(_rows(file), start=1):
            found.append(_listed(folder, row, f"{file} row {number}"))
    return found


def _rows(file: Path) -> list[list[str]]:
    """The rows of a metadata file, split into columns."""
    raw = file.read_bytes()
    if raw.startswith(_MAGIC):
        try:
            table = np.load(io.BytesIO(raw), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"{file} is no array of strings ({error}): unpack the release again") from None
        if table.ndim != 2 or table.dtype.kind not in "US":
            raise DataError(
                f"{file} holds {table.dtype} {table.shape}, expected rows of strings: unpack the release again"
            )
        return [[x.decode() if isinstance(x, bytes) else str(x) for x in row] for row in table]
    try:
        return [line.split(" ") for line in raw.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{file} is neither text nor a numpy array: unpack the release again") from None


def _listed(folder: Path, row: list[str], where: str) -> Listed:
    if len(row) < _COLUMNS or row[3] not in ("0", "1"):
        came = row[3] if len(row) >= _COLUMNS else f"{len(row)} columns"
        raise DataError(f"{where}: expected a label 0 or 1 in column 4, got {came!r}: unpack the release again")
    inside = PurePosixPath(row[0], row[1])
    if inside.is_absolute() or ".." in inside.parts:
        raise DataError(f"{where}: {inside} leads out of {folder}: this is not a released folder")
    return Listed(folder / inside, int(row[3]), where)


def present(listed: list[Listed]) -> tuple[list[Listed], list[Listed]]:
    """The images with content, and the empty files (the release has one). Raises `DataError` for one that is absent."""
    full: list[Listed] = []
    empty: list[Listed] = []
    for image in listed:
        try:
            size = image.path.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{image.path} is missing; {image.where} lists it: unpack it again") from None
        (full if size else empty).append(image)
    if empty:
        log.warning("%d empty image(s) left out, the first is %s", len(empty), empty[0].path)
    return full, empty


def read(image: Listed, resolution: int) -> np.ndarray:
    """The gray levels of an image, uint8 `(resolution, resolution)`. Raises `DataError` if it is damaged or another."""
    from PIL import Image

    try:
        with Image.open(image.path) as opened:
            pixels = np.asarray(opened.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{image.path} is no whole picture ({reason}): unpack the release again") from None
    if pixels.shape != (resolution, resolution):
        rows, columns = pixels.shape
        raise DataError(
            f"{image.path} has {rows} × {columns} pixels, expected {resolution} × {resolution}: set task.resolution or "
            f"data.root to another folder"
        )
    return pixels


def split(images: list[Listed]) -> dict[str, list[Listed]]:
    """The parts that S4 and MEGA make: torch's `random_split`, 80 / 10 / 10 %, with a generator seeded 42."""
    import torch

    n = len(images)
    held = n // 10
    order = torch.randperm(n, generator=torch.Generator().manual_seed(42)).tolist()
    bounds = {"train": (0, n - 2 * held), "validation": (n - 2 * held, n - held), "test": (n - held, n)}
    return {name: [images[i] for i in order[a:b]] for name, (a, b) in bounds.items()}
