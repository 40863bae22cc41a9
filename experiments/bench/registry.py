"""A benchmark is a file of this package with ``run(quick) -> list of rows``; its name is the file's name.

What ``run`` takes by keyword can be said on the command line: ``task=text`` after the name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import experiments.bench

MACHINERY = {"__main__", "registry", "report", "timing"}


@dataclass
class Row:
    """One line of a benchmark's table.

    Attributes:
        key: What was measured: sizes and options. Two runs are compared row by row where the keys agree.
        values: What came out: seconds, bytes, ratios.
        note: Why a value is missing, or what to know of it.
    """

    key: dict[str, Any]
    values: dict[str, float]
    note: str = ""
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as found.

    Attributes:
        name: Its file's name.
        run: Measures; with ``quick`` only the smallest sizes, a few seconds, to see that it works. What else it can be
            told are keywords.
        plot: ``(x, y, y, …)``, the key and the values of the plot; None for no plot.
        about: The first line of its docstring.
    """

    name: str
    run: Callable[..., list[Row]]
    plot: tuple[str, ...] | None
    about: str

    def options(self, words: list[str]) -> dict[str, str]:
        """Read ``key=value`` words as keywords of ``run``.

        Raises:
            ValueError: A word that it does not know.
        """
        known = [name for name, p in inspect.signature(self.run).parameters.items() if p.kind is p.KEYWORD_ONLY]
        found = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or key not in known:
                expected = ", ".join(f"{name}=…" for name in known) or "no words"
                raise ValueError(f"{self.name}: expected {expected}, got {word!r}")
            found[key] = value
        return found


def names() -> list[str]:
    """Return the names of all benchmarks."""
    return sorted(m.name for m in pkgutil.iter_modules(experiments.bench.__path__) if m.name not in MACHINERY)


def find(name: str) -> Benchmark:
    """Return a benchmark by name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in names():
        raise ValueError(f"expected one of the benchmarks {names()}, got {name!r}")
    module = importlib.import_module(f"experiments.bench.{name}")
    about = (module.__doc__ or "").strip().splitlines()[0]
    return Benchmark(name, module.run, getattr(module, "PLOT", None), about)
