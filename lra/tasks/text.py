"""Text: IMDb movie reviews (Maas et al., ACL 2011) as bytes or characters, positive or negative."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lra.builder import Example, Progress, RecordSet, RecordSpec, prepare
from lra.errors import DataError
from lra.schema import DataConfig, TextConfig
from lra.source import Form, Remote, locate, members, read_tfds
from lra.tasks.base import Task, sample
from lra.tasks.encoding import TextEncoding, count_characters, number_of_characters

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
_MAX_LENGTH = {"lra": 4000, "s4": 4096, "mega": 4001}

Review = tuple[str, int, bytes]  # split, label, text


def _read_tree(base: Path) -> Iterator[Review]:
    for split in COUNTS:
        for label, name in enumerate(CLASSES):
            folder = base / "aclImdb" / split / name
            files = sorted(folder.glob("*.txt"))
            if len(files) != COUNTS[split] // 2:
                raise DataError(
                    f"{folder} holds {len(files):,} reviews, expected {COUNTS[split] // 2:,}: unpack it again"
                )
            for file in files:
                yield split, label, file.read_bytes()


def _read_archive(archive: Path) -> Iterator[Review]:
    def place(name: str) -> tuple[str, str] | None:
        parts = name.removeprefix("./").split("/")
        known = len(parts) == 4 and parts[1] in COUNTS and parts[2] in CLASSES and parts[3].endswith(".txt")
        return (parts[1], parts[2]) if known else None

    for name, raw in members(archive, lambda name: place(name) is not None):
        split, label = place(name) or ("", "")
        yield split, CLASSES.index(label), raw


def _read_prepared(info: Path) -> Iterator[Review]:
    for split, record in read_tfds(info, list(COUNTS)):
        yield split, int(record["label"]), bytes(record["text"])


FORMS = (
    Form("the extracted tree", "aclImdb/train/pos", _read_tree),
    Form("the official archive", ARCHIVE.file, _read_archive, file=True, remote=ARCHIVE),
    Form("the labelled part as an archive", "aclImdb*.tar.*", _read_archive, file=True),
    Form("a prepared directory", "imdb_reviews/plain_text/*/dataset_info.json", _read_prepared, file=True),
)


def _examples(reviews: Iterator[Review], about: dict[str, Any], progress: Progress | None) -> dict[str, list[Example]]:
    """Examples by split, in an order that does not depend on the form they came in: that of their digests."""
    found: dict[str, list[tuple[bytes, int, bytes]]] = {split: [] for split in COUNTS}
    for n, (split, label, raw) in enumerate(reviews):
        text = raw.strip()  # as tensorflow-datasets does, and so LRA
        found[split].append((hashlib.blake2b(text, digest_size=16, key=bytes([label])).digest(), label, text))
        if progress and n % 1000 == 0:
            progress("reading reviews", n, sum(COUNTS.values()))
    whole = hashlib.sha256()
    for split in COUNTS:
        found[split].sort()
        for digest, _, _ in found[split]:
            whole.update(digest)
        if len(found[split]) != COUNTS[split]:
            raise DataError(f"text: {split} has {len(found[split]):,} reviews, expected {COUNTS[split]:,}")
    if whole.hexdigest() != CONTENT:
        raise DataError(
            f"text: these are not the reviews of the release (digest {whole.hexdigest()[:12]}…, "
            f"expected {CONTENT[:12]}…): fetch {ARCHIVE.url} again"
        )
    about["content_sha256"] = whole.hexdigest()
    examples = {
        split: [
            Example({"text": np.frombuffer(text, np.uint8)}, label, (len(text), number_of_characters(text)))
            for _, label, text in reviews_
        ]
        for split, reviews_ in found.items()
    }
    about["characters"] = count_characters(example.fields["text"] for example in examples["train"])
    return examples


class Text(Task):
    """Two classes, negative 0 and positive 1."""

    name = "text"
    version = "1.0.0"
    num_classes = 2

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.encoding = TextEncoding(config.encoding, config.max_length or _MAX_LENGTH[config.encoding])
        self.l_max = self.encoding.max_length

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """Number of ids; of the `s4` encoding it is known once the records are there."""
        if self.config.encoding == "s4" and not self.encoding.characters:
            raise DataError("text: the vocabulary of encoding=s4 comes from the data: call prepare() first")
        return self.encoding.vocab_size

    def _build(self, data: DataConfig, progress: Progress | None) -> Path:
        spec = RecordSpec(
            name="lra_text",
            config="plain_text",
            version=self.version,
            fields=("text",),
            counts=COUNTS,
            sizes=("bytes", "characters"),
            expected_bytes=160_000_000,
        )

        def splits() -> Mapping[str, list[Example]]:
            form, path = locate(self.name, data, FORMS, progress)
            spec.about["origin"] = f"{form.name}: {path}"
            return _examples(form.read(path), spec.about, progress)

        return prepare(data.folder(), spec, splits, progress)

    def prepare(self, data: DataConfig, *, progress: Progress | None = None) -> None:
        """Make the records on first use, and learn the vocabulary that depends on them."""
        super().prepare(data, progress=progress)
        if self.config.encoding == "s4":
            names = {"text": "characters"}
            self.encoding = self.encoding.with_characters(self.records("train"), names, self.config.min_frequency)

    def encode(self, record: dict[str, Any]) -> np.ndarray:
        """Ids of the review, cut to `l_max`."""
        return self.encoding.encode(record["text"])

    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """From the stored sizes."""
        return self.encoding.lengths(records.sizes("bytes"), records.sizes("characters"))

    def _choose(self, split: str, policy: str) -> tuple[str, np.ndarray | None]:
        """Held-out reviews are the first of each class; stored order is that of digests, so they are a fair sample."""
        if split == "test":
            return "test", sample(np.arange(COUNTS["test"]), self.config.test)
        if policy == "test":
            return "train", sample(np.arange(COUNTS["train"]), self.config.train)
        labels = self.records("train").labels
        rank = np.empty(len(labels), np.int64)  # of a review among its class
        for label in range(self.num_classes):
            rank[labels == label] = np.arange(np.count_nonzero(labels == label))
        held = np.argsort(rank, kind="stable")[: self.config.validation]
        if split == "validation":
            return "train", np.sort(held)
        return "train", sample(np.setdiff1d(np.arange(len(labels)), held), self.config.train)


def make(config: TextConfig) -> Text:
    """The task of a configuration."""
    return Text(config)
