"""The order of the data: which records make a batch is a pure function of (seed, step); nothing has to be saved.

The training stream is one epoch's permutation after another. It is cut into batches of exactly ``batch_size`` records;
where the number of records is no multiple of that, the last batch of an epoch is filled up by the first records of the
next epoch's permutation, which are then not drawn again: every record comes once an epoch, no batch is ragged, none
is dropped. Within an epoch, each pool of ``pool`` batches is sorted by length (equal lengths in random order), cut into
batches, and these are shuffled: records of similar length share a batch, and padding stays small.

The random numbers are splitmix64's (Steele, Lea and Flood 2014). numpy does not promise equal streams from one version
to the next, but the order must survive an upgrade. ``lra.generators`` compiles the same ``mix``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lra.tasks.base import IGNORED, Encoded, Label, sequences

Batch = dict[str, Any]
"""What the network is given, see ``collate``."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)


def mix(z: np.ndarray) -> np.ndarray:
    """Scramble uint64 words, element by element: splitmix64's last step, a bijection."""
    z = (z ^ (z >> _30)) * MIX_1
    z = (z ^ (z >> _27)) * MIX_2
    mixed: np.ndarray = z ^ (z >> _31)
    return mixed


def key(*parts: int | str) -> np.uint64:
    """Return one 64-bit key for integers and names. Their order counts."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        word = zlib.crc32(part.encode()) if isinstance(part, str) else part % 2**64
        state = mix(state + GOLDEN + np.array([word], np.uint64))
    return np.uint64(state[0])


def permutation(n: int, *parts: int | str) -> np.ndarray:
    """Return a permutation of ``range(n)`` that depends on the key alone; int64 ``(n,)``. Costs one sort of n words.

    >>> sorted(permutation(5, 0, "epoch", 1).tolist())
    [0, 1, 2, 3, 4]
    """
    words = mix(np.arange(n, dtype=np.uint64) * GOLDEN + key(*parts))
    return np.argsort(words, kind="stable")


_permutation = lru_cache(maxsize=8)(permutation)


def _stream(n: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Return the records at positions start … stop−1 of the endless stream of epochs."""
    epochs = range(start // n, (stop - 1) // n + 1)
    orders: np.ndarray = np.concatenate([_permutation(n, seed, "epoch", epoch) for epoch in epochs])
    return orders[start - epochs[0] * n : stop - epochs[0] * n]


def batch_indices(lengths: np.ndarray, batch_size: int, pool: int, seed: int, step: int) -> np.ndarray:
    """Return the records of the global batch of a step.

    Args:
        lengths: Length of every record, ``(N,)``.
        batch_size: Records of a global batch.
        pool: Batches per bucketing pool; 1 shuffles fully.
        seed: Of the run.
        step: Counted from 0 over the whole run.

    Returns:
        int64 ``(batch_size,)``. Costs one sort of a pool, O(pool·batch_size·log), and one of N an epoch.

    >>> lengths = np.arange(6)
    >>> epoch = [batch_indices(lengths, 2, 2, seed=0, step=t).tolist() for t in range(3)]
    >>> sorted(i for batch in epoch for i in batch)
    [0, 1, 2, 3, 4, 5]
    """
    n = len(lengths)
    epoch = step * batch_size // n
    first = -(-epoch * n // batch_size)  # the steps whose first record is of this epoch
    last = -(-(epoch + 1) * n // batch_size)
    begin = first + (step - first) // pool * pool
    number = min(pool, last - begin)
    records = _stream(n, seed, begin * batch_size, (begin + number) * batch_size)
    records = records[np.argsort(lengths[records], kind="stable")]
    place = _permutation(number, seed, "pool", begin)[step - begin]
    return records[place * batch_size : (place + 1) * batch_size]


def eval_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Return all records once, sorted by length, in batches of nearly equal size and at most ``batch_size``.

    Nearly equal, so that each of several processes finds work in every batch.
    """
    order = np.argsort(lengths, kind="stable")
    return np.array_split(order, -(-len(order) // batch_size)) if len(order) else []


def collate(records: Sequence[tuple[Encoded, Label]], length: int, step: int) -> Batch:
    """Pad encoded records to ``length``.

    Args:
        records: (input, label) of each.
        length: L, at least the longest.
        step: Passed on.

    Returns:
        ``inputs`` ``(B, L)`` int64 or ``(B, L, F)`` float32; ``mask`` ``(B, L)`` bool (True: real), None when every
        token is real; ``labels`` ``(B,)`` int64, or ``(B, L)`` padded with −100; ``step``. Records that are pairs give
        inputs and mask of ``2B`` rows: the first documents, then the second.
    """
    import torch

    rows = [row for side in zip(*(sequences(encoded) for encoded, _ in records), strict=True) for row in side]
    lengths = np.array([len(row) for row in rows])
    inputs = _padded(rows, length, np.int64 if rows[0].ndim == 1 else np.float32, 0)
    labels = [label for _, label in records]
    targets = _padded(labels, length, np.int64, IGNORED) if np.ndim(labels[0]) else np.array(labels, np.int64)
    return {
        "inputs": torch.from_numpy(inputs),
        "mask": torch.from_numpy(np.arange(length) < lengths[:, None]) if lengths.min() < length else None,
        "labels": torch.from_numpy(targets),
        "step": step,
    }


def _padded(rows: Sequence[Any], length: int, dtype: type, filler: int) -> np.ndarray:
    out = np.full((len(rows), length, *rows[0].shape[1:]), filler, dtype)
    for padded, row in zip(out, rows, strict=True):
        padded[: len(row)] = row
    return out
