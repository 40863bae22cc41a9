"""Benchmarks, each a file of this package but ``timing`` (how they time) and ``curves`` (how they are drawn).

A benchmark has ``run(quick) -> list[Row]``. It may have ``Options``, a dataclass of what it can be told on the command
line: then it is ``run(quick, options)``. ``PLOT`` names the candidates that are drawn against the length ``L``. The
first line of its docstring says what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement


@dataclass
class Row:
    """What was measured at one size."""

    key: dict[str, Any]  # sizes and options; two runs are compared where their keys agree
    values: dict[str, float]  # what came out: seconds under names that end in ``[ms]``, rates, MiB, ratios
    note: str = ""  # why a value is missing, or what to know about it
    raw: dict[str, Any] = field(default_factory=dict)  # of each candidate, as timed

    @classmethod
    def timed(
        cls, key: dict[str, Any], times: Mapping[str, Measurement], values: dict[str, float], note: str = ""
    ) -> Row:
        """Return the row of candidates that were timed: their medians, then the other values.

        ``raw`` is the median, best time, spread (interquartile range / median) and number of rounds of each.
        """
        raw = {
            name: {"median": t.median, "best": min(t.times), "spread": t.iqr / t.median, "rounds": len(t.times)}
            for name, t in times.items()
        }
        return cls(key, {f"{name} [ms]": t.median for name, t in times.items()} | values, note, raw)
