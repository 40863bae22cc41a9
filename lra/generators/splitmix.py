"""splitmix64 (Steele, Lea and Flood 2014) for compiled code: a stream is a one-element uint64 array."""

from __future__ import annotations

import numpy as np
from numba import njit

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@njit(nogil=True, cache=True)
def mix(z):  # type: ignore[no-untyped-def]
    """Finish a word: a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


@njit(nogil=True, cache=True)
def start(state, seed, index):  # type: ignore[no-untyped-def]
    """Key the random stream by (seed, index)."""
    state[0] = mix(mix(np.uint64(seed) + _GAMMA) ^ mix(np.uint64(index) * _GAMMA + _MIX_1))


@njit(nogil=True, cache=True)
def uniform(state):  # type: ignore[no-untyped-def]
    """Draw a float64 in [0, 1)."""
    state[0] += _GAMMA
    return float(mix(state[0]) >> np.uint64(11)) * 2.0**-53


@njit(nogil=True, cache=True)
def below(state, n):  # type: ignore[no-untyped-def]
    """Draw an integer in [0, n)."""
    return int(uniform(state) * n)
