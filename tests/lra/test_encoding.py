import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.tasks.encoding import TextEncoding, count_characters, number_of_characters


def as_array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def test_the_conventions() -> None:
    text = as_array("naïve".encode())
    assert TextEncoding("lra", 4000).encode(text).tolist() == [111, 98, 196, 176, 119, 102]  # byte + 1
    assert TextEncoding("mega", 4001).encode(text).tolist() == [114, 101, 199, 179, 122, 105, 2]
    assert TextEncoding("s4", 4096, "aev").encode(text).tolist() == [1, 3, 1, 5, 4, 2]
    assert TextEncoding("lra", 4000).vocab_size == 257
    assert TextEncoding("mega", 4000).vocab_size == 260
    assert TextEncoding("s4", 4000, "aev").vocab_size == 6


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=40) | st.text(min_size=1, max_size=20).map(str.encode), st.integers(2, 30))
@pytest.mark.parametrize("convention", ["lra", "s4", "mega"])
def test_lengths_are_known_without_encoding(convention: str, text: bytes, longest: int) -> None:
    encoding = TextEncoding(convention, longest, "abc")
    ids = encoding.encode(as_array(text))
    characters = number_of_characters(text)
    assert len(ids) == encoding.lengths(np.array([len(text)]), np.array([characters]))[0] <= longest
    assert ids.min() > 0 and ids.max() < encoding.vocab_size
    cut = encoding.cut(len(text), characters)
    total = characters if convention == "s4" else len(text)
    assert total - cut + (convention != "lra") == len(ids)


def test_characters_are_counted_by_falling_frequency_then_code_point() -> None:
    counts = count_characters([as_array(b"baab"), as_array("é".encode()), as_array(b"b")])
    assert list(counts.items()) == [("b", 3), ("a", 2), ("é", 1)]


class Stored:
    """What a set of records offers, with two texts a record."""

    def __init__(self, *texts: tuple[str, str]) -> None:
        self.texts = texts
        self.reads: list[int] = []
        self.about = {"characters": count_characters(as_array(text.encode()) for pair in texts for text in pair)}

    def sizes(self, name: str) -> np.ndarray:
        return np.array([len(pair[("first", "second").index(name)]) for pair in self.texts])

    def read(self, indices: np.ndarray) -> list[dict[str, np.ndarray]]:
        self.reads += indices.tolist()
        return [dict(zip("ab", (as_array(t.encode()) for t in self.texts[i]), strict=True)) for i in indices]


@pytest.mark.parametrize(("longest", "characters"), [(10, "baé"), (4, "aéb"), (3, "aéb"), (2, "aé")])
def test_the_vocabulary_is_of_the_texts_as_they_are_cut(longest: int, characters: str) -> None:
    stored = Stored(("aabbb", "b"), ("éé", "ab"), ("éaéb", "x"))
    made = TextEncoding("s4", longest).with_characters(stored, {"a": "first", "b": "second"}, 2)  # type: ignore[arg-type]
    cut = "".join(text[: longest - 1] for pair in stored.texts for text in pair)
    counted = sorted({c for c in cut if cut.count(c) >= 2}, key=lambda c: (-cut.count(c), c))
    assert made.characters == characters == "".join(counted)
    assert stored.reads == [i for i, pair in enumerate(stored.texts) if max(map(len, pair)) > longest - 1]
