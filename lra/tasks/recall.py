"""Multi-query associative recall: pairs of a key and a value, then the keys again; name the value of each.

A record is drawn on demand, from (seed, split, its number) alone. Definition and mixes: arXiv 2312.04927, section 3,
and arXiv 2402.18668, appendix; as zoology's code has them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chela.core.options import option
from lra.tasks.base import IGNORED, SPLITS, Encoded, Label, Records, Task

Part = tuple[int, int, int]
"""Records, pairs in each, length."""

ZOOLOGY_TRAIN = "100000 of 4 in 64, 20000 of 8 in 128, 20000 of 16 in 256, 20000 of 32 in 256, 20000 of 64 in 256"
ZOOLOGY_TEST = (
    "1000 of 4 in 64, 1000 of 8 in 64, 1000 of 16 in 64, 1000 of 32 in 128, 1000 of 64 in 256, 1000 of 128 in 512, "
    "1000 of 256 in 1024"
)


@dataclass
class Recall(Task):
    """Keys are ids 1 … S/2 − 1 and values S/2 … S − 1, of S symbols; the target is the value, at each repeated key.

    The defaults are zoology's mix. Two things are ours: validation is apart from the test set, and what stands between
    the repeated keys is any symbol but 0, which is padding here.
    """

    train: str = option(ZOOLOGY_TRAIN, "records to train on: NUMBER of PAIRS in LENGTH, …")
    validation: str = option(ZOOLOGY_TEST.replace("1000 of", "200 of"), "records to validate on")
    test: str = option(ZOOLOGY_TEST, "records to test on")
    symbols: int = option(8192, "symbols: the lower half keys, the upper half values", ge=4, le=1_000_000)
    power: float = option(0.01, "a key comes again after a gap g with probability ~ g^(power − 1)", gt=0, le=10)
    seed: int = option(0, "seed of the records; the run's own seed does not change them", ge=0, lt=2**63)

    title = "Recall"
    objective = "tokens"
    grouped_by = "pairs"
    input_help = "ids with spaces between: a key and its value by turns, then keys again"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixes = {split: self._mix(split) for split in SPLITS}
        self.l_max = max(length for mix in self.mixes.values() for _, _, length in mix)
        self.vocab_size = self.num_classes = self.symbols

    def _mix(self, split: str) -> list[Part]:
        text, found = getattr(self, split), []
        for part in text.split(","):
            if not (match := re.fullmatch(r"\s*(\d{1,9}) of (\d{1,9}) in (\d{1,9})\s*", part)):
                raise ValueError(
                    f"task.{split}: expected NUMBER of PAIRS in LENGTH, … such as 1000 of 4 in 64, got {text!r}"
                )
            found.append((number := int(match[1]), pairs := int(match[2]), length := int(match[3])))
            if not number or not 1 <= pairs <= min(length // 4, self.symbols // 2 - 1):
                raise ValueError(
                    f"task.{split}: expected at least 1 record, and from 1 pair to a quarter of the length and to one "
                    f"for each of {self.symbols // 2 - 1} keys, got {number} of {pairs} in {length}"
                )
        return found

    def dataset(self, split: str) -> RecallRecords:
        """Return the records of a split."""
        self.check_split(split)
        return RecallRecords(self, split)


class RecallRecords(Records):
    """The records of one split, the parts of its mix one after another."""

    def __init__(self, task: Recall, split: str) -> None:
        self._task, self._split = task, SPLITS.index(split)
        mix = task.mixes[split]
        numbers = [number for number, _, _ in mix]
        self._pairs = np.repeat([pairs for _, pairs, _ in mix], numbers)
        self._lengths = np.repeat([length for _, _, length in mix], numbers)

    def __len__(self) -> int:
        return len(self._lengths)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[tuple[Encoded, Label]]:
        """Draw several records; O(symbols + length) each."""
        return [self._drawn(int(i)) for i in indices]

    def _drawn(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng([self._task.seed, self._split, i])
        pairs, length, half = int(self._pairs[i]), int(self._lengths[i]), self._task.symbols // 2
        tokens = draw.integers(1, self._task.symbols, length)
        targets = np.full(length, IGNORED)
        keys = draw.choice(half - 1, pairs, replace=False) + 1
        values = draw.choice(half, pairs, replace=False) + half
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        # the smallest of exponential times are a weighted sample without replacement, in order of being drawn
        weight = np.arange(1, length // 2 - pairs + 1) ** (self._task.power - 1)
        places = 2 * pairs + 2 * np.argsort(draw.exponential(size=len(weight)) / weight)[:pairs]
        tokens[places], targets[places] = keys, values
        return tokens, targets

    def lengths(self) -> np.ndarray:
        """Return the length of every record, int64 ``(N,)``."""
        return self._lengths

    def groups(self) -> np.ndarray:
        """Return the number of pairs of every record, int64 ``(N,)``."""
        return self._pairs

    def majority_accuracy(self) -> float:
        """Return the share of one value among the targets: they are drawn evenly."""
        return 2 / self._task.symbols
