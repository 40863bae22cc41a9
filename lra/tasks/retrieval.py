"""Retrieval: two papers, does one cite the other? The ACL Anthology Network pairs of LRA, where the user has them.

Their texts may not be passed on, so they cannot be fetched. ``data.source=imdb`` is a stand-in, whose results are not
LRA's, as ``note`` says: are two pieces of one movie review (``lra.pieces``)?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chela.core.errors import DataError
from chela.core.options import option, shown
from lra.builder import Example, prepare
from lra.pieces import BYTES_OF_A_WORD, IDS, Pairs, cosine_accuracy, hashed, reviews_of
from lra.source import DataConfig, Layout, digest, locate
from lra.tasks.base import Records
from lra.tasks.text import Text, TextTask

READ_BYTES = 10_000  # of a document that LRA looks at before it cuts to 4,000 tokens
COUNTS = {"train": 147_086, "validation": 18_090, "test": 17_437}
FILES = {"train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
AAN = Layout("the pairs of the LRA release", FILES["train"])


def _read_pairs(path: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield label and documents of an unquoted file: a label, two names and two documents, with tabs between."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            label, *row = line.removesuffix("\n").removesuffix("\r").split("\t")
            if len(row) != 4 or label not in ("0", "1", "0.0", "1.0") or not all(row[-2:]):
                raise DataError(
                    f"{path} line {number}: expected a label 0 or 1 and 4 fields with a tab between, got "
                    f"{shown(label)} and {len(row)} fields, {row.count('')} of them empty: the file is damaged"
                )
            first, second = (text.encode("utf-8", "surrogateescape")[:READ_BYTES] for text in row[-2:])
            yield int(label[0]), first, second


@dataclass
class Retrieval(TextTask):
    """Two classes, unrelated 0 and cited 1 (of imdb: of one review 1); a record is a pair of documents.

    Of imdb, ``max_length`` is the bytes of a piece, and training pairs are new at every step: ``train`` of them count
    as an epoch.
    """

    train: int = option(0, "pairs to train on; 0: all", ge=0)
    validation: int = option(0, "pairs to validate on; 0: all", ge=0)
    test: int = option(0, "pairs to test on; 0: all", ge=0)
    words: bool = option(False, "imdb: words hashed to 2,048 ids, in place of bytes", neutral=False)

    pair = True
    sources = ("auto", "imdb")
    texts: ClassVar[Mapping[str, str]] = {"first": "first", "second": "second"}
    classes = ("unrelated", "related")  # related: the first cites the second; of imdb, of one review
    input_help = "two documents with a tab between"
    retired: ClassVar[dict[str, Any]] = {"encoding": "lra", "min_frequency": 10}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reviews: Text | None = None  # of imdb
        if self.words:
            self.l_max, self.vocab_size = self.cut // BYTES_OF_A_WORD, IDS

    def build(self, data: DataConfig) -> Path:
        """Build the records of LRA's pairs, or of the reviews that pieces are taken from."""
        if self.words and data.source != "imdb":
            raise DataError(f"retrieval: expected task.words=true with data.source=imdb alone, got {data.source}")
        if data.source == "imdb":
            self._reviews = reviews_of(data)
            self.note = "a stand-in: are two pieces of one IMDb review? Not LRA's pairs of papers"
            return self._reviews.folder

        # only its folder tells one user's pairs from another's
        given = None if data.root is None else locate(self.name, data, [AAN])[1].parent
        spec = self.spec(f"aan_{digest(given)}" if given else "aan", COUNTS)

        def splits() -> dict[str, Iterator[Example]]:
            folder = given or locate(self.name, data, [AAN])[1].parent
            spec.about["origin"] = f"{AAN.name}: {folder}"
            return {split: self.examples(_read_pairs(folder / name)) for split, name in FILES.items()}

        return prepare(data.folder(), spec, splits)

    def dataset(self, split: str) -> Records:  # type: ignore[override]
        """Return the records of a split; of imdb they are drawn on demand."""
        if self._reviews is None:
            return super().dataset(split)
        found = self._reviews.dataset(split)
        return Pairs(found, self.cut, getattr(self, split) or len(found), split, self.words)

    def baseline(self) -> str:
        """Return what the cosine of TF-IDF vectors scores on pairs of pieces."""
        train, test = self.dataset("train"), self.dataset("test")
        if not (isinstance(train, Pairs) and isinstance(test, Pairs)):
            return ""
        return f"{cosine_accuracy(train, test):.2%} by a threshold on the cosine of TF-IDF vectors of words"

    def ids(self, text: np.ndarray) -> np.ndarray:
        """Return the ids of one text: of its words, hashed, or of its bytes."""
        return hashed(text.tobytes())[: self.l_max] if self.words else super().ids(text)
