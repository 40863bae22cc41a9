"""From a source to versioned records on disk, built once, trusted only when whole.

A set of records is a tensorflow-datasets builder in array_record form (no TensorFlow), in
`DIR/NAME/CONFIG/VERSION`. Beside its files lie, per split, `SPLIT.labels.npy` and `SPLIT.sizes.npy`, so that lengths
and classes are known without a pass over the records, and `records.json`: format version, counts, and the size and
SHA-256 of every file. A build holds a lock, writes to a folder beside the target and renames it when `records.json`
is on disk: whatever stops it, nothing half-made carries the target's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lra.errors import DataError
from lra.files import file_errors, locked, not_writable, one_line, sha256, sync

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the layout above. What an older one lacks is said in `_OLDER`."""

_OLDER: dict[int, str] = {}  # format: why it cannot be read any more
MANIFEST = "records.json"


class Progress(Protocol):
    """Called now and then with what is being done, how much is done and how much there is (0: not known)."""

    def __call__(self, what: str, done: int, total: int, /) -> None:
        """Show it."""


@dataclass(frozen=True)
class Example:
    """One record to be stored: byte fields, a class, and the sizes its length will be made from.

    Attributes:
        fields: name to uint8 array `(n,)`.
        label: the class.
        sizes: numbers stored beside the records, for `RecordSet.sizes`.
    """

    fields: Mapping[str, np.ndarray]
    label: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class RecordSpec:
    """What a set of records is.

    Attributes:
        name: of the builder, `lra_listops`.
        config: everything that decides the bytes, as a folder's name.
        version: of the content, `1.0.0`.
        fields: names of the byte fields.
        counts: records of each split; a build that yields another number fails.
        sizes: names of the numbers in `Example.sizes`.
        about: kept in `records.json`: options, origin, what the source taught. Written when the records are whole:
            what is only known then may be added while they are read.
        expected_bytes: room the build needs, 0 if not known.
    """

    name: str
    config: str
    version: str
    fields: tuple[str, ...]
    counts: Mapping[str, int]
    sizes: tuple[str, ...] = ("length",)
    about: dict[str, Any] = field(default_factory=dict)
    expected_bytes: int = 0

    def folder(self, root: Path) -> Path:
        """Where the records lie under the data folder `root`."""
        return root / self.name / self.config / self.version


Splits = Callable[[], Mapping[str, Iterable[Example]]]


def prepare(root: Path, spec: RecordSpec, splits: Splits, progress: Progress | None = None) -> Path:
    """Build the records unless they are there; returns their folder.

    Args:
        root: the data folder.
        spec: what to build.
        splits: called only if there is something to build; yields the examples of each split, in order.
        progress: called with (what, done, total).

    Raises:
        DataError: the folder is not writable, the disk is full, a split has another count than `spec.counts`, or what
            lies there is damaged or of another format.
    """
    folder = spec.folder(root)
    with not_writable(root):
        there = folder.exists()
        if not there:
            folder.parent.mkdir(parents=True, exist_ok=True)
    if there:
        check(folder, spec)
        return folder
    with locked(folder):
        if folder.exists():  # built by the process that held the lock
            check(folder, spec)
            return folder
        building = folder.parent / f".{spec.version}.building"
        shutil.rmtree(building, ignore_errors=True)  # of a build that was killed: nobody else holds the lock
        _check_room(root, spec)
        try:
            with file_errors(folder):
                made = _build(building, spec, splits(), progress)
                _write_manifest(made, spec)
                os.rename(made, folder)
                sync(folder.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    log.info("built %s: %s", folder, ", ".join(f"{n:,} {split}" for split, n in spec.counts.items()))
    return folder


def check(folder: Path, spec: RecordSpec | None = None, *, full: bool = False) -> dict[str, Any]:
    """The manifest of a folder of records, after cheap checks: format, counts, every file there and of its size.

    Args:
        folder: where the records lie.
        spec: what they should be.
        full: read every file and compare its SHA-256 too.

    Raises:
        DataError: naming the file, what was expected and what came.
    """
    remedy = f"delete {folder} to have it built again"
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        version = manifest["format_version"]
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {MANIFEST}, so it was not built by this program: {remedy}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} does not parse ({error}): {remedy}") from None
    if version != FORMAT:
        reason = _OLDER.get(version, "it was written by another version of this program")
        raise DataError(f"{folder} has format {version}, expected {FORMAT} ({reason}): {remedy}")
    if spec is not None and manifest["counts"] != dict(spec.counts):
        raise DataError(f"{folder} holds {manifest['counts']} records, expected {dict(spec.counts)}: {remedy}")
    for name, stored in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != stored["bytes"]:
            came = "it is missing" if size is None else f"it has {size:,} bytes"
            raise DataError(f"{path} is damaged: expected {stored['bytes']:,} bytes, {came}: {remedy}")
        if full and sha256(path) != stored["sha256"]:
            raise DataError(f"{path} is damaged: its SHA-256 is not {stored['sha256'][:12]}…: {remedy}")
    return manifest


