"""splitmix64 (Steele, Lea and Flood 2014): numbers that look random and are a pure function of a key.

numpy does not promise equal streams from one version to the next, but the order of the data must survive an upgrade.
So the few lines that are needed stand here. ``lra.generators.splitmix`` compiles the same ``mix`` for the generators.
"""

from __future__ import annotations

import zlib

import numpy as np

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
    """Return one 64-bit key for integers and names. Their order counts.

    >>> int(key(0, "epoch", 1)) == int(key(0, "epoch", 1)), int(key(0, "epoch", 1)) == int(key(0, "epoch", 2))
    (True, False)
    """
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
