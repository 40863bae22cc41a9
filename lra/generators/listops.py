"""ListOps trees by the Long Range Arena's rules (arXiv 2011.04006, section 2.2.1), as a pure function of a seed.

Tree ``n`` is drawn from a stream of its own that starts at (seed, n). So the bytes depend neither on the number of
threads nor on their speed. A node above the maximum depth is an operator with probability 0.25, else a digit; at the
maximum depth it is a digit. An operator takes 2 to ``max_args`` arguments; they are drawn before the operator itself.
A tree is kept if its length lies in [min_length, max_length] and no equal tree was kept before.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import hashlib
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from chela.core.errors import DataError
from lra.batches import GOLDEN, key, permutation
from lra.builder import prefetch, say_progress
from lra.generators import mix, uniform, word

if TYPE_CHECKING:
    from lra.tasks.listops import ListOps

DIGIT, MIN, MAX, MED, SM, CLOSE = 1, 11, 12, 13, 14, 15  # see ``VOCABULARY`` of ``lra.tasks.listops``

_OPERATOR_PROBABILITY = 0.25  # VALUE_P in LRA's code, though a digit comes when the draw is above it
_BLOCK = 4096  # trees drawn by one call of a thread
_BARREN_BLOCKS = 250  # after a million trees without a new one, give up
_32 = np.uint64(32)


@njit(nogil=True, cache=True)
def _below(state, n):
    """Draw an integer in [0, n) from the upper half of a word (bias n / 2³²)."""
    return np.int64(((word(state) >> _32) * np.uint64(n)) >> _32)


@njit(nogil=True, cache=True)
def _apply(operator, values):
    if operator == MIN:
        return values.min()
    if operator == MAX:
        return values.max()
    if operator == SM:
        return values.sum() % 10
    ordered = np.sort(values)
    half = ordered.size // 2
    return ordered[half] if ordered.size % 2 else (ordered[half - 1] + ordered[half]) // 2


@njit(nogil=True, cache=True)
def _grow(state, out, min_length, max_length, max_depth, max_args):
    """Draw one tree into ``out``; return its length and value, length 0 if it is not kept."""
    place = np.empty(max_depth + 1, np.int64)  # of each open operator: where its token goes,
    missing = np.empty(max_depth + 1, np.int64)  # how many arguments are still to come,
    bottom = np.empty(max_depth + 1, np.int64)  # and where its values start
    values = np.empty(max_depth * max_args + 1, np.int64)
    top, length, level, owed = 0, 0, 0, 1  # owed: the least number of tokens still to come
    while True:
        if level > 0:
            missing[level - 1] -= 1
        if level + 1 >= max_depth or uniform(state) > _OPERATOR_PROBABILITY:
            values[top] = _below(state, 10)
            out[length] = DIGIT + values[top]
            top, length, owed = top + 1, length + 1, owed - 1
        else:
            arguments = 2 + _below(state, max_args - 1)
            place[level], missing[level], bottom[level] = length, arguments, top
            length, level, owed = length + 1, level + 1, owed + arguments
        if length + owed > max_length:
            return 0, 0
        while level > 0 and missing[level - 1] == 0:
            level -= 1
            operator = MIN + _below(state, 4)
            out[place[level]] = operator
            out[length] = CLOSE
            values[bottom[level]] = _apply(operator, values[bottom[level] : top])
            top, length, owed = bottom[level] + 1, length + 1, owed - 1
        if level == 0:
            return (length if length >= min_length else 0), values[0]


@njit(nogil=True, cache=True)
def _block(seed, first, number, min_length, max_length, max_depth, max_args):
    """Draw ``number`` trees from index ``first``; return the kept ones' tokens end to end, lengths and values."""
    tokens = np.empty(number * max_length, np.uint8)
    lengths = np.empty(number, np.int64)
    labels = np.empty(number, np.uint8)
    state = np.empty(1, np.uint64)
    kept, end = 0, 0
    for n in range(first, first + number):
        state[0] = mix(seed + np.uint64(n) * GOLDEN)
        length, value = _grow(state, tokens[end : end + max_length], min_length, max_length, max_depth, max_args)
        if length > 0:
            lengths[kept], labels[kept] = length, value
            kept, end = kept + 1, end + length
    return tokens[:end].copy(), lengths[:kept].copy(), labels[:kept].copy()


def generate(options: ListOps, threads: int = 0, wanted: int | None = None) -> list[tuple[np.ndarray, int]]:
    """Draw all trees of a data set, or ``wanted`` of them, no two equal, in shuffled order.

    They depend on the options alone, not on the number of ``threads``, 0 for one per core.

    Returns:
        Of each tree its ids, uint8, and its value.

    Raises:
        DataError: If there are fewer different trees than asked for.
    """
    wanted = wanted or options.train + options.validation + options.test
    trees: dict[bytes, tuple[np.ndarray, int]] = {}  # by digest
    drawn = barren = 0
    seed = key(options.seed, "listops")
    limits = (options.min_length, options.max_length, options.max_depth, options.max_args)
    calls = (partial(_block, seed, first, _BLOCK, *limits) for first in count(0, _BLOCK))
    for tokens, lengths, values in prefetch(calls, threads):
        before, ends = len(trees), np.cumsum(lengths)
        for start, end, value in zip(ends - lengths, ends, values, strict=True):
            if len(trees) < wanted:
                tree = tokens[start:end]
                trees.setdefault(hashlib.blake2b(tree.tobytes(), digest_size=16).digest(), (tree, int(value)))
        drawn += _BLOCK
        say_progress("ListOps trees", len(trees), wanted)
        if len(trees) == wanted:
            break
        barren = barren + 1 if len(trees) == before else 0
        if barren == _BARREN_BLOCKS:
            raise DataError(
                f"listops: {drawn:,} drawn trees hold only {len(trees):,} different ones of {options.min_length} to "
                f"{options.max_length} tokens, expected {wanted:,}: ask for fewer, or for longer or deeper trees"
            )
    kept = list(trees.values())
    return [kept[i] for i in permutation(wanted, options.seed, "listops order")]
