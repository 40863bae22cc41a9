"""ListOps: the value of a nested expression of MIN, MAX, MED (median) and SM (sum modulo 10) over digits."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chela.core.errors import DataError
from chela.core.options import option
from lra.builder import Example, RecordSpec, prepare
from lra.source import DataConfig, Layout, digest, locate
from lra.tasks.base import SPLITS
from lra.tasks.stored import StoredTask

VOCABULARY = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "<oov>")
"""Token of each id: 15 symbols, padding 0 and one id for what is unknown. Generated trees get these ids from
``lra.generators.listops``: change both, and ``ListOps.version``, by which prepared records are told apart."""

OOV = len(VOCABULARY) - 1
_IDS = {token: i for i, token in enumerate(VOCABULARY[:OOV])}
_DIGITS = frozenset("0123456789")


def tokenize(expression: str) -> np.ndarray:
    """Return the ids of an expression in LRA's or NYU's notation, uint8 ``(L,)``; parentheses only group, no token.

    >>> tokenize("( ( ( [MAX 2 ) 9 ) ] )").tolist() == tokenize("[MAX 2 9 ]").tolist()
    True
    """
    return np.array([_IDS.get(word, OOV) for word in _words(expression)], np.uint8)


def _words(expression: str) -> list[str]:
    return expression.replace("(", " ").replace(")", " ").split()


OPERATORS: Mapping[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),  # truncated toward zero, as in LRA
    "[SM": lambda values: sum(values) % 10,
    "[FIRST": lambda values: values[0],  # these two are in the original ListOps (arXiv 1804.06028), not in LRA's
    "[LAST": lambda values: values[-1],
}


def evaluate(expression: str) -> int:
    """Return the value of an expression, by a stack; written apart from the generator so that one checks the other.

    Raises ``ValueError`` for what is no expression.

    >>> evaluate("[SM 7 [MED 1 4 8 9 ] ]")
    3
    """
    opened: list[tuple[str, list[int]]] = [("", [])]  # operators that are not closed, each with its arguments so far
    for position, word in enumerate(_words(expression)):
        if word in OPERATORS:
            opened.append((word, []))
        elif word in _DIGITS:
            opened[-1][1].append(int(word))
        elif word == "]" and len(opened) > 1 and opened[-1][1]:
            operator, values = opened.pop()
            opened[-1][1].append(OPERATORS[operator](values))
        else:
            raise ValueError(f"{word!r} at position {position} cannot stand there")
    if len(opened) > 1 or len(opened[0][1]) != 1:
        raise ValueError("the expression is not closed, or it is more than one")
    return opened[0][1][0]


_LONGER = 2_000  # trees of the further test set, longer than any to learn from
_DEEPER = 4  # further levels: six of up to five arguments seldom make 150 tokens
_FILES = {"train": "train", "validation": "val", "test": "test"}
_EVALUATED = 50  # one released row in so many is evaluated and compared to its label


def _read_tsv(path: Path, longest: int) -> Iterator[Example]:
    """Yield the trees of a released file: CSV quoting, a header, one expression and its value a row."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        try:
            if next(rows, None) != ["Source", "Target"]:
                raise DataError(f"{path} does not start with the columns Source and Target: it is another file")
            for n, row in enumerate(rows):
                source, target = row if len(row) == 2 else ("", "")
                tokens = tokenize(source)
                if not 0 < (got := len(tokens)) <= longest:
                    raise ValueError(f"expected an expression of 1 to {longest} tokens (task.max_length), got {got}")
                if (tokens == OOV).any():
                    raise ValueError(f"{_words(source)[int(np.argmax(tokens == OOV))]!r} is no token of ListOps")
                if target not in _DIGITS or (n % _EVALUATED == 0 and evaluate(source) != int(target)):
                    raise ValueError(f"the value {target!r} is not that of the expression")
                yield _example(tokens, int(target))
        except (ValueError, csv.Error) as error:
            raise DataError(f"{path} line {rows.line_num}: {error}: the file is damaged") from None


RELEASED = Layout("the trees of the LRA release", "basic_train.tsv")


