"""Retrieval: two papers, does one cite the other? The ACL Anthology Network pairs of LRA, where the user has them.

Their texts may not be passed on, so they cannot be fetched. `data.source=scisumm` reads a small set of real papers and
real citations instead (made from CL-SciSumm); its results are not LRA's and `Task.note` says so.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lra.builder import Example, Progress, RecordSet, RecordSpec, prepare
from lra.errors import DataError
from lra.schema import DataConfig, RetrievalConfig
from lra.source import Form, Remote, digest, locate, verify
from lra.tasks.base import Task, sample
from lra.tasks.encoding import TextEncoding, count_characters, number_of_characters

READ_BYTES = 10_000  # of a document that LRA looks at before it cuts to 4,000 tokens

SPLITS = {"train": "train", "validation": "eval", "test": "test"}
"""Our name of a split and the one in the files."""

AAN_COUNTS = {"train": 147_086, "validation": 18_090, "test": 17_437}
SCISUMM_COUNTS = {"train": 4_380, "validation": 558, "test": 598}
_MAX_LENGTH = {"lra": 4000, "s4": 4000, "mega": 4001}

_SCISUMM = tuple(
    Remote(file, "", size, sha256)
    for file, size, sha256 in (
        ("scisumm_docs.jsonl.xz", 1_470_228, "210b0496e94b0a6cbc17c7dc632a173a479ff4a0365a8d352c0216eccccae446"),
        ("scisumm_pairs.train.tsv", 87_600, "65bcc64e80bb437816f15b8f79e1211e61306212c64c5d7e09e0e0f63d5225e2"),
        ("scisumm_pairs.eval.tsv", 11_160, "f52a9b47185710df096bfb1d978968f284f41d2d41ed8d3e014f1acf2c969c0b"),
        ("scisumm_pairs.test.tsv", 11_960, "bd53073f6687ae0ef1d161fbb20867463a728dd7fbc484b2ee29b771737b1a42"),
    )
)

Pair = tuple[int, bytes, bytes]


def _rows(path: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of an unquoted tsv file."""
    if not path.is_file():
        raise DataError(f"{path} is missing: expected the three splits {', '.join(SPLITS.values())} side by side")
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            row = line.removesuffix("\n").removesuffix("\r").split("\t")
            if len(row) != columns:
                raise DataError(f"{path} line {number} has {len(row)} columns, expected {columns}: the file is damaged")
            yield number, row


def _label(text: str, path: Path, number: int) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value not in (0.0, 1.0):
        raise DataError(f"{path} line {number} has label {text!r}, expected 0 or 1: the file is damaged")
    return int(value)


def _read_aan(base: Path) -> dict[str, Iterator[Pair]]:
    def pairs(split: str) -> Iterator[Pair]:
        path = base / f"new_aan_pairs.{SPLITS[split]}.tsv"
        for number, (label, _, _, first, second) in _rows(path, 5):
            documents = tuple(text.encode("utf-8", "surrogateescape")[:READ_BYTES] for text in (first, second))
            if not all(documents):
                raise DataError(f"{path} line {number} has an empty document: the file is damaged")
            yield _label(label, path, number), documents[0], documents[1]

    for split in SPLITS:  # missing files are said before any work
        next(_rows(base / f"new_aan_pairs.{SPLITS[split]}.tsv", 5), None)
    return {split: pairs(split) for split in SPLITS}


def _read_scisumm(base: Path) -> dict[str, Iterator[Pair]]:
    for remote in _SCISUMM:
        if not (base / remote.file).is_file():
            raise DataError(f"{base / remote.file} is missing: expected the four files of the scisumm set side by side")
        verify(base / remote.file, remote)
    with lzma.open(base / _SCISUMM[0].file, "rt", encoding="utf-8") as file:
        texts = {paper["id"]: paper["text"].encode()[:READ_BYTES] for paper in map(json.loads, file)}

    def pairs(split: str) -> Iterator[Pair]:
        path = base / f"scisumm_pairs.{SPLITS[split]}.tsv"
        for number, (label, first, second) in _rows(path, 3):
            yield _label(label, path, number), texts[first], texts[second]

    return {split: pairs(split) for split in SPLITS}


