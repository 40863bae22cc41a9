"""Random numbers for the generators: splitmix64, compiled. A stream is a one-element uint64 array; draws move it on."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from lra import batches
from lra.batches import GOLDEN

_11 = np.uint64(11)

mix: Any = njit(nogil=True, cache=True)(batches.mix)


@njit(nogil=True, cache=True)
def word(state):
    """Draw a 64-bit word."""
    state[0] += GOLDEN
    return mix(state[0])


@njit(nogil=True, cache=True)
def uniform(state):
    """Draw a float64 in [0, 1)."""
    return float(word(state) >> _11) * 2.0**-53


@njit(nogil=True, cache=True)
def below(state, n):
    """Draw an integer in [0, n)."""
    return int(uniform(state) * n)
