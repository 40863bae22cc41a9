import numpy as np
import pytest

from lra.batches import batch_indices, eval_batches, permutation
from lra.generators.listops import generate
from lra.tasks.listops import ListOps


def run(lengths: np.ndarray, batch: int, pool: int, seed: int, steps: range) -> list[np.ndarray]:
    return [batch_indices(lengths, batch, pool, seed, t) for t in steps]


@pytest.mark.parametrize(
    ("n", "batch", "pool"), [(100, 8, 5), (97, 8, 3), (10, 7, 2), (5, 8, 2), (1, 3, 2), (64, 64, 8)]
)
def test_every_record_once_an_epoch_whatever_the_tail(n: int, batch: int, pool: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 99, n)
    steps = n * 6  # 6 · batch whole epochs
    counts = np.zeros(n, int)
    for t, records in enumerate(run(lengths, batch, pool, 3, range(steps))):
        assert len(records) == batch
        np.add.at(counts, records, 1)
        # At no border of a pool has any record come more often than another by more than the pool in between.
        assert counts.max() - counts.min() <= 2 + pool * batch // n, t
    assert set(counts) == {6 * batch}


def test_order_is_a_pure_function_of_seed_and_step() -> None:
    lengths = np.random.default_rng(2).integers(1, 99, 100)
    forward = run(lengths, 8, 4, 0, range(60))
    for t in (59, 0, 31, 12, 13, 40):
        assert np.array_equal(batch_indices(lengths, 8, 4, 0, t), forward[t])
    other = run(lengths, 8, 4, 1, range(60))
    assert not all(np.array_equal(a, b) for a, b in zip(forward, other, strict=True))
    assert not np.array_equal(forward[0], forward[25])  # the next epoch has another order


def test_the_order_is_a_promise() -> None:
    assert permutation(8, 0, "epoch", 0).tolist() == [3, 0, 6, 2, 7, 1, 4, 5]
    assert batch_indices(np.arange(64) % 7, 4, 2, 0, 5).tolist() == [59, 54, 13, 6]


def test_lengths_do_not_decide_when_a_record_comes() -> None:
    """Batches of a pool are shuffled: the short ones must not always come first."""
    lengths = np.random.default_rng(3).integers(1, 1000, 6400)
    means = [np.mean(lengths[b]) for b in run(lengths, 8, 8, 0, range(800))]
    by_place = np.array(means).reshape(100, 8).mean(0)
    assert by_place.std() < 60, by_place  # sorted pools would give 330


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Return the share of these batches' tokens that is padding, in [0, 1]."""
    real = sum(int(lengths[batch].sum()) for batch in batches)
    filled = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1.0 - real / filled


def test_padding_stays_under_ten_percent_on_listops() -> None:
    trees = generate(ListOps(train=20_000, validation=1, test=1))
    lengths = np.array([len(tree) for tree, _ in trees[:20_000]])
    share = padding_share(lengths, run(lengths, 64, 8, 0, range(312)))
    assert share < 0.10
    assert padding_share(lengths, run(lengths, 64, 1, 0, range(312))) > 0.35  # the measure is not blind


def test_evaluation_sees_every_record_once_in_order_of_length() -> None:
    lengths = np.random.default_rng(4).integers(1, 99, 101)
    batches = eval_batches(lengths, 8)
    order = np.concatenate(batches)
    assert sorted(order) == list(range(101))
    assert np.all(np.diff(lengths[order]) >= 0)
    assert {len(b) for b in batches} <= {7, 8}
