"""Benchmarks, each a function ``name(options) -> list[Row]``; its docstring says what it measures."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chela.core.options import option

if TYPE_CHECKING:
    import pandas as pd

BENCHMARKS = {"convolution": "kernels", "linear_attention": "kernels", "layers": "kernels"}  # and their files
BENCHMARKS |= {"train": "models", "generate": "models", "tune": "tune", "products": "products"}
RESULTS = Path("experiments/results/bench")


@dataclass
class Options:
    """What the command is told."""

    name: str = option(MISSING, "the benchmark", choices=tuple(BENCHMARKS), positional=True)
    quick: bool = option(False, "smallest sizes only, to see that it works")
    out: Path | None = option(None, f"where the JSON goes; null is {RESULTS}/NAME.json")
    task: list[str] = option([], "train: tasks; all when none is named")
    model: list[str] = option([], "train: systems; all when none is named")
    preset: list[str] = option([], "train: presets; mini when none is named, on a GPU full too")
    matmul: str = option("auto", "whose products a CPU takes, of both sides", choices=("auto", "mkl", "onednn"))
    batch: int | None = option(None, "train: records in a step; null is the recipe's, on a CPU one at full", ge=1)


@dataclass
class Row:
    """What was measured at one size."""

    key: dict[str, Any]  # sizes and options; two runs are compared where their keys agree
    values: dict[str, float]  # what came out: seconds under names that end in ``[ms]``, rates, MiB, ratios
    note: str = ""  # why a value is missing, or what to know about it
    raw: dict[str, Any] = field(default_factory=dict)  # of each candidate, the seconds of each round

    @classmethod
    def timed(cls, key: dict[str, Any], times: pd.DataFrame, values: dict[str, float], note: str = "") -> Row:
        """Return the row of candidates, a column of seconds each: their medians, then the other values; all as raw."""
        medians = {f"{name} [ms]": median for name, median in times.median().items()}
        # groups that were timed one after the other have other numbers of rounds, and NaN is no JSON
        return cls(key, medians | values, note, {name: rounds.dropna().tolist() for name, rounds in times.items()})
