"""Text: IMDb movie reviews (Maas et al., ACL 2011), and what all tasks of texts share: bytes made into token ids.

Padding is id 0, a byte's id is its value + 1 (long-range-arena, ``text_classification/input_pipeline.py``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chela.core.errors import DataError
from chela.core.options import option
from lra.builder import Example, RecordSet, RecordSpec, prepare, say_progress
from lra.source import DataConfig, Layout, Remote, check_content, locate, members
from lra.tasks.base import Encoded
from lra.tasks.stored import StoredTask

LRA_LENGTH = 4_000  # bytes to which LRA cuts a text


@dataclass
class TextTask(StoredTask):
    """One or two texts a record, each cut to ``max_length`` bytes."""

    max_length: int = option(0, "longest sequence; 0: LRA's 4,000 bytes", ge=0, le=1_000_000)

    num_classes = 2
    vocab_size = 257
    texts: ClassVar[Mapping[str, str]] = {"text": "bytes"}  # the fields of a record, and the names of their sizes
    classes = ("negative", "positive")
    retired: ClassVar[dict[str, Any]] = {"encoding": "lra", "min_frequency": 15}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.l_max = self.cut = self.max_length or LRA_LENGTH

    def spec(self, config: str, counts: dict[str, int]) -> RecordSpec:
        """Return what a set of texts is."""
        fields, sizes = tuple(self.texts), tuple(self.texts.values())
        return RecordSpec(f"lra_{self.name}", config, self.version, fields, counts, sizes)

    def examples(self, records: Iterable[tuple[Any, ...]]) -> Iterator[Example]:
        """Yield the examples of a split, given (class, text) or (class, text, text) of each record; texts are bytes."""
        for label, *texts in records:
            fields = {name: np.frombuffer(text, np.uint8) for name, text in zip(self.texts, texts, strict=True)}
            yield Example(fields, label, tuple(map(len, texts)))

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """Return the ids of the texts, uint16, each cut to ``max_length``.

        >>> Text(max_length=3).encode({"text": np.frombuffer(b"abcd", np.uint8)}).tolist()
        [98, 99, 100]
        """
        first, *rest = (self.ids(record[name]) for name in self.texts)
        return (first, rest[0]) if rest else first

    def ids(self, text: np.ndarray) -> np.ndarray:
        """Return the ids of one text, given its bytes."""
        return text[: self.cut].astype(np.uint16) + np.uint16(1)

    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """Return the length of the longer text."""
        return np.asarray(np.max([records.sizes[name] for name in self.texts.values()], axis=0).clip(max=self.cut))

    def read_line(self, line: str) -> Encoded:
        """Return the input that a text, or two with a tab between, stand for. Raises ``ValueError``."""
        parts = line.split("\t", len(self.texts) - 1)
        if len(parts) != len(self.texts):
            raise ValueError(f"expected {self.input_help}")
        raw = (np.frombuffer(part.encode("utf-8", "surrogateescape"), np.uint8) for part in parts)
        return self.encode(dict(zip(self.texts, raw, strict=True)))


ARCHIVE = Remote(
    file="aclImdb_v1.tar.gz",
    url="http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    size=84_125_825,
    sha256="c40f74a18d3b61f90feba1e17730e0d38e8b97c05fe7008942e91923d1658fe0",
)
CONTENT = "dd09fd32e408e0f8f60c1c7f8f13fe147d8fe1cfe9942629eb266cc58f9039cc"
"""SHA-256 of the 50,000 labelled reviews in stored order: whatever form they came in, these are the ones."""

COUNTS = {"train": 25_000, "test": 25_000}
CLASSES = ("neg", "pos")

Review = tuple[str, int, bytes]  # split, label, text


def _read(found: Path) -> Iterator[Review]:
    """Yield the labelled reviews of an archive, or of the tree in which one of them was found."""
    source = found.parents[2] if found.suffix == ".txt" else found
    place = re.compile(rf"(?:\./)?[^/]+/({'|'.join(COUNTS)})/({'|'.join(CLASSES)})/[^/]+\.txt")
    for name, raw in members(source, place.fullmatch):
        _, split, label, _ = name.rsplit("/", 3)
        yield split, CLASSES.index(label), raw


LAYOUTS = (
    Layout("the extracted tree", "aclImdb/train/pos/0_*.txt"),
    Layout("the official archive", ARCHIVE.file, ARCHIVE),
    Layout("the labelled part as an archive", "aclImdb*.tar.*"),
)


def _in_order(reviews: Iterator[Review]) -> dict[str, list[tuple[int, bytes]]]:
    """Return (label, text) of each split in the order of their digests, which does not depend on the form."""
    found: dict[str, list[tuple[bytes, int, bytes]]] = {split: [] for split in COUNTS}
    for n, (split, label, raw) in enumerate(reviews):
        text = raw.strip()  # as tensorflow-datasets does, and so LRA
        found[split].append((hashlib.blake2b(text, digest_size=16, key=bytes([label])).digest(), label, text))
        if n % 1000 == 0:
            say_progress("reading reviews", n, sum(COUNTS.values()))
    for split, number in COUNTS.items():
        found[split].sort()
        if (got := len(found[split])) != number:
            raise DataError(f"text: {split} has {got:,} reviews, expected {number:,}: fetch {ARCHIVE.file} again")
    check_content("text", (digest for split in COUNTS for digest, *_ in found[split]), CONTENT, ARCHIVE)
    return {split: [(label, text) for _, label, text in reviews_] for split, reviews_ in found.items()}


@dataclass
class Text(TextTask):
    """Two classes, negative 0 and positive 1."""

    train: int = option(0, "reviews to train on, after those held out; 0: all", ge=0)
    validation: int = option(2_500, "training reviews kept apart (data.validation=holdout)", ge=1, le=24_998)
    test: int = option(0, "reviews to test on; 0: all 25,000", ge=0)

    input_help = "a review"

    def build(self, data: DataConfig) -> Path:
        """Build the records of all labelled reviews."""
        spec = self.spec("plain_text", COUNTS)

        def splits() -> Mapping[str, Iterator[Example]]:
            layout, path = locate(self.name, data, LAYOUTS)
            spec.about.update(origin=f"{layout.name}: {path}", content_sha256=CONTENT)
            reviews = _in_order(_read(path))
            return {split: self.examples(reviews[split]) for split in COUNTS}

        return prepare(data.folder(), spec, splits)

    def choose(self, split: str, policy: str) -> tuple[str, np.ndarray]:
        """Hold out the first reviews of each class: stored order is that of digests, so they are a fair sample."""
        if "test" in (split, policy):
            return super().choose(split, policy)
        positive = self.records("train").labels.astype(bool)
        rank = np.where(positive, np.cumsum(positive), np.cumsum(~positive))  # of a review among its class
        order = np.argsort(rank, kind="stable")
        return "train", np.sort(order[: self.validation] if split == "validation" else order[self.validation :])
