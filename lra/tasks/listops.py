"""ListOps: the value of a nested expression of MIN, MAX, MED (median) and SM (sum modulo 10) over digits."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lra.builder import Example, Progress, RecordSet, RecordSpec, prepare
from lra.errors import DataError
from lra.generators import listops as generator
from lra.generators.listops import DIGIT, MIN, OOV, VOCABULARY
from lra.schema import DataConfig, ListOpsConfig
from lra.source import Form, digest, locate
from lra.tasks.base import Task

_IDS = {token: i for i, token in enumerate(VOCABULARY[:OOV])}
_DIGITS = frozenset(VOCABULARY[DIGIT:MIN])


def tokenize(expression: str) -> np.ndarray:
    """Token ids of an expression in LRA's or NYU's notation; parentheses only group and are dropped. uint8 `(L,)`.

    >>> tokenize("( ( ( [MAX 2 ) 9 ) ] )").tolist()
    [12, 3, 10, 15]
    """
    return np.array([_IDS.get(word, OOV) for word in _words(expression)], np.uint8)


def _words(expression: str) -> list[str]:
    return expression.replace("(", " ").replace(")", " ").split()


def text(tokens: np.ndarray) -> str:
    """The tokens in words.

    >>> text(np.array([12, 3, 10, 15]))
    '[MAX 2 9 ]'
    """
    return " ".join(VOCABULARY[i] for i in tokens.tolist())


OPERATORS: Mapping[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),  # truncated toward zero, as in LRA
    "[SM": lambda values: sum(values) % 10,
    "[FIRST": lambda values: values[0],  # these two are in the original ListOps (arXiv 1804.06028), not in LRA's
    "[LAST": lambda values: values[-1],
}


def evaluate(expression: str) -> int:
    """Value of an expression, by a stack; written apart from the generator so that one checks the other.

    Raises:
        ValueError: where the text is no expression.

    >>> evaluate("[SM 7 [MED 1 4 8 9 ] ]")
    3
    """
    root: list[int] = []
    opened: list[tuple[str, list[int]]] = [("", root)]
    for position, word in enumerate(_words(expression)):
        if word in _DIGITS:
            opened[-1][1].append(int(word))
        elif word in OPERATORS:
            opened.append((word, []))
        elif word == "]" and len(opened) > 1 and opened[-1][1]:
            operator, values = opened.pop()
            opened[-1][1].append(OPERATORS[operator](values))
        else:
            raise ValueError(f"{word!r} at position {position} cannot stand there")
    if len(opened) > 1 or len(root) != 1:
        raise ValueError("the expression is not closed, or it is more than one")
    return root[0]


_FILES = {"train": "train", "validation": "val", "test": "test"}
_EVALUATED = 50  # of the released rows, one in so many is evaluated against its label


def _read_tsv(path: Path, longest: int) -> Iterator[Example]:
    """The trees of a released file: CSV quoting, a header, one expression and its value a row."""
    if not path.is_file():
        raise DataError(f"{path} is missing: expected basic_train.tsv, basic_val.tsv and basic_test.tsv side by side")
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        if next(rows, None) != ["Source", "Target"]:
            raise DataError(f"{path} does not start with the columns Source and Target: it is another file")
        for n, row in enumerate(rows):
            try:
                yield _released_example(row, longest, evaluated=n % _EVALUATED == 0)
            except ValueError as error:
                raise DataError(f"{path} line {rows.line_num}: {error}: the file is damaged") from None


def _released_example(row: list[str], longest: int, evaluated: bool) -> Example:
    if len(row) != 2:
        raise ValueError(f"expected 2 columns, got {len(row)}")
    source, target = row
    tokens = tokenize(source)
    if not 0 < len(tokens) <= longest:
        raise ValueError(f"expected 1 to {longest} tokens (task.max_length), got {len(tokens)}")
    if (tokens == OOV).any():
        raise ValueError(f"{_words(source)[int(np.argmax(tokens == OOV))]!r} is no token of ListOps")
    if target not in _DIGITS or (evaluated and evaluate(source) != int(target)):
        raise ValueError(f"the value {target!r} is not that of the expression")
    return Example({"tokens": tokens}, int(target), (len(tokens),))


RELEASED = Form("the trees of the LRA release", "basic_train.tsv", lambda base: base)


class ListOps(Task):
    """Ten classes, ids 1 … 16 (`lra.generators.listops.VOCABULARY`) and padding 0; `l_max` is the longest kept tree."""

    name = "listops"
    version = generator.VERSION
    num_classes = 10
    vocab_size = len(VOCABULARY)

    def __init__(self, config: ListOpsConfig) -> None:
        super().__init__()
        self.config = config
        self.l_max = config.max_length

    def _spec(self, released: Path | None) -> RecordSpec:
        """Of generated trees, or of the release in a folder."""
        c = self.config
        made = (
            f"n{c.train}-{c.validation}-{c.test}_len{c.min_length}-{c.max_length}"
            f"_depth{c.max_depth}_args{c.max_args}_seed{c.seed}"
        )
        counts = {"train": c.train, "validation": c.validation, "test": c.test}
        return RecordSpec(
            name="lra_listops",
            config=f"released_len{c.max_length}_{digest(released)}" if released else made,
            version=self.version,
            fields=("tokens",),
            counts=counts,
            about={"origin": f"{RELEASED.name}: {released}"}
            if released
            else {"origin": "generated", "options": asdict(c)},
            expected_bytes=sum(counts.values()) * (c.max_length // 2 + 64),
        )

    def _build(self, data: DataConfig, progress: Progress | None) -> Path:
        released = None if data.root is None else locate(self.name, data, [RELEASED], progress)[1]
        spec = self._spec(released)

        def splits() -> Mapping[str, Iterator[Example]]:
            if released is not None:
                return {split: _read_tsv(released / f"basic_{file}.tsv", self.l_max) for split, file in _FILES.items()}
            trees = generator.generate(self.config, data.processes, progress)
            bounds = np.cumsum([0, *spec.counts.values()]).tolist()
            return {
                split: (_example(trees, i) for i in range(bounds[k], bounds[k + 1]))
                for k, split in enumerate(spec.counts)
            }

        return prepare(data.folder(), spec, splits, progress)

    def encode(self, record: dict[str, Any]) -> np.ndarray:
        """The stored ids: records are tokens already."""
        tokens: np.ndarray = record["tokens"]
        return tokens

    def encoded_lengths(self, records: RecordSet) -> np.ndarray:
        """As stored."""
        return records.sizes()


def _example(trees: generator.Trees, i: int) -> Example:
    tokens = trees[i]
    return Example({"tokens": tokens}, int(trees.labels[i]), (len(tokens),))


def make(config: ListOpsConfig) -> ListOps:
    """The task of a configuration."""
    return ListOps(config)
