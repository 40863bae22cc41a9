"""Text to token ids by the conventions of three code bases. Padding is id 0 in all of them.

- `lra`: bytes, id = byte + 1, cut at 4,000; 257 ids (long-range-arena, `text_classification/input_pipeline.py`).
- `s4`: characters that occur often enough in the training texts, by falling frequency, after `<pad>`, `<unk>` and
  `<eos>`; cut so that the closing `<eos>` is the last of 4,096 (Text) or 4,000 (Retrieval) (state-spaces/s4,
  `src/dataloaders/lra.py`). Equal frequencies are ordered by code point.
- `mega`: bytes after fairseq's four special ids (padding moved to 0), `<eos>` appended, cut at 4,001. Its prepared data
  was never published: the layout is inferred from fairseq's defaults and its 4,002 positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONVENTIONS = ("lra", "s4", "mega")

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

    def with_characters(self, about: Mapping[str, Any], min_frequency: int) -> TextEncoding:
        """The same convention with the vocabulary of `s4`, from the counts stored with the records."""
        counts: dict[str, int] = about["characters"]
        frequent = "".join(c for c, n in counts.items() if n >= min_frequency)
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
        characters = text.tobytes().decode("utf-8", "replace")[: self.max_length - 1]
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
        counts.update(text.tobytes().decode("utf-8", "replace"))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def number_of_characters(text: bytes) -> int:
    """Characters of UTF-8 text; what is no UTF-8 counts as it is decoded, by replacement."""
    return len(text) if text.isascii() else len(text.decode("utf-8", "replace"))
