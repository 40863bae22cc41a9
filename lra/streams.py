"""Numbers that look random and are a pure function of their key, the same on every machine and numpy version.

numpy promises no stable streams between its versions, and data order must survive an upgrade, so the few lines of
splitmix64 (Steele, Lea, Flood 2014) that are needed stand here.
"""

from __future__ import annotations

import zlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, element by element: a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def key(*parts: int | str) -> np.uint64:
    """One 64-bit key from integers and names, in order.

    >>> int(key(0, "epoch", 1)) == int(key(0, "epoch", 1)), int(key(0, "epoch", 1)) == int(key(0, "epoch", 2))
    (True, False)
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        word = zlib.crc32(part.encode()) if isinstance(part, str) else part % 2**64
        state = mix(state + GOLDEN + np.array([word], np.uint64))
    return np.uint64(state[0])


def permutation(n: int, *parts: int | str) -> np.ndarray:
    """A permutation of `range(n)` that depends on the key alone; int64 `(n,)`. Costs one sort of n words.

    >>> sorted(permutation(5, 0, "epoch", 1).tolist())
    [0, 1, 2, 3, 4]
    """
    words = mix(np.arange(n, dtype=np.uint64) * GOLDEN + key(*parts))
    return np.argsort(words, kind="stable")
