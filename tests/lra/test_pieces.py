"""Pieces of reviews: pairs of one or of two, and rows of which one is asked for."""

import pickle
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from chela.core.errors import DataError
from lra.datamodule import LRADataModule
from lra.pieces import Pairs, SampledRecords, cosine_accuracy, hashed
from lra.source import DataConfig
from lra.tasks.base import InMemory
from lra.tasks.retrieval import Retrieval
from lra.tasks.select import Select, Selections


class Reviews(InMemory):
    """Reviews in which each byte tells which review it is of, and at what place: place · 7 + review, modulo 251."""

    def __init__(self, number: int = 12, shortest: int = 60) -> None:
        lengths = [shortest + 5 * i for i in range(number)]
        super().__init__([((np.arange(n) * 7 + i) % 251 + 1, i % 2) for i, n in enumerate(lengths)])

    def labels(self) -> np.ndarray:
        return np.array([label for _, label in self.read(range(len(self)))])


def found(reviews: Reviews, text: bytes) -> set[tuple[int, int]]:
    """Every (review, place) where a text stands."""
    wholes = [(ids - 1).astype(np.uint8).tobytes() for ids, _ in reviews.read(range(len(reviews)))]
    return {(i, at) for i, whole in enumerate(wholes) for at in range(len(whole)) if whole.startswith(text, at)}


def test_a_pair_is_two_disjoint_pieces_of_one_review_or_of_two() -> None:
    reviews = Reviews()
    pairs = Pairs(reviews, 20, 400, "test", words=False)  # type: ignore[arg-type]
    for i, ((first, second), label) in enumerate(pairs.read(range(400))):
        assert label == i % 2 and len(first) == len(second) == 20
        sides = [found(reviews, (ids - 1).astype(np.uint8).tobytes()) for ids in (first, second)]
        one = [(a, b) for a in sides[0] for b in sides[1] if a[0] == b[0]]
        if label:
            assert any(abs(a[1] - b[1]) >= 20 for a, b in one)
        else:
            assert any(a[0] != b[0] for a in sides[0] for b in sides[1])


