"""Which records make a batch: a pure function of (seed, step), so resuming and processes need no state.

The training stream is one epoch's permutation after another. It is cut into batches of exactly `batch_size` records;
where the number of records is no multiple of that, the last batch of an epoch is filled up by the first records of the
next epoch's permutation, which are then not drawn again: every record comes once an epoch, no batch is ragged, none
is dropped. Within an epoch's batches, each pool of `pool` batches is sorted by length (equal lengths in random order),
cut into batches, and these are shuffled: records of like length meet, and padding stays small.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lra.streams import permutation


@lru_cache(maxsize=4)
def _epoch(n: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(n, seed, "epoch", epoch)


@lru_cache(maxsize=4)
def _pool_order(number: int, seed: int, first_step: int) -> np.ndarray:
    return permutation(number, seed, "pool", first_step)


def _stream(n: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Records at positions start … stop−1 of the endless stream of epochs."""
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        parts.append(_epoch(n, seed, epoch)[max(start - epoch * n, 0) : stop - epoch * n])
    return np.concatenate(parts)


def batch_indices(lengths: np.ndarray, batch_size: int, pool: int, seed: int, step: int) -> np.ndarray:
    """The records of the global batch of a step.

    Args:
        lengths: length of every record, `(N,)`.
        batch_size: records of a global batch.
        pool: batches per bucketing pool; 1 shuffles fully.
        seed: of the run.
        step: counted from 0 over the whole run.

    Returns:
        int64 `(batch_size,)`. Costs one sort of a pool, O(pool·batch_size·log), and one of N an epoch.

    Raises:
        ValueError: no records, or a size below 1.

    >>> lengths = np.arange(6)
    >>> epoch = [batch_indices(lengths, 2, 2, seed=0, step=t).tolist() for t in range(3)]
    >>> sorted(i for batch in epoch for i in batch)
    [0, 1, 2, 3, 4, 5]
    """
    n = len(lengths)
    if n == 0 or batch_size < 1 or pool < 1 or step < 0:
        raise ValueError(
            f"batches: expected records, batch_size and pool of 1 or more and step of 0 or more, "
            f"got {n} records, batch_size {batch_size}, pool {pool}, step {step}"
        )
    epoch = step * batch_size // n
    first = -(-epoch * n // batch_size)  # the steps whose first record is of this epoch
    last = -(-(epoch + 1) * n // batch_size)
    begin = first + (step - first) // pool * pool
    number = min(pool, last - begin)
    records = _stream(n, seed, begin * batch_size, (begin + number) * batch_size)
    records = records[np.argsort(lengths[records], kind="stable")]
    place = _pool_order(number, seed, begin)[step - begin]
    batch: np.ndarray = records[place * batch_size : (place + 1) * batch_size]
    return batch


def eval_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """All records once, sorted by length, in batches of nearly equal size and at most `batch_size`.

    Nearly equal (rather than one short batch at the end) so that each of several processes finds work in every batch.
    """
    order = np.argsort(lengths, kind="stable")
    return np.array_split(order, -(-len(order) // batch_size)) if len(order) else []


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of the tokens of these batches that is padding, in [0, 1]."""
    real = sum(int(lengths[batch].sum()) for batch in batches)
    filled = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1.0 - real / filled