class RecordSet:
    """The records of one split, in their stored order, read at random.

    Args:
        folder: where the records lie, as `prepare` returned it.
        split: name of the split.
    """

    def __init__(self, folder: Path, split: str) -> None:
        manifest = check(folder)
        if split not in manifest["counts"]:
            raise DataError(f"{folder} has no split {split!r}, only {', '.join(manifest['counts'])}")
        self.folder, self.split = folder, split
        self.about: dict[str, Any] = manifest["about"]
        self.labels = self._side(manifest, "labels")
        self._sizes = dict(zip(manifest["sizes"], self._side(manifest, "sizes").T, strict=True))
        self._source = _open(folder, split)
        if not len(self._source) == len(self.labels) == manifest["counts"][split]:
            raise DataError(f"{folder}: split {split} has {len(self._source):,} records, {len(self.labels):,} labels")

    def _side(self, manifest: dict[str, Any], what: str) -> np.ndarray:
        name = f"{self.split}.{what}.npy"
        raw = (self.folder / name).read_bytes()
        if hashlib.sha256(raw).hexdigest() != manifest["files"][name]["sha256"]:
            raise DataError(f"{self.folder / name} is damaged (SHA-256): delete {self.folder} to have it built again")
        array: np.ndarray = np.load(io.BytesIO(raw), allow_pickle=False)
        return array

    def __len__(self) -> int:
        return len(self.labels)

    def sizes(self, name: str = "length") -> np.ndarray:
        """The number stored under `name` for every record, int64 `(N,)`."""
        sizes: np.ndarray = self._sizes[name]
        return sizes

    def read(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The stored fields of several records; names the record that cannot be read."""
        wanted = [int(i) for i in indices]
        try:
            records: list[dict[str, Any]] = self._source.__getitems__(wanted)
        except Exception as first:
            for i in wanted:
                try:
                    self._source.__getitems__([i])
                except Exception as error:
                    raise DataError(f"{self.where(i)} cannot be read ({one_line(error)})") from error
            raise DataError(f"{self.folder}: {self.split} cannot be read ({one_line(first)})") from first
        return records

    def where(self, i: int) -> str:
        """A record's name in an error."""
        return f"record {i} of split {self.split} in {self.folder}"


def _open(folder: Path, split: str) -> Any:
    tfds = _tfds()
    return tfds.builder_from_directory(os.fspath(folder)).as_data_source(split)


def _tfds() -> Any:
    """tensorflow-datasets, silent: its notes about custom configurations say nothing to a user of this program."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    import tensorflow_datasets as tfds

    return tfds


def _build(
    building: Path, spec: RecordSpec, splits: Mapping[str, Iterable[Example]], progress: Progress | None
) -> Path:
    tfds = _tfds()
    features = {name: tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes") for name in spec.fields}
    features["label"] = tfds.features.Scalar(np.int64)
    sides: dict[str, tuple[list[int], list[tuple[int, ...]]]] = {}

    def stored(split: str, examples: Iterable[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        labels, sizes = sides.setdefault(split, ([], []))
        for i, example in enumerate(examples):
            labels.append(example.label)
            sizes.append(example.sizes)
            if progress and i % 1000 == 0:
                progress(f"records of {split}", i, spec.counts[split])
            yield i, {**example.fields, "label": example.label}
        if len(labels) != spec.counts[split]:
            raise DataError(f"{spec.name}: {split} has {len(labels):,} records, expected {spec.counts[split]:,}")
        if progress:
            progress(f"records of {split}", len(labels), len(labels))

    class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore
        """Examples in their order, under the name of the set."""

        name = spec.name
        VERSION = tfds.core.Version(spec.version)
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=spec.config, version=spec.version),)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Records of {spec.name}, {spec.config}; see {MANIFEST}.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: stored(split, examples) for split, examples in splits.items()}

        def _generate_examples(self) -> Any:
            raise NotImplementedError

    with contextlib.redirect_stdout(io.StringIO()), _no_bars(tfds):
        builder = Records(config=spec.config, data_dir=os.fspath(building), file_format="array_record")
        builder.download_and_prepare()
    made = Path(builder.data_dir)
    for split, (labels, sizes) in sides.items():
        np.save(made / f"{split}.labels.npy", np.asarray(labels, np.int64))
        np.save(made / f"{split}.sizes.npy", np.asarray(sizes, np.int64))
    return made


@contextlib.contextmanager
def _no_bars(tfds: Any) -> Iterator[None]:
    """Progress is ours to show."""
    shown = tfds.core.utils.tqdm_utils._active
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            tfds.enable_progress_bar()


def _write_manifest(made: Path, spec: RecordSpec) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(made.iterdir())}
    manifest = {
        "format_version": FORMAT,
        "name": spec.name,
        "config": spec.config,
        "version": spec.version,
        "counts": dict(spec.counts),
        "sizes": list(spec.sizes),
        "about": dict(spec.about),
        "files": files,
    }
    for name in files:
        sync(made / name)
    with open(made / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    sync(made)


def _check_room(root: Path, spec: RecordSpec) -> None:
    free = shutil.disk_usage(root).free
    if free < spec.expected_bytes:
        raise DataError(
            f"too little room at {root}: {spec.name} needs about {spec.expected_bytes / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free: make room or set data.dir"
        )
