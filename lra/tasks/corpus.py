"""Texts to model: at each symbol, what is the next one?

A symbol is one byte of the file, its id 1 … S by its place in the alphabet. A text is read where it lies, mapped into
memory; a compressed one is unpacked once under the data folder. README, "Corpora", has splits, counts and checksums.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from chela.core.errors import DataError
from chela.core.files import sha256
from chela.core.options import option, shown
from lra.source import DataConfig, Layout, Remote, given_root, locate, verify
from lra.tasks.base import SPLITS, Encoded, Task
from lra.texts import PACKED, Span, Windows, check_utf8, unpacked

BYTES = "".join(map(chr, range(256)))
"""All bytes, each as the character of its number, as in Latin-1; so are other alphabets written."""

PLACES = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}
"""Where each split begins and ends, in hundredths of the text, rounded down."""

MAHONEY = "http://mattmahoney.net/dc"
SHA256 = {
    "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "enwik8": "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    "enwik8.zip": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    "text8": "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
    "text8.zip": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    "wikitext-103-raw-v1.zip": "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
}


@dataclass
class Corpus(Task):
    """A text file of one's own, in UTF-8: ``data.root`` names it. The subclasses are the known corpora."""

    window: int = option(256, "symbols of a training window", ge=2, le=1_000_000)
    validation: int = option(0, "symbols to validate on, the first of the split; 0: all", ge=0)
    test: int = option(0, "symbols to test on, the first of the split; 0: all", ge=0)

    objective = "tokens"
    score = "loss"
    own_text = True
    in_order = True
    input_help = "a text; each symbol is answered by the next one's id"
    alphabet: ClassVar[str] = BYTES  # its symbols, in the order of their ids
    files: ClassVar[tuple[str, ...]] = ()  # names under which people have it, plain or compressed
    remote: ClassVar[Remote | None] = None  # where it can be fetched from
    content: ClassVar[Remote | None] = None  # bytes and SHA-256 that it must have, where one file is the whole of it
    parts: ClassVar[tuple[str, ...]] = ()  # the files of train, validation and test, where each has its own
    places: ClassVar[dict[str, tuple[int, int]]] = PLACES  # of the splits, where the text is one file

    def __post_init__(self) -> None:
        super().__post_init__()
        self.l_max = self.window
        self.context = f"windows of {self.window:,}, each alone: 1 to {self.window:,} symbols before"
        self.vocab_size = self.num_classes = len(self.alphabet) + 1
        self.table = np.zeros(256, np.uint16)
        self.table[[ord(symbol) for symbol in self.alphabet]] = np.arange(1, len(self.alphabet) + 1)
        self.before = b"\n" if "\n" in self.alphabet else b" "  # what stands before a text
        self._spans: dict[str, Span] = {}

    def prepare(self, data: DataConfig) -> None:
        """Find the text, unpack it on first use and check it. Raises ``DataError``."""
        super().prepare(data)
        paths = self._files(data)
        notes = [type(self).note]
        if self.own_text:
            check_utf8(self.name, paths[0])
            size, digest = paths[0].stat().st_size, sha256(paths[0])
            notes = [f"a text of one's own: {paths[0].name}, {size:,} bytes, SHA-256 {digest[:16]}…"]
        for split, path in zip(SPLITS, paths if self.parts else 3 * paths, strict=True):
            size = path.stat().st_size
            first, last = (0, size) if self.parts else (size * place // 100 for place in self.places[split])
            most = 0 if split == "train" else getattr(self, split)
            if 0 < most < last - first:
                notes.append(f"{split} is the first {most:,} symbols of {last - first:,}")
                last = first + most
            self._spans[split] = Span(path, first, last, self.before)
            if (size := last - first) <= self.window:
                got = f"{self.name}: {split} has {size:,} symbols, expected more than task.window={self.window:,}"
                raise DataError(f"{got}: give a longer text or a smaller window")
        self.note = "; ".join(filter(None, notes))

    def _files(self, data: DataConfig) -> list[Path]:
        """Return the file of the text, or those of its three parts, each checked."""

        def check(path: Path) -> None:
            if not path.is_file():
                raise DataError(f"{self.name}: expected a file at {path}, there is none")
            if self.content is not None:
                verify(path, self.content)

        root = given_root(self.name, data)
        if root is not None and root.is_file():
            found = root
        elif self.files:
            fetched = self.remote.file if self.remote else ""
            layouts = [Layout(name, name, self.remote if name == fetched else None) for name in self.files]
            found = locate(self.name, data, layouts)[1]
        else:
            got = "nothing" if root is None else f"{root}, which is no file"
            raise DataError(f"{self.name}: expected data.root=FILE, the text that is to be learned, got {got}")
        names = self.parts or (found.name.removesuffix(found.suffix),)
        if found.suffix in PACKED:
            return unpacked(found, names, data, check)
        paths = [found.with_name(name) for name in self.parts] or [found]
        for path in paths:
            check(path)
        return paths

    def dataset(self, split: str) -> Windows:
        """Return the windows of a split: in training one from each position on, else one after another."""
        stride = 1 if split == "train" else self.window
        return Windows(self.table, self.span(split), self.window, stride, once=split != "train")

    def pieces(self, split: str, window: int, stride: int) -> Windows:
        """Return windows of a split, each ``stride`` symbols after the one before; a symbol is a target once."""
        return Windows(self.table, self.span(split), window, stride, once=True)

    def span(self, split: str) -> Span:
        """Return the symbols of a split."""
        self.check_split(split, bool(self._spans))
        return self._spans[split]

    def words(self, split: str) -> int | None:
        """Count a split's words; None where the task does not know what a word is."""
        return None

    def read_line(self, line: str) -> Encoded:
        """Return the ids of a text. Raises ``ValueError`` naming a symbol that the task does not have."""
        for at, character in enumerate(line):
            raw = character.encode("utf-8", "surrogateescape")
            if not self.table[list(raw)].all():
                raise ValueError(f"{shown(character)} at position {at} is none of the {len(self.alphabet)} symbols")
        return self.table[np.frombuffer(line.encode("utf-8", "surrogateescape"), np.uint8)]


class Shakespeare(Corpus):
    """Forty thousand lines of Shakespeare by characters, split as nanoGPT does: there is no third part to test on."""

    own_text = False
    note = "the test set is the validation split: this text is cut in two, as nanoGPT does"
    alphabet = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    places: ClassVar[dict[str, tuple[int, int]]] = {"train": (0, 90), "validation": (90, 100), "test": (90, 100)}
    remote = content = Remote(
        "tinyshakespeare.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394,
        SHA256["tinyshakespeare.txt"],
    )
    files = (remote.file, "tinyshakespeare.txt.xz", "input.txt")


@dataclass
class _Large(Corpus):
    window: int = option(2048, "symbols of a training window", ge=2, le=1_000_000)

    own_text = False


class Enwik8(_Large):
    """The first hundred million bytes of the English Wikipedia of 2006, with its markup."""

    title = "enwik8"
    remote = Remote("enwik8.zip", f"{MAHONEY}/enwik8.zip", 36_445_475, SHA256["enwik8.zip"])
    content = Remote("enwik8", remote.url, 100_000_000, SHA256["enwik8"])
    files = (remote.file, "enwik8", "enwik8.txt", "enwik8.xz", "enwik8.txt.xz")


class Text8(_Large):
    """A hundred million characters of the same, cleaned to the letters a … z and the space."""

    title = "text8"
    alphabet = " abcdefghijklmnopqrstuvwxyz"
    remote = Remote("text8.zip", f"{MAHONEY}/text8.zip", 31_344_016, SHA256["text8.zip"])
    content = Remote("text8", remote.url, 100_000_000, SHA256["text8"])
    files = (remote.file, "text8", "text8.txt", "text8.xz", "text8.txt.xz")


class WikiText103(_Large):
    """Good and featured articles of the English Wikipedia, the raw text by bytes (arXiv 1609.07843)."""

    title = "WikiText-103"
    parts = ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw")
    remote = Remote(
        "wikitext-103-raw-v1.zip",
        "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        191_984_949,
        SHA256["wikitext-103-raw-v1.zip"],
    )
    files = (parts[0], remote.file)

    def words(self, split: str) -> int:
        """Count what white space separates, and an end for each line."""
        text = self.span(split).read(0, len(self.span(split))).tobytes()
        return len(text.decode("utf-8", "replace").split()) + text.count(b"\n")
