"""Text: IMDb movie reviews (Maas et al., ACL 2011), and what all tasks of texts share: bytes made into token ids.

Padding is id 0. The conventions (README, "Encodings"):

- ``lra``: bytes, id = byte + 1 (long-range-arena, ``text_classification/input_pipeline.py``).
- ``s4``: characters that occur often enough in the training texts as they are cut, by falling frequency, after
  ``<pad>``, ``<unk>`` and ``<eos>`` (state-spaces/s4, ``src/dataloaders/lra.py``); equal ones by code point.
- ``mega``: bytes after fairseq's four special ids. MEGA's prepared data was never published: the layout is inferred
  from fairseq's defaults and its 4,002 positions.
"""

from __future__ import annotations

import hashlib
import html
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chela.core.errors import DataError
from chela.core.options import option
from lra.builder import Example, Progress, RecordSet, RecordSpec, prepare
from lra.schema import DataConfig
from lra.source import Form, Remote, check_content, locate, members, read_tfds
from lra.tasks.base import Encoded
from lra.tasks.stored import StoredTask

_READ_AT_ONCE = 1000
_FIRST = {"lra": 1, "s4": 3, "mega": 4}  # the first id of a byte or character
_UNKNOWN, _EOS = 1, 2


@dataclass
class TextTask(StoredTask):
    """One or two texts a record, and the vocabulary that they are encoded by."""

    encoding: str = option(
        "lra", "'lra': bytes; 's4': characters and <eos>; 'mega': bytes and <eos>", choices=("lra", "s4", "mega")
    )
    max_length: int = option(
        0, "longest sequence; 0: as LRA (4000), S4 (4096, pairs 4000) or MEGA (4001) cut it", ge=0, le=1_000_000
    )
    min_frequency: int = option(15, "s4: characters rarer than this in the training texts become <unk>", ge=1)

    num_classes = 2
    texts: ClassVar[Mapping[str, tuple[str, str]]] = {"text": ("bytes", "characters")}  # fields, names of their sizes
    longest: ClassVar[Mapping[str, int]] = {"lra": 4000, "s4": 4096, "mega": 4001}  # sequence of each encoding
    classes = ("negative", "positive")
    ids: ClassVar[Mapping[str, int]] = {}  # of s4: those of the characters of the vocabulary, after prepare

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length == 1:
            raise ValueError("task.max_length: expected 0, or 2 or more, got 1")
        self.l_max = self.max_length or self.longest[self.encoding]
        self.seen = self.l_max - (self.encoding != "lra")  # bytes or characters of a text, before any <eos>

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Return the number of ids. Raises ``DataError`` where it comes from data that is not there yet."""
        if self.encoding == "s4" and not self.ids:
            raise DataError(f"{self.name}: the vocabulary of encoding=s4 comes from the data: call prepare() first")
        return _FIRST[self.encoding] + (len(self.ids) or 256)

    def spec(self, config: str, counts: Mapping[str, int], expected_bytes: int) -> RecordSpec:
        """Return what a set of texts is."""
        sizes = sum(zip(*self.texts.values(), strict=True), ())
        name = f"lra_{self.name}"
        return RecordSpec(name, config, self.version, tuple(self.texts), counts, sizes, expected_bytes=expected_bytes)

    def examples(self, split: str, records: Iterable[tuple[Any, ...]], spec: RecordSpec) -> Iterator[Example]:
        """Yield the examples of a split, given (class, text) or (class, text, text) of each record; texts are bytes.

        Those of "train" leave how often each character occurs in ``spec.about``.
        """
        counts: Counter[str] = Counter()
        for label, *texts in records:
            fields = {name: np.frombuffer(text, np.uint8) for name, text in zip(self.texts, texts, strict=True)}
            decoded = [_decoded(field) for field in fields.values()]
            if split == "train":
                counts.update("".join(decoded))
            yield Example(fields, label, (*map(len, texts), *map(len, decoded)))
        if split == "train":
            spec.about["characters"] = dict(counts)

    def prepare(self, data: DataConfig, progress: Progress | None = None) -> None:
        """Make the records on first use, and learn the vocabulary that depends on them."""
        super().prepare(data, progress)
        if self.encoding == "s4":
            characters = self.frequent(self.records("train"))
            self.ids = {character: i for i, character in enumerate(characters, _FIRST["s4"])}

    def frequent(self, records: RecordSet) -> str:
        """Return the vocabulary of ``s4``: what is frequent in the training texts as they are cut.

        The counts stored with the records are those of whole texts. What lies beyond the cut is taken off, so that
        only texts longer than it are read.
        """
        unseen = np.zeros(sys.maxunicode + 1, np.int64)  # by code point
        longest = np.max([records.sizes(number) for _, number in self.texts.values()], axis=0)
        longer = np.flatnonzero(longest > self.seen)
        for first in range(0, len(longer), _READ_AT_ONCE):
            some = records.read(longer[first : first + _READ_AT_ONCE])
            rest = "".join(_decoded(record[name])[self.seen :] for record in some for name in self.texts)
            unseen += np.bincount(np.frombuffer(rest.encode("utf-32-le"), np.uint32), minlength=len(unseen))
        counts = {c: n - int(unseen[ord(c)]) for c, n in records.about["characters"].items()}
        frequent = sorted((-n, c) for c, n in counts.items() if n >= self.min_frequency)
        return "".join(c for _, c in frequent)

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """Return the ids of the texts, uint16, each cut to ``l_max``.

        >>> record = {"text": np.frombuffer(b"abcd", np.uint8)}
        >>> [Text(encoding=encoding, max_length=3).encode(record).tolist() for encoding in ("lra", "mega")]
        [[98, 99, 100], [101, 102, 2]]
        """
        first, *rest = (self._ids(record[name]) for name in self.texts)
        return (first, rest[0]) if rest else first

    def _ids(self, text: np.ndarray) -> np.ndarray:
        if self.encoding == "s4":
            ids = np.array([self.ids.get(c, _UNKNOWN) for c in _decoded(text)[: self.seen]], np.uint16)
        else:
            ids = text[: self.seen].astype(np.uint16) + np.uint16(_FIRST[self.encoding])
        return ids if self.encoding == "lra" else np.append(ids, np.uint16(_EOS))

    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """Return the length of the longer text, from the stored sizes."""
        sizes = [records.sizes(names[self.encoding == "s4"]) for names in self.texts.values()]
        longer: np.ndarray = np.minimum(np.max(sizes, axis=0), self.seen) + (self.l_max - self.seen)
        return longer

    def read_line(self, line: str) -> Encoded:
        """Return the input that a text, or two with a tab between, stand for. Raises ``ValueError``."""
        parts = line.split("\t", len(self.texts) - 1)
        if len(parts) != len(self.texts):
            raise ValueError(f"expected {self.input_help}")
        raw = (np.frombuffer(part.encode("utf-8", "surrogateescape"), np.uint8) for part in parts)
        return self.encode(dict(zip(self.texts, raw, strict=True)))

    def draw(self, record: dict[str, Any], encoded: Encoded, label: Any) -> tuple[str, str]:
        """Return the texts with what the encoding cuts off in another colour, and the meaning of the class."""
        texts = "".join(f"<div>{self._document(record[name])}</div>" for name in self.texts)
        return f'<div class="two">{texts}</div>' if self.pair else texts, self.classes[label]

    def _document(self, raw: np.ndarray) -> str:
        whole: Any = _decoded(raw) if self.encoding == "s4" else raw
        seen, unseen = (
            html.escape(part if isinstance(part, str) else _decoded(part))
            for part in (whole[: self.seen], whole[self.seen :])
        )
        cut = len(whole) - self.seen
        if cut <= 0:
            return f'<p class="text">{seen}</p>'
        told = f"<p>{cut:,} of {len(whole):,} {'characters' if self.encoding == 's4' else 'bytes'} are cut off</p>"
        return f'{told}<p class="text">{seen}<span class="cut" title="not seen">{unseen}</span></p>'


def _decoded(text: np.ndarray) -> str:
    return text.tobytes().decode("utf-8", "replace")


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


def _read_tree(found: Path) -> Iterator[Review]:
    for split in COUNTS:
        for label, name in enumerate(CLASSES):
            folder = found.parents[1] / split / name
            files = sorted(folder.glob("*.txt"))
            if len(files) != COUNTS[split] // 2:
                raise DataError(
                    f"{folder} holds {len(files):,} reviews, expected {COUNTS[split] // 2:,}: unpack it again"
                )
            for file in files:
                yield split, label, file.read_bytes()


def _read_archive(archive: Path) -> Iterator[Review]:
    place = re.compile(rf"(?:\./)?[^/]+/({'|'.join(COUNTS)})/({'|'.join(CLASSES)})/[^/]+\.txt")
    for name, raw in members(archive, place.fullmatch):
        _, split, label, _ = name.rsplit("/", 3)
        yield split, CLASSES.index(label), raw


def _read_prepared(info: Path) -> Iterator[Review]:
    for split, record in read_tfds(info, list(COUNTS)):
        yield split, int(record["label"]), bytes(record["text"])


FORMS = (
    Form("the extracted tree", "aclImdb/train/pos", _read_tree),
    Form("the official archive", ARCHIVE.file, _read_archive, ARCHIVE),
    Form("the labelled part as an archive", "aclImdb*.tar.*", _read_archive),
    Form("a prepared directory", "imdb_reviews/plain_text/*/dataset_info.json", _read_prepared),
)


def _in_order(reviews: Iterator[Review], progress: Progress | None) -> dict[str, list[tuple[int, bytes]]]:
    """Return (label, text) of each split in the order of their digests, which does not depend on the form."""
    found: dict[str, list[tuple[bytes, int, bytes]]] = {split: [] for split in COUNTS}
    for n, (split, label, raw) in enumerate(reviews):
        text = raw.strip()  # as tensorflow-datasets does, and so LRA
        found[split].append((hashlib.blake2b(text, digest_size=16, key=bytes([label])).digest(), label, text))
        if progress and n % 1000 == 0:
            progress("reading reviews", n, sum(COUNTS.values()))
    for split, number in COUNTS.items():
        found[split].sort()
        if len(found[split]) != number:
            raise DataError(f"text: {split} has {len(found[split]):,} reviews, expected {number:,}")
    check_content("text", (digest for split in COUNTS for digest, *_ in found[split]), CONTENT, ARCHIVE)
    return {split: [(label, text) for _, label, text in reviews_] for split, reviews_ in found.items()}


@dataclass
class Text(TextTask):
    """Two classes, negative 0 and positive 1."""

    train: int = option(0, "reviews to train on, after those held out; 0: all", ge=0)
    validation: int = option(2_500, "training reviews kept apart (data.validation=holdout)", ge=1, le=24_998)
    test: int = option(0, "reviews to test on; 0: all 25,000", ge=0)

    input_help = "a review"

    def build(self, data: DataConfig, progress: Progress | None) -> Path:
        """Build the records of all labelled reviews."""
        spec = self.spec("plain_text", COUNTS, 160_000_000)

        def splits() -> Mapping[str, Iterator[Example]]:
            form, path = locate(self.name, data, FORMS, progress)
            spec.about.update(origin=f"{form.name}: {path}", content_sha256=CONTENT)
            reviews = _in_order(form.read(path), progress)
            return {split: self.examples(split, reviews[split], spec) for split in COUNTS}

        return prepare(data.folder(), spec, splits, progress)

    def choose(self, split: str, policy: str) -> tuple[str, np.ndarray]:
        """Hold out the first reviews of each class: stored order is that of digests, so they are a fair sample."""
        if "test" in (split, policy):
            return super().choose(split, policy)
        positive = self.records("train").labels.astype(bool)
        rank = np.where(positive, np.cumsum(positive), np.cumsum(~positive))  # of a review among its class
        order = np.argsort(rank, kind="stable")
        return "train", np.sort(order[: self.validation] if split == "validation" else order[self.validation :])


TASK = Text
