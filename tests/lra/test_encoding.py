from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.tasks.retrieval import Retrieval
from lra.tasks.text import Text


def task(encoding: str, characters: str = "", longest: int = 0) -> Text:
    made = Text(encoding=encoding, max_length=longest)
    made.ids = {c: i for i, c in enumerate(characters, 3)}
    return made


def as_array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def test_the_conventions() -> None:
    record = {"text": as_array("naïve".encode())}
    assert task("lra").encode(record).tolist() == [111, 98, 196, 176, 119, 102]  # byte + 1
    assert task("mega").encode(record).tolist() == [114, 101, 199, 179, 122, 105, 2]
    assert task("s4", "aev").encode(record).tolist() == [1, 3, 1, 5, 4, 2]
    assert [task(name, "aev" if name == "s4" else "").vocab_size for name in ("lra", "mega", "s4")] == [257, 260, 6]


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=40) | st.text(min_size=1, max_size=20).map(str.encode), st.integers(2, 30))
@pytest.mark.parametrize("convention", ["lra", "s4", "mega"])
def test_lengths_are_known_without_encoding(convention: str, text: bytes, longest: int) -> None:
    made = task(convention, "abc" if convention == "s4" else "", longest)
    spec = made.spec("any", {"train": 1}, 0)
    (example,) = made.examples("train", [(0, text)], spec)
    ids = made.encode(example.fields)
    sizes = dict(zip(spec.sizes, example.sizes, strict=True))
    assert sizes == {"bytes": len(text), "characters": len(text.decode("utf-8", "replace"))}
    stored = SimpleNamespace(sizes=lambda name: np.array([sizes[name]]))
    assert len(ids) == made.encoded_lengths(stored)[0] <= longest == made.l_max  # type: ignore[arg-type]
    assert ids.min() > 0 and ids.max() < made.vocab_size and ids.dtype == np.uint16
    shown = made.draw(dict(example.fields), ids, 0)[0]
    total = sizes["characters" if convention == "s4" else "bytes"]
    assert (f"{total - made.seen:,} of {total:,}" in shown) == (total > made.seen)


def test_characters_are_counted_in_the_training_texts() -> None:
    made = Retrieval()
    for split in ("train", "test"):
        spec = made.spec("any", {}, 0)
        examples = list(made.examples(split, [(1, b"baab", "é".encode()), (0, b"b", b"b")], spec))
        assert [example.sizes for example in examples] == [(4, 2, 4, 1), (1, 1, 1, 1)]
        assert spec.about.get("characters") == ({"b": 4, "a": 2, "é": 1} if split == "train" else None)


class Stored:
    """What a set of records offers, with two texts a record."""

    def __init__(self, *texts: tuple[str, str]) -> None:
        self.texts = texts
        self.reads: list[int] = []
        self.about = {"characters": Counter(character for pair in texts for text in pair for character in text)}

    def sizes(self, name: str) -> np.ndarray:
        return np.array([len(pair[("first_characters", "second_characters").index(name)]) for pair in self.texts])

    def read(self, indices: np.ndarray) -> list[dict[str, np.ndarray]]:
        self.reads += indices.tolist()
        return [
            dict(zip(("first", "second"), (as_array(t.encode()) for t in self.texts[i]), strict=True)) for i in indices
        ]


@pytest.mark.parametrize(("longest", "characters"), [(10, "baé"), (4, "aéb"), (3, "aéb"), (2, "aé")])
def test_the_vocabulary_is_of_the_texts_as_they_are_cut(longest: int, characters: str) -> None:
    stored = Stored(("aabbb", "b"), ("éé", "ab"), ("éaéb", "x"))
    made = Retrieval(encoding="s4", max_length=longest, min_frequency=2).frequent(stored)  # type: ignore[arg-type]
    cut = "".join(text[: longest - 1] for pair in stored.texts for text in pair)
    counted = sorted({c for c in cut if cut.count(c) >= 2}, key=lambda c: (-cut.count(c), c))
    assert made == characters == "".join(counted)
    assert stored.reads == [i for i, pair in enumerate(stored.texts) if max(map(len, pair)) > longest - 1]
