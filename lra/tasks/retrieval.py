"""Retrieval: two papers, does one cite the other? The ACL Anthology Network pairs of LRA, where the user has them.

Their texts may not be passed on, so they cannot be fetched. Two stand-ins, whose results are not LRA's, as ``note``
says: ``data.source=imdb`` asks whether two pieces are of one movie review (``lra.pieces``), ``data.source=scisumm``
reads a small set of real papers and real citations (made from CL-SciSumm), from which nothing is learned that holds.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from chela.core.errors import DataError
from chela.core.options import option, shown
from lra.builder import Example, Progress, prepare
from lra.pieces import BYTES_OF_A_WORD, IDS, Pairs, cosine_accuracy, hashed, reviews_of
from lra.schema import DataConfig
from lra.source import Form, Remote, digest, locate, verify
from lra.tasks.base import Records
from lra.tasks.text import Text, TextTask

READ_BYTES = 10_000  # of a document that LRA looks at before it cuts to 4,000 tokens

SPLITS = {"train": "train", "validation": "eval", "test": "test"}
"""Our name of a split and the one in the files."""

AAN_COUNTS = {"train": 147_086, "validation": 18_090, "test": 17_437}
SCISUMM_COUNTS = {"train": 4_380, "validation": 558, "test": 598}

_SCISUMM = (
    Remote("scisumm_docs.jsonl.xz", "", 1_470_228, "210b0496e94b0a6cbc17c7dc632a173a479ff4a0365a8d352c0216eccccae446"),
    Remote("scisumm_pairs.train.tsv", "", 87_600, "65bcc64e80bb437816f15b8f79e1211e61306212c64c5d7e09e0e0f63d5225e2"),
    Remote("scisumm_pairs.eval.tsv", "", 11_160, "f52a9b47185710df096bfb1d978968f284f41d2d41ed8d3e014f1acf2c969c0b"),
    Remote("scisumm_pairs.test.tsv", "", 11_960, "bd53073f6687ae0ef1d161fbb20867463a728dd7fbc484b2ee29b771737b1a42"),
)

Pair = tuple[int, bytes, bytes]


def _pairs(path: Path, columns: int, document: Callable[[str], bytes]) -> Iterator[Pair]:
    """Yield the pairs of an unquoted tsv file: the label comes first in a line, what stands for the texts last."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            label, *row = line.removesuffix("\n").removesuffix("\r").split("\t")
            if len(row) + 1 != columns or label not in ("0", "1", "0.0", "1.0") or not all(row[-2:]):
                raise DataError(
                    f"{path} line {number}: expected a label 0 or 1 and {columns - 1} fields with a tab between, got "
                    f"{shown(label)} and {len(row)} fields, {row.count('')} of them empty: the file is damaged"
                )
            yield int(label[0]), document(row[-2])[:READ_BYTES], document(row[-1])[:READ_BYTES]