AAN = Form("the pairs of the LRA release", "new_aan_pairs.train.tsv", _read_aan)
SCISUMM = Form("the scisumm set", _SCISUMM[0].file, _read_scisumm)


class Retrieval(Task):
    """Two classes, unrelated 0 and cited 1; a record is a pair of documents."""

    name = "retrieval"
    version = "1.0.0"
    num_classes = 2
    pair = True
    sources = ("auto", "scisumm")

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.config = config
        self.encoding = TextEncoding(config.encoding, config.max_length or _MAX_LENGTH[config.encoding])
        self.l_max = self.encoding.max_length

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Number of ids; of the `s4` encoding it is known once the records are there."""
        if self.config.encoding == "s4" and not self.encoding.characters:
            raise DataError("retrieval: the vocabulary of encoding=s4 comes from the data: call prepare() first")
        return self.encoding.vocab_size

    def _build(self, data: DataConfig, progress: Progress | None) -> Path:
        scisumm = data.source == "scisumm"
        form, counts = (SCISUMM, SCISUMM_COUNTS) if scisumm else (AAN, AAN_COUNTS)
        hint = "" if scisumm else "; data.source=scisumm is a small real set, not LRA's"

        def find() -> Path:
            return locate(self.name, data, [form], progress, hint)[1]

        # nothing tells one user's pairs from another's but where they lie; those of scisumm have their checksums
        given = find() if form is AAN and data.root is not None else None
        spec = RecordSpec(
            name="lra_retrieval",
            config="scisumm" if scisumm else f"aan_{digest(given)}" if given else "aan",
            version=self.version,
            fields=("first", "second"),
            counts=counts,
            sizes=("first", "second", "first_characters", "second_characters"),
            expected_bytes=sum(counts.values()) * 10_000,
        )

        def splits() -> dict[str, Iterator[Example]]:
            path = given or find()
            spec.about["origin"] = f"{form.name}: {path}"
            pairs: dict[str, Iterator[Pair]] = form.read(path)
            return {split: self._examples(split, pairs[split], spec.about) for split in SPLITS}

        folder = prepare(data.folder(), spec, splits, progress)
        self.note = "the scisumm pairs, not LRA's" if scisumm else ""
        return folder

    @staticmethod
    def _examples(split: str, pairs: Iterator[Pair], about: dict[str, Any]) -> Iterator[Example]:
        counts: dict[str, int] = {}
        for label, first, second in pairs:
            fields = {"first": np.frombuffer(first, np.uint8), "second": np.frombuffer(second, np.uint8)}
            if split == "train":
                for c, n in count_characters(fields.values()).items():
                    counts[c] = counts.get(c, 0) + n
            sizes = (len(first), len(second), number_of_characters(first), number_of_characters(second))
            yield Example(fields, label, sizes)
        if split == "train":
            about["characters"] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def prepare(self, data: DataConfig, *, progress: Progress | None = None) -> None:
        """Make the records on first use, and learn the vocabulary that depends on them."""
        super().prepare(data, progress=progress)
        if self.config.encoding == "s4":
            names = {name: f"{name}_characters" for name in ("first", "second")}
            self.encoding = self.encoding.with_characters(self.records("train"), names, self.config.min_frequency)

    def encode(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of both documents, each cut to `l_max`."""
        return self.encoding.encode(record["first"]), self.encoding.encode(record["second"])

    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """Of the longer document, from the stored sizes."""
        lengths = [
            self.encoding.lengths(records.sizes(name), records.sizes(f"{name}_characters"))
            for name in ("first", "second")
        ]
        longer: np.ndarray = np.maximum(*lengths)
        return longer

    def _choose(self, split: str, policy: str) -> tuple[str, np.ndarray | None]:
        number = {"train": self.config.train, "validation": self.config.validation, "test": self.config.test}[split]
        return split, sample(np.arange(len(self.records(split))), number)


def make(config: RetrievalConfig) -> Retrieval:
    """The task of a configuration."""
    return Retrieval(config)
