"""ListOps trees by the Long Range Arena's rules (arXiv 2011.04006, section 2.2.1), as a pure function of a seed.

Tree `n` is drawn from a splitmix64 stream whose start depends on (seed, n) alone, so neither the number of workers nor
their speed can change a byte. A node above the maximum depth is an operator with probability 0.25 and a digit
otherwise; at the maximum depth it is a digit. An operator takes 2 to `max_args` arguments, drawn before the operator
itself. A tree is kept when its length lies in [min_length, max_length] and no equal tree was kept before.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numba
import numpy as np

from lra.errors import DataError
from lra.generators.splitmix import mix
from lra.schema import ListOpsConfig
from lra.streams import GOLDEN, key, permutation

VERSION = "1.0.0"  # of the trees: a change that moves any byte raises it

VOCABULARY = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "<oov>")
"""Token of each id, fixed for version 1: 15 symbols, padding 0 and one id for what is unknown."""

DIGIT, MIN, MAX, MED, SM, CLOSE, OOV = 1, 11, 12, 13, 14, 15, 16

OPERATOR_PROBABILITY = 0.25  # LRA's code calls it VALUE_P, but a digit is what comes when the draw is above it
BLOCK = 4096  # trees drawn by one call of a worker
_BARREN_BLOCKS = 250  # a million trees without a new one: there are no more

_11, _32 = np.uint64(11), np.uint64(32)


@numba.njit(nogil=True, cache=True, inline="always")
def _below(word, n):  # type: ignore[no-untyped-def]
    """A whole number in [0, n) from the upper half of a word (bias n / 2³²)."""
    return np.int64(((word >> _32) * np.uint64(n)) >> _32)


@numba.njit(nogil=True, cache=True)
def _apply(operator, values):  # type: ignore[no-untyped-def]
    if operator == MIN:
        return values.min()
    if operator == MAX:
        return values.max()
    if operator == SM:
        return values.sum() % 10
    ordered = np.sort(values)
    half = ordered.size // 2
    return ordered[half] if ordered.size % 2 else (ordered[half - 1] + ordered[half]) // 2


@numba.njit(nogil=True, cache=True)
def _grow(state, out, min_length, max_length, max_depth, max_args):  # type: ignore[no-untyped-def]
    """Draw one tree into `out`. Returns (length, value), length 0 when the tree is not kept."""
    place = np.empty(max_depth + 1, np.int64)  # of each open operator: where its token goes,
    missing = np.empty(max_depth + 1, np.int64)  # how many arguments are still to come,
    bottom = np.empty(max_depth + 1, np.int64)  # and where its values start
    values = np.empty(max_depth * max_args + 1, np.int64)
    top, length, level, owed = 0, 0, 0, 1  # owed: tokens that must still come at the least
    while True:
        digit = level + 1 >= max_depth
        if not digit:
            state += GOLDEN
            digit = np.float64(mix(state) >> _11) * 2.0**-53 > OPERATOR_PROBABILITY
        state += GOLDEN
        word = mix(state)
        if digit:
            values[top] = _below(word, 10)
            out[length] = DIGIT + values[top]
            top, length, owed = top + 1, length + 1, owed - 1
            if level > 0:
                missing[level - 1] -= 1
        else:
            arguments = 2 + _below(word, max_args - 1)
            place[level], missing[level], bottom[level] = length, arguments, top
            length, level, owed = length + 1, level + 1, owed + arguments
        if length + owed > max_length:
            return 0, 0
        while level > 0 and missing[level - 1] == 0:
            level -= 1
            state += GOLDEN
            operator = MIN + _below(mix(state), 4)
            out[place[level]] = operator
            out[length] = CLOSE
            values[bottom[level]] = _apply(operator, values[bottom[level] : top])
            top, length, owed = bottom[level] + 1, length + 1, owed - 1
            if level > 0:
                missing[level - 1] -= 1
        if level == 0:
            return (length if length >= min_length else 0), values[0]


@numba.njit(nogil=True, cache=True)
def _block(seed, first, number, min_length, max_length, max_depth, max_args):  # type: ignore[no-untyped-def]
    """The kept trees among `number` from index `first`: tokens end to end, their lengths, their values."""
    tokens = np.empty(number * max_length, np.uint8)
    lengths = np.empty(number, np.int64)
    labels = np.empty(number, np.uint8)
    kept, end = 0, 0
    for n in range(first, first + number):
        state = mix(seed + np.uint64(n) * GOLDEN)
        length, value = _grow(state, tokens[end : end + max_length], min_length, max_length, max_depth, max_args)
        if length > 0:
            lengths[kept], labels[kept] = length, value
            kept, end = kept + 1, end + length
    return tokens[:end].copy(), lengths[:kept].copy(), labels[:kept].copy()


@dataclass(frozen=True)
class Trees:
    """Trees end to end.

    Attributes:
        tokens: ids of all trees, uint8 `(sum of lengths,)`.
        offsets: where each tree starts, and the end of the last, int64 `(N + 1,)`.
        labels: value of each tree, uint8 `(N,)`.
        drawn: trees drawn to get these, for the acceptance rate.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    drawn: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


def _blocks(config: ListOpsConfig, threads: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of kept trees, in order, drawn ahead by `threads` threads (the kernel releases the interpreter lock)."""
    seed = key(config.seed, "listops")
    shape = (config.min_length, config.max_length, config.max_depth, config.max_args)
    waiting: deque[Future[tuple[np.ndarray, np.ndarray, np.ndarray]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for n in count():
                waiting.append(pool.submit(_block, seed, n * BLOCK, BLOCK, *shape))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def generate(config: ListOpsConfig, threads: int = 0, progress: Callable[[str, int, int], None] | None = None) -> Trees:
    """All trees of a set, shuffled: first `train`, then `validation`, then `test` trees, no two equal.

    Args:
        config: the set; every field but the name decides the bytes.
        threads: workers, 0 for one per core. The result does not depend on it.
        progress: called with (what, done, total).

    Raises:
        DataError: when there are fewer distinct trees than asked for.
    """
    config.check()
    wanted = config.train + config.validation + config.test
    seen: set[bytes] = set()
    trees: list[np.ndarray] = []
    labels: list[int] = []
    drawn = barren = 0
    for tokens, lengths, values in _blocks(config, threads or os.cpu_count() or 1):
        before, start = len(trees), 0
        for length, value in zip(lengths.tolist(), values.tolist(), strict=True):
            tree = tokens[start : start + length]
            start += length
            digest = hashlib.blake2b(tree.tobytes(), digest_size=16).digest()
            if digest not in seen and len(trees) < wanted:
                seen.add(digest)
                trees.append(tree)
                labels.append(value)
        drawn += BLOCK
        if progress:
            progress("ListOps trees", len(trees), wanted)
        if len(trees) == wanted:
            break
        barren = barren + 1 if len(trees) == before else 0
        if barren == _BARREN_BLOCKS:
            raise DataError(
                f"listops: {drawn:,} drawn trees hold only {len(trees):,} different ones of {config.min_length} to "
                f"{config.max_length} tokens, expected {wanted:,}: ask for fewer, or for longer or deeper trees"
            )
    order = permutation(wanted, config.seed, "listops order")
    offsets = np.zeros(wanted + 1, np.int64)
    np.cumsum([len(trees[i]) for i in order], out=offsets[1:])
    return Trees(np.concatenate([trees[i] for i in order]), offsets, np.array(labels, np.uint8)[order], drawn)