def _siblings(found: Path, names: Iterable[str]) -> list[Path]:
    """Return files that lie beside one that was found. Raises ``DataError`` naming one that does not."""
    paths = [found.with_name(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is missing: expected all files of the set side by side")
    return paths


def _read_aan(found: Path) -> dict[str, Iterator[Pair]]:
    paths = _siblings(found, (f"new_aan_pairs.{file}.tsv" for file in SPLITS.values()))
    encode = partial(str.encode, encoding="utf-8", errors="surrogateescape")
    return {split: _pairs(path, 5, encode) for split, path in zip(SPLITS, paths, strict=True)}


def _read_scisumm(found: Path) -> dict[str, Iterator[Pair]]:
    paths = _siblings(found, (remote.file for remote in _SCISUMM))
    for path, remote in zip(paths, _SCISUMM, strict=True):
        verify(path, remote)
    with lzma.open(found, "rt", encoding="utf-8") as file:
        texts = {paper["id"]: paper["text"].encode() for paper in map(json.loads, file)}
    return {split: _pairs(path, 3, texts.__getitem__) for split, path in zip(SPLITS, paths[1:], strict=True)}


AAN = Form("the pairs of the LRA release", "new_aan_pairs.train.tsv", _read_aan)
SCISUMM = Form("the scisumm set", _SCISUMM[0].file, _read_scisumm)


@dataclass
class Retrieval(TextTask):
    """Two classes, unrelated 0 and cited 1 (of imdb: of one review 1); a record is a pair of documents.

    Of imdb, ``max_length`` is the bytes of a piece, and training pairs are new at every step: ``train`` of them count
    as an epoch.
    """

    min_frequency: int = option(10, "s4: characters rarer than this in the training documents become <unk>", ge=1)
    train: int = option(0, "pairs to train on; 0: all", ge=0)
    validation: int = option(0, "pairs to validate on; 0: all", ge=0)
    test: int = option(0, "pairs to test on; 0: all", ge=0)
    words: bool = option(False, "imdb: words hashed to 2,048 ids, in place of bytes", neutral=False)

    pair = True
    sources = ("auto", "imdb", "scisumm")
    texts: ClassVar[Mapping[str, tuple[str, str]]] = {
        name: (name, f"{name}_characters") for name in ("first", "second")
    }
    longest: ClassVar[Mapping[str, int]] = {"lra": 4000, "s4": 4000, "mega": 4001}
    classes = ("no citation", "the first cites the second")
    input_help = "two documents with a tab between"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reviews: Text | None = None  # of imdb
        if self.words:
            self.l_max = self.seen // BYTES_OF_A_WORD

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Return the number of ids."""
        return IDS if self.words else super().vocab_size

    def build(self, data: DataConfig, progress: Progress | None) -> Path:
        """Build the records of LRA's pairs, of the small set, or of the reviews that pieces are taken from."""
        if (data.source == "imdb") > (self.encoding == "lra") or self.words > (data.source == "imdb"):
            raise DataError(
                "retrieval: expected task.encoding=lra with data.source=imdb, and task.words=true with it alone, got "
                f"task.encoding={self.encoding} task.words={str(self.words).lower()} data.source={data.source}"
            )
        if data.source == "imdb":
            self._reviews = reviews_of(data, progress)
            self.note = "a stand-in: are two pieces of one IMDb review? Not LRA's pairs of papers"
            return self._reviews.folder
        scisumm = data.source == "scisumm"
        form, counts = (SCISUMM, SCISUMM_COUNTS) if scisumm else (AAN, AAN_COUNTS)
        hint = "" if scisumm else "; data.source=scisumm is a small real set, not LRA's"

        def find() -> Path:
            return locate(self.name, data, [form], progress, hint)[1]

        # nothing tells one user's pairs from another's but where they lie; those of scisumm have their checksums
        given = find() if form is AAN and data.root is not None else None
        config = "scisumm" if scisumm else f"aan_{digest(given.parent)}" if given else "aan"
        spec = self.spec(config, counts, sum(counts.values()) * 10_000)

        def splits() -> dict[str, Iterator[Example]]:
            path = given or find()
            spec.about["origin"] = f"{form.name}: {path}"
            return {split: self.examples(split, pairs, spec) for split, pairs in form.read(path).items()}

        folder = prepare(data.folder(), spec, splits, progress)
        self.note = "the scisumm pairs, not LRA's" if scisumm else ""
        return folder

    def dataset(self, split: str) -> Records:
        """Return the records of a split; of imdb they are drawn on demand."""
        return super().dataset(split) if self._reviews is None else self._pairs(self._reviews, split)

    def _pairs(self, reviews: Text, split: str) -> Pairs:
        found = reviews.dataset(split)
        return Pairs(found, self.seen, getattr(self, split) or len(found), split, self.words)

    def baseline(self) -> str:
        """Return what the cosine of TF-IDF vectors scores on pairs of pieces."""
        if self._reviews is None:
            return ""
        accuracy = cosine_accuracy(self._pairs(self._reviews, "train"), self._pairs(self._reviews, "test"))
        return f"{accuracy:.2%} by a threshold on the cosine of TF-IDF vectors of words"

    def _ids(self, text: np.ndarray) -> np.ndarray:
        return hashed(text.tobytes())[: self.l_max] if self.words else super()._ids(text)


TASK = Retrieval
