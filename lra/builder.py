"""From a source to versioned records on disk, built once, trusted only when whole.

A set of records is a tensorflow-datasets builder in array_record form (no TensorFlow), in
``DIR/NAME/CONFIG/VERSION``. Beside its files lie, per split, ``SPLIT.labels.npy`` and ``SPLIT.sizes.npy``, so that
lengths and classes are known without a pass over the records, and ``records.json``: format version, counts, and the
size and SHA-256 of every file. Nothing half-made ever has the name of the set.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from chela.core.errors import DataError
from chela.core.files import make_folder, sha256, sync, write_whole

T = TypeVar("T")

FORMAT = 1  # version of the layout above
MANIFEST = "records.json"


class Example(NamedTuple):
    """One record to be stored."""

    fields: Mapping[str, np.ndarray]  # name to uint8 array (n,)
    label: int  # the class
    sizes: tuple[int, ...]  # numbers stored beside the records, for ``RecordSet.sizes``


Splits = Callable[[], Mapping[str, Iterable[Example]]]


@dataclass(frozen=True)
class RecordSpec:
    """What a set of records is."""

    name: str  # of the builder, ``lra_listops``
    config: str  # everything that decides the bytes, as a folder's name
    version: str  # of the content, ``1.0.0``
    fields: tuple[str, ...]  # names of the byte fields
    counts: dict[str, int]  # records of each split; a build that yields another number fails
    sizes: tuple[str, ...] = ("length",)  # names of the numbers in ``Example.sizes``
    about: dict[str, Any] = field(default_factory=dict)  # kept in ``records.json``; may grow while records are read

    def folder(self, root: Path) -> Path:
        """Return where the records lie under the data folder ``root``."""
        return root / self.name / self.config / self.version


log, _said = logging.getLogger(__name__), 0.0


def say_progress(what: str, done: int, total: int) -> None:
    """Log, every five seconds of a build, how far it is."""
    global _said
    if time.monotonic() - _said > 5:
        _said = time.monotonic()
        log.warning("%s: %s of %s", what, f"{done:,}", f"{total:,}")


def prepare(root: Path, spec: RecordSpec, splits: Splits) -> Path:
    """Build the records under the data folder ``root`` unless they are there, and return their folder.

    ``splits`` is called only if there is something to build; it yields the examples of each split, in order.

    Raises:
        UsageError: The folder cannot be written.
        DataError: The records cannot be read, or are not ``spec.counts``.
    """
    folder = spec.folder(root)
    if not folder.exists():
        make_folder(folder.parent, "data.dir")
        from filelock import FileLock  # imported here: few runs build

        with FileLock(folder.parent / f".{folder.name}.lock"):  # the lock ends with the process
            if not folder.exists():  # else it was built by the process that held the lock
                _build(folder, spec, splits)
    check(folder, spec.counts)
    return folder


def check(folder: Path, counts: Mapping[str, int] | None = None, *, full: bool = False) -> dict[str, Any]:
    """Return the manifest of a folder of records, its format, counts and sizes checked; every SHA-256 too if ``full``.

    Raises:
        DataError: Naming the file, what was expected and what came.
    """
    remedy = f"delete {folder} to have it built again"
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, held, files = manifest["format_version"], manifest["counts"], manifest["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} is missing or does not parse ({error!r}): {remedy}") from None
    if version != FORMAT:
        raise DataError(f"{folder} is of another version of this program, format {version}, not {FORMAT}: {remedy}")
    if counts and held != counts:
        raise DataError(f"{folder} holds {held} records, expected {counts}: {remedy}")
    for path, stored in ((folder / name, stored) for name, stored in files.items()):
        size = path.stat().st_size if path.is_file() else 0
        if size != stored["bytes"]:
            raise DataError(f"{path} is damaged: expected {stored['bytes']:,} bytes, got {size:,}: {remedy}")
        if full and sha256(path) != stored["sha256"]:
            raise DataError(f"{path} is damaged: its SHA-256 is not {stored['sha256'][:12]}…: {remedy}")
    return manifest


class RecordSet:
    """The records of one split of the folder that ``prepare`` returned, in their stored order, read at random.

    Attributes:
        labels: Class of every record, int64 ``(N,)``.
        sizes: The numbers stored beside the records, by ``RecordSpec.sizes``, int64 ``(N,)`` each.
    """

    def __init__(self, folder: Path, split: str) -> None:
        manifest = check(folder)
        self.folder, self.split = folder, split
        self.labels: np.ndarray = np.load(folder / f"{split}.labels.npy", allow_pickle=False)
        sizes = np.load(folder / f"{split}.sizes.npy", allow_pickle=False).T
        self.sizes: dict[str, np.ndarray] = dict(zip(manifest["sizes"], sizes, strict=True))
        self._source = quiet_tfds().builder_from_directory(os.fspath(folder)).as_data_source(split)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Return the stored fields of several records. Raises ``DataError`` naming the one that cannot be read."""
        wanted = [int(i) for i in indices]
        try:
            records: list[dict[str, Any]] = self._source.__getitems__(wanted)
        except Exception as error:
            for i in wanted if len(wanted) > 1 else ():  # which is it?
                self.read([i])
            where = f"record {wanted[-1]} of split {self.split} in {self.folder}"
            raise DataError(f"{where} cannot be read ({str(error)[:200]})") from error
        return records


