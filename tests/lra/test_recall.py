"""Recall: its records by the definition, and its mixes."""

import numpy as np
import pytest

from lra.tasks.base import IGNORED
from lra.tasks.recall import Recall

MIX = {
    split: f"{number} of 3 in 16, 40 of 5 in 24" for split, number in (("train", 50), ("validation", 7), ("test", 9))
}


@pytest.fixture
def task() -> Recall:
    return Recall(symbols=40, **MIX)


def test_facts(task):
    assert (task.l_max, task.vocab_size, task.num_classes, task.objective) == (24, 40, 40, "tokens")
    zoology = Recall()
    assert (zoology.l_max, zoology.vocab_size) == (1024, 8192)
    assert len(zoology.dataset("train")) == 180_000 and len(zoology.dataset("test")) == 7_000


def test_a_record_is_pairs_then_its_keys_at_even_places(task):
    records = task.dataset("train")
    assert records.lengths().tolist() == [16] * 50 + [24] * 40 and records.groups().tolist() == [3] * 50 + [5] * 40
    for (tokens, targets), pairs in zip(records.read(range(90)), records.groups().tolist(), strict=True):
        task.check(tokens, targets)
        keys, values = tokens[0 : 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < 20 for key in keys) and all(20 <= value < 40 for value in values)
        asked = np.flatnonzero(targets != IGNORED)
        assert len(asked) == pairs and (asked >= 2 * pairs).all() and (asked % 2 == 0).all()
        assert dict(zip(keys, values, strict=True)) == {int(tokens[t]): int(targets[t]) for t in asked}


def test_a_record_depends_on_its_number_alone(task):
    records = task.dataset("train")
    (alone,), among = records.read([7]), records.read([3, 7])
    assert np.array_equal(alone[0], among[1][0]) and np.array_equal(alone[1], among[1][1])
    assert not np.array_equal(alone[0], task.dataset("test").read([7])[0][0])
    assert not np.array_equal(alone[0], Recall(symbols=40, seed=1, **MIX).dataset("train").read([7])[0][0])


def test_gaps_follow_the_power_law():
    """With one pair the gap g has probability g^(a − 1) / Σ; so many records tell 0.02 apart."""
    task = Recall(symbols=8, train="4000 of 1 in 18", validation="1 of 1 in 18", test="1 of 1 in 18")
    gaps = [
        int(np.flatnonzero(targets != IGNORED)[0] - 2) // 2 for _, targets in task.dataset("train").read(range(4000))
    ]
    weight = np.arange(1, 9) ** (0.01 - 1)
    np.testing.assert_allclose(np.bincount(gaps, minlength=8) / 4000, weight / weight.sum(), atol=0.025)


def test_one_value_as_the_constant_answer(task):
    records = task.dataset("train")
    assert records.majority_accuracy() == 1 / 20
    targets = np.concatenate([targets for _, targets in records.read(range(90))])
    assert np.bincount(targets[targets != IGNORED]).max() / (targets != IGNORED).sum() < 0.12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "12 pairs"}, "task.train: expected NUMBER of PAIRS in LENGTH, … .*, got '12 pairs'"),
        ({"test": "5 of 7 in 24"}, "a quarter of the length"),
        ({"symbols": 8}, "one for each of 3 keys, got 40 of 5 in 24"),
        ({"train": "0 of 3 in 16"}, "at least 1 record"),
    ],
)
def test_a_bad_mix_is_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        Recall(**{"symbols": 40, **MIX, **options})