@dataclass
class ListOps(StoredTask):
    """Ten classes, ids 1 … 16 (``VOCABULARY``) and padding 0. The defaults are the Long Range Arena's task."""

    train: int = option(96_000, "trees to train on", ge=1, le=1_000_000_000)
    validation: int = option(2_000, "trees to validate on", ge=1, le=1_000_000_000)
    test: int = option(2_000, "trees to test on", ge=1, le=1_000_000_000)
    min_length: int = option(501, "shortest tree kept, in tokens (parentheses not counted)", ge=1, le=1_000_000)
    max_length: int = option(1_999, "longest tree kept, in tokens", ge=1, le=1_000_000)
    max_depth: int = option(10, "deepest level of a tree; at this depth every node is a digit", ge=1, le=64)
    max_args: int = option(10, "most arguments of an operator (the least is 2)", ge=2, le=64)
    seed: int = option(0, "seed of the trees; the run's own seed does not change the data", ge=0, lt=2**63)
    room: int = option(0, "tokens to have room for, and be tested on, longer trees; 0: none", neutral=0, ge=0, le=10**6)

    title = "ListOps"
    num_classes = 10
    vocab_size = len(VOCABULARY)
    generated = True
    grouped_by = "depth"
    input_help = "an expression such as [MAX 2 [MIN 4 7 ] ]: digits, [MIN, [MAX, [MED, [SM and ], with spaces between"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < self.min_length:
            raise ValueError(f"task.max_length: expected min_length={self.min_length} or more, got {self.max_length}")
        if 0 < self.room <= self.max_length:
            raise ValueError(f"task.room: expected 0 or more than max_length={self.max_length}, got {self.room}")
        self.l_max = max(self.max_length, self.room)
        self.further = ("longer",) if self.room else ()

    @property
    def train_length(self) -> int:
        """Longest sequence to learn from: without the room."""
        return self.max_length

    def build(self, data: DataConfig) -> Path:
        """Generate the trees, or read those of the release in ``data.root``."""
        counts = {split: getattr(self, split) for split in SPLITS}
        options = {name: value for name, value in asdict(self).items() if name != "room" or value}
        about: dict[str, Any] = {"origin": "generated", "options": options}
        config = f"n{self.train}-{self.validation}-{self.test}_len{self.min_length}-{self.max_length}"
        config += f"_depth{self.max_depth}_args{self.max_args}_seed{self.seed}" + f"_room{self.room}" * (self.room > 0)
        released = None
        if data.root is not None:
            released = locate(self.name, data, [RELEASED])[1].parent
            config = f"released_len{self.max_length}_{digest(released)}"
            about, self.further = {"origin": f"{RELEASED.name}: {released}"}, ()
        counts |= dict.fromkeys(self.further, _LONGER)
        spec = RecordSpec("lra_listops", config, self.version, ("tokens",), counts, ("length", "depth"), about)

        def splits() -> Mapping[str, Iterator[Example]]:
            if released is not None:
                return {split: _read_tsv(released / f"basic_{file}.tsv", self.l_max) for split, file in _FILES.items()}
            from lra.generators.listops import generate

            trees = generate(self, data.processes)
            if self.room:
                changes = {"min_length": self.max_length + 1, "max_length": self.room, "room": 0}
                options = replace(self, max_depth=min(self.max_depth + _DEEPER, 64), **changes)
                trees += generate(options, data.processes, _LONGER)
            examples = (_example(*tree) for tree in trees)
            return {split: itertools.islice(examples, n) for split, n in counts.items()}

        return prepare(data.folder(), spec, splits)

    def encode(self, record: dict[str, Any]) -> np.ndarray:
        """Return the stored ids: records are tokens already."""
        tokens: np.ndarray = record["tokens"]
        return tokens

    def baseline(self) -> str:
        """Return the score of the outermost operator alone: its most frequent value in training is the answer."""
        train, test = (self._values_of_roots(split) for split in ("train", "test"))
        hits = (test[np.arange(len(test)), train.argmax(1)] * train.any(1)).sum()
        return f"{int(hits) / int(test.sum()):.2%} by the outermost operator alone"

    def _values_of_roots(self, split: str) -> np.ndarray:
        """Count the trees of each first token and value, of 20,000 trees at most."""
        counts, records = np.zeros((len(VOCABULARY), 10), np.int64), self.dataset(split)
        for tokens, value in records.read(range(min(20_000, len(records)))):
            counts[np.asarray(tokens)[0], value] += 1
        return counts

    def read_line(self, line: str) -> np.ndarray:
        """Return the ids of an expression. Raises ``ValueError``."""
        tokens = tokenize(line)
        if (tokens == OOV).any():
            raise ValueError(f"expected {self.input_help}")
        if len(tokens):
            evaluate(line)  # or an error: it is not closed, or more than one
        return tokens


def _example(tokens: np.ndarray, label: int) -> Example:
    return Example({"tokens": tokens}, label, (len(tokens), depth(tokens)))


def depth(tokens: np.ndarray) -> int:
    """Return how many operators stand one inside another at the most.

    >>> depth(tokenize("[MAX 2 [MIN 4 7 ] [SM 1 1 ] ]")), depth(tokenize("7"))
    (2, 0)
    """
    opens = (tokens >= _IDS["[MIN"]) & (tokens <= _IDS["[SM"])
    return int(np.cumsum(opens.astype(np.int64) - (tokens == _IDS["]"])).max(initial=0))