def quiet_tfds() -> Any:
    """Import tensorflow-datasets without its bars and its notes on custom configurations."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.basicConfig(format="%(message)s")  # else absl sets it up, with level and module before every line
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    return tfds


def _build(folder: Path, spec: RecordSpec, splits: Splits) -> None:
    global _said
    _said = time.monotonic()
    building = folder.parent / f".{spec.version}.building"
    shutil.rmtree(building, ignore_errors=True)  # of a build that was killed: nobody else holds the lock
    try:
        made = _write_records(building, spec, splits())
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(made.iterdir())}
        for name in files:
            sync(made / name)
        facts = {name: getattr(spec, name) for name in ("name", "config", "version", "counts", "sizes", "about")}
        manifest = {"format_version": FORMAT, **facts, "files": files}
        write_whole(made / MANIFEST, json.dumps(manifest, indent=2).encode())
        os.rename(made, folder)
        sync(folder.parent)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: {error.strerror}, while {folder} is built") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_records(building: Path, spec: RecordSpec, splits: Mapping[str, Iterable[Example]]) -> Path:
    """Write the records and what lies beside them, and return their folder below ``building``."""
    tfds = quiet_tfds()
    features = {name: tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes") for name in spec.fields}
    features["label"] = tfds.features.Scalar(np.int64)
    beside: dict[str, list[Any]] = {}

    def stored(split: str, examples: Iterable[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        labels = beside[f"{split}.labels.npy"] = []
        sizes = beside[f"{split}.sizes.npy"] = []
        for i, example in enumerate(examples):
            labels.append(example.label)
            sizes.append(example.sizes)
            if len(labels) % 1000 == 0:
                say_progress(f"records of {split}", len(labels), spec.counts[split])
            yield i, {**example.fields, "label": example.label}
        if len(labels) != spec.counts[split]:
            raise DataError(f"{spec.name}: {split} has {len(labels):,} records, expected {spec.counts[split]:,}")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore
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

    with contextlib.redirect_stdout(io.StringIO()):
        builder = Builder(config=spec.config, data_dir=os.fspath(building), file_format="array_record")
        builder.download_and_prepare()
    made = Path(builder.data_dir)
    for name, values in beside.items():
        np.save(made / name, np.asarray(values, np.int64))
    return made


def prefetch(calls: Iterable[Callable[[], T]], workers: int = 0) -> Iterator[T]:
    """Yield the results of ``calls``, which may be endless, in order, computed ahead by threads (0: one per core).

    At most 2 · ``workers`` results wait for the reader. What a call raises comes in its place; when the reader stops,
    the calls that have not begun are dropped.
    """
    workers = workers or os.cpu_count() or 1
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
