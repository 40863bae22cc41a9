"""Text to token ids by the conventions of three code bases. Padding is id 0 in all of them.

- `lra`: bytes, id = byte + 1, cut at 4,000; 257 ids (long-range-arena, `text_classification/input_pipeline.py`).
- `s4`: characters that occur often enough in the training texts, by falling frequency, after `<pad>`, `<unk>` and
  `<eos>`; cut so that the closing `<eos>` is the last of 4,096 (Text) or 4,000 (Retrieval), and counted after the cut
  (state-spaces/s4, `src/dataloaders/lra.py`). Equal frequencies are ordered by code point.
- `mega`: bytes after fairseq's four special ids (padding moved to 0), `<eos>` appended, cut at 4,001. Its prepared data
  was never published: the layout is inferred from fairseq's defaults and its 4,002 positions.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lra.builder import RecordSet

CONVENTIONS = ("lra", "s4", "mega")

_READ_AT_ONCE = 1000
_MEGA_SPECIALS = 4  # <pad>, <s>, </s>, <unk>
_MEGA_EOS = 2
_S4_UNKNOWN, _S4_EOS, _S4_SPECIALS = 1, 2, 3


@dataclass(frozen=True)
class TextEncoding:
    """A convention, its longest sequence, and for `s4` its characters.

    Attributes:
        convention: `lra`, `s4` or `mega`.
        max_length: longest sequence, `<eos>` included.
        characters: of `s4`: the vocabulary in the order of its ids.
    """

    convention: str
    max_length: int
    characters: str = ""
    _ids: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {c: i + _S4_SPECIALS for i, c in enumerate(self.characters)})

    def with_characters(self, records: RecordSet, names: Mapping[str, str], min_frequency: int) -> TextEncoding:
        """The same convention with the vocabulary of `s4`: what is frequent in the training texts as they are cut.

        The counts stored with the records are those of whole texts. What lies beyond the cut is taken off, so that
        only texts longer than it are read.

        Args:
            records: of the training split.
            names: of the fields that hold texts, each with the name of its stored number of characters.
            min_frequency: what occurs less often is `<unk>`.
        """
        seen = self.max_length - 1
        unseen = np.zeros(sys.maxunicode + 1, np.int64)  # by code point
        longer = np.flatnonzero(np.max([records.sizes(number) for number in names.values()], axis=0) > seen)
        for first in range(0, len(longer), _READ_AT_ONCE):
            some = records.read(longer[first : first + _READ_AT_ONCE])
            rest = "".join(_decoded(record[name])[seen:] for record in some for name in names)
            unseen += np.bincount(np.frombuffer(rest.encode("utf-32-le"), np.uint32), minlength=len(unseen))
        whole: dict[str, int] = records.about["characters"]
        counts = {c: n - int(unseen[ord(c)]) for c, n in whole.items()}
        frequent = "".join(c for c, n in _by_frequency(counts) if n >= min_frequency)
        return TextEncoding(self.convention, self.max_length, frequent)

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return {"lra": 257, "s4": _S4_SPECIALS + len(self.characters), "mega": _MEGA_SPECIALS + 256}[self.convention]

    def encode(self, text: np.ndarray) -> np.ndarray:
        """Ids of a text given as bytes.

        Args:
            text: uint8 `(n,)`.

        Returns:
            uint16 `(min(n, …),)`.

        >>> TextEncoding("lra", 4000).encode(np.frombuffer(b"ab", np.uint8)).tolist()
        [98, 99]
        >>> TextEncoding("s4", 4, "eab").encode(np.frombuffer("abcde".encode(), np.uint8)).tolist()
        [4, 5, 1, 2]
        >>> TextEncoding("mega", 3).encode(np.frombuffer(b"abc", np.uint8)).tolist()
        [101, 102, 2]
        """
        if self.convention == "lra":
            shifted: np.ndarray = text[: self.max_length].astype(np.uint16) + 1
            return shifted
        if self.convention == "mega":
            ids: np.ndarray = np.full(min(len(text), self.max_length - 1) + 1, _MEGA_EOS, np.uint16)
            ids[:-1] = text[: self.max_length - 1]
            ids[:-1] += _MEGA_SPECIALS
            return ids
        characters = _decoded(text)[: self.max_length - 1]
        numbers = [self._ids.get(c, _S4_UNKNOWN) for c in characters]
        return np.array([*numbers, _S4_EOS], np.uint16)

    def lengths(self, size: np.ndarray, characters: np.ndarray) -> np.ndarray:
        """Encoded length of texts of `size` bytes and so many `characters`."""
        if self.convention == "lra":
            count = size
        else:
            count = 1 + (characters if self.convention == "s4" else size)
        limited: np.ndarray = np.minimum(count, self.max_length)
        return limited

    def cut(self, size: int, characters: int) -> int:
        """Bytes (characters for `s4`) of a text that the model does not see."""
        seen = self.max_length - (self.convention != "lra")
        return max(0, (characters if self.convention == "s4" else size) - seen)


def count_characters(texts: Iterable[np.ndarray]) -> dict[str, int]:
    """How often each character occurs, in falling order, then by code point."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_decoded(text))
    return dict(_by_frequency(counts))


def _decoded(text: np.ndarray) -> str:
    return text.tobytes().decode("utf-8", "replace")


def _by_frequency(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def number_of_characters(text: bytes) -> int:
    """Characters of UTF-8 text; what is no UTF-8 counts as it is decoded, by replacement."""
    return len(text) if text.isascii() else len(text.decode("utf-8", "replace"))