def test_where_a_piece_lies_tells_nothing_of_the_label() -> None:
    """Early or late in its review, by side: the same shares for both labels, to four standard errors."""
    pairs = Pairs(Reviews(1000, 300), 100, 1, "test", words=False)  # type: ignore[arg-type]
    places: dict[int, list[float]] = {0: [], 1: []}
    seen = []
    pairs.text = lambda review, start, length: seen.append((review, start)) or b"x" * length  # type: ignore[method-assign]
    for i in range(4000):
        seen.clear()
        pairs.texts(i)
        assert (seen[0][0] == seen[1][0]) == bool(i & 1)
        places[i & 1] += [start / (pairs._bytes[review] - 100) for review, start in seen]
        assert all(0 <= start <= pairs._bytes[review] - 100 for review, start in seen)
    means = [np.mean(places[label]) for label in (0, 1)]
    assert abs(means[0] - means[1]) < 4 * np.sqrt(2 / 4000) * np.std(places[0])
    assert np.mean(np.array(places[1])[::2] > np.array(places[1])[1::2]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("make", [lambda r: Pairs(r, 20, 9, "train", False), lambda r: Selections(SMALL, r, "train")])
def test_training_records_are_a_function_of_seed_and_step(make) -> None:
    records: SampledRecords = make(Reviews())
    again: SampledRecords = pickle.loads(pickle.dumps(records))
    drawn = [records.batch(8, 4, 0, step) for step in range(12)]
    assert all(np.array_equal(again.batch(8, 4, 0, step), drawn[step]) for step in (11, 3, 0))
    assert len(np.unique(drawn)) == 96  # none comes again
    assert not np.isin([records.batch(8, 4, 1, step) for step in range(4)], drawn).any()
    assert np.array_equal(again.read(drawn[5])[3][0], records.read(drawn[5])[3][0])
    for batch in drawn:
        assert max(max(len(x) for x in (e if isinstance(e, tuple) else (e,))) for e, _ in records.read(batch)) <= (
            records.longest(batch)
        )
    sizes = [records.lengths_of(batch) for batch in drawn[:4]]
    if len(np.unique(sizes)) > 1:  # a pool's batches: each of like lengths
        by_batch = sorted((size.min(), size.max()) for size in sizes)
        assert all(a[1] <= b[0] for a, b in pairwise(by_batch))


def test_validation_and_test_are_drawn_apart_and_short_reviews_left_out() -> None:
    one, other = (Pairs(Reviews(12, 10), 20, 9, name, words=False) for name in ("validation", "test"))  # type: ignore[arg-type]
    assert [one.texts(i) for i in range(9)] != [other.texts(i) for i in range(9)]
    assert one._usable.tolist() == list(range(6, 12))


SMALL = Select(shortest=10, longest=30, names=5, turns=3, word="bipw", train=50, validation=20, test=400)


def test_a_selection_is_ends_of_reviews_by_turns() -> None:
    reviews = Reviews()
    records = Selections(SMALL, reviews, "test")  # type: ignore[arg-type]
    ends = [(ids - 1).astype(np.uint8).tobytes() for ids, _ in reviews.read(range(12))]
    first, names, found, sizes = Counter[int](), Counter[int](), Counter[bool](), []
    for i, (ids, targets) in enumerate(records.read(range(400))):
        SMALL.check(ids, targets)
        texts, own_names, _ = records.drawn(i)
        own = [257 + name for name in own_names]
        starts = np.flatnonzero(ids >= 257)
        assert len(ids) == records.lengths()[i] and len(set(own)) == 4
        assert starts[0] == 0 and len(starts) == 12 and np.array_equal(np.flatnonzero(targets != -100), starts)
        told = dict.fromkeys(own, b"")
        for part in np.split(ids, starts[1:]):
            told[int(part[0])] += (part[1:] - 1).astype(np.uint8).tobytes()
        assert list(told.values()) == texts
        for name, target in zip(ids[starts].tolist(), targets[starts].tolist(), strict=True):
            assert any(end.endswith(told[name]) for end in ends)
            assert target == bool(re.search(rb"(?<![a-z0-9'])bipw(?![a-z0-9'])", told[name].lower()))
            found[target] += 1
        sizes += [len(piece) for piece in told.values()]
        first[own.index(ids[0])] += 1
        names.update(own)
    assert min(sizes) == 10 and max(sizes) == 30
    assert len(first) == 4 and min(first.values()) > 70 and len(found) == 2 and min(found.values()) > 100
    assert set(names) == set(range(257, 262)) and min(names.values()) > 270  # of 320 in the mean


def test_words_are_ids_of_their_own() -> None:
    ids = hashed(b"A film, a FILM; it's bad")
    assert ids.tolist()[:2] == ids.tolist()[2:4] and len(ids) == 6 and 1 <= ids.min() <= ids.max() <= 2047
    assert len(hashed(b"... --- ...")) == 1  # a piece may hold no word, a sequence must not be empty
    task = Select(shortest=10, longest=30, words=True)
    record = Selections(task, Reviews(), "test").read([0])[0][0]  # type: ignore[arg-type]
    assert task.vocab_size == 2048 + 256 and (record >= 2048).sum() == 6 * 4


def test_what_is_to_beat_in_select_knows_the_turn_at_hand_and_a_number() -> None:
    task = Select(shortest=10, longest=30, names=5, turns=3, word="bipw", words=True, train=300, test=300)
    task.dataset = lambda split: Selections(task, Reviews(), split)  # type: ignore[method-assign,arg-type]
    share = float(task.baseline().split("%")[0]) / 100
    targets = [target for _, target in task._turns("test")]
    assert max(np.mean(targets), 1 - np.mean(targets)) + 0.01 < share < 0.99
    assert Select().baseline() == ""


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Select(shortest=5, longest=4), r"task\.longest: expected shortest=5 or more, got 4"),
        (lambda: Select(word="the film"), r"task\.word: expected one word .*, got 'the film'"),
        (lambda: Select(names=3), r"task\.names: expected pieces=4 or more, got 3"),
        (lambda: Select(pieces=0), r"task\.pieces: expected at least 1, got 0"),
        (lambda: Select().dataset("train"), r"call prepare\(\) before"),
        (lambda: Select().dataset("trian"), "expected one of train, validation, test"),
        (lambda: Retrieval(words=True).prepare(DataConfig()), r"task\.words=true with data\.source=imdb alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(made, message: str) -> None:
    with pytest.raises((ValueError, DataError), match=message):
        made()


def test_the_cosine_tells_pieces_by_their_rare_words() -> None:
    """Each review has words of its own among common ones: all pairs are told; with common words alone, none is."""
    draw = np.random.default_rng(0)

    def reviews(own: int) -> Reviews:
        made = Reviews(40, 400)
        texts = []
        for i in range(40):
            words = [f"own{i}" if draw.random() < own / 10 else f"common{draw.integers(30)}" for _ in range(60)]
            texts.append((np.frombuffer(" ".join(words).encode(), np.uint8).astype(np.int64) + 1, i % 2))
        made._records, made._lengths = texts, np.array([len(text) for text, _ in texts])
        return made

    told, not_told = (
        cosine_accuracy(*(Pairs(reviews(own), 150, 300, name, words=False) for name in ("train", "test")))  # type: ignore[arg-type]
        for own in (5, 0)
    )
    assert told > 0.97 and 0.4 < not_told < 0.6


def test_real_reviews(real_text: DataConfig) -> None:
    """Splits share no review, batches have the shapes, and every result says what it is not."""
    data = DataConfig(dir=real_text.dir, root=real_text.root, source="imdb")
    made = LRADataModule(Retrieval(max_length=256, test=50), data, batch_size=8, seed=0, max_steps=2)
    for batch in made.train_dataloader():
        assert batch["inputs"].shape == (16, 256) and batch["mask"] is None and batch["labels"].shape == (8,)
    assert "stand-in" in made.task.note and "Not LRA's" in made.task.note
    assert 0.55 < float(made.task.baseline().split("%")[0]) / 100 < 0.95
    texts = {split: set(made.records(split)._texts) for split in ("train", "validation", "test")}  # type: ignore[attr-defined]
    assert not texts["validation"] & texts["train"] and len(texts["test"] & texts["train"]) < 100  # of the release
    assert made.task.read_line("one text\tanother")[1].tolist() == [byte + 1 for byte in b"another"]
    selection = LRADataModule(
        Select(), DataConfig(dir=real_text.dir, root=real_text.root), batch_size=4, seed=0, max_steps=2
    )
    for batch in selection.train_dataloader():
        assert batch["inputs"].shape[0] == 4 and 424 <= batch["inputs"].shape[1] <= 1224 == selection.task.l_max
    assert "not a task of LRA's" in selection.task.note


def test_without_reviews_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="aclImdb"):
        Select().prepare(DataConfig(dir=str(tmp_path), download=False))
