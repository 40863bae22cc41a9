"""Options: typed fields with a meaning and limits. Tasks, systems, runs and commands declare theirs with `option`.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Annotated, Any, Literal, ParamSpec, get_args, get_origin, get_type_hints

P = ParamSpec("P")

_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


def option(default: Any, meaning: str, **limits: Any) -> Any:
    """Declare a field of a dataclass.

    Args:
        default: Its value when nothing is said; `dataclasses.MISSING` makes it required.
        meaning: One line for `--help`.
        limits: `ge`, `gt`, `le`, `lt` bound a number, `choices` lists the values, `odd=True` asks for an odd number.
            `neutral` is the value at which a newer option changes nothing: there it is left out of a run's fingerprint.
            `positional=True` and `key="dotted.name"` are read by `chela.cli`.
    """
    metadata = {"help": meaning, **limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against its limits.

    Raises:
        ValueError: One line that names the option, what was expected and what came.

    >>> @dataclasses.dataclass
    ... class Options:
    ...     depth: int = option(4, "blocks", ge=1)
    >>> check_options(Options(depth=0), "model.")
    Traceback (most recent call last):
    ValueError: model.depth: expected at least 1, got 0
    """
    for field in dataclasses.fields(options):
        check_value(field.metadata.get("key", f"{prefix}{field.name}"), getattr(options, field.name), field.metadata)


def check_value(key: str, value: Any, limits: Any) -> None:
    """Check one value; see `check_options`."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{key}: expected a finite number, got {number}")
    for name, (holds, text) in _BOUNDS.items():
        if value is not None and name in limits and not holds(value, limits[name]):
            raise ValueError(f"{key}: expected {text} {limits[name]:,}, got {shown(value)}")
    choices = limits.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {shown(value)}{closest(value, choices)}")
    if limits.get("odd") and value % 2 == 0:
        raise ValueError(f"{key}: expected an odd number, so that the kernel has a middle, got {value}")


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """Hold the keyword arguments of a constructor to their annotations, before it runs.

    ``Literal["a", "b"]`` lists the values; the dict in ``Annotated[int, {"ge": 1}]`` has the limits that
    ``option`` takes.

    Raises:
        ValueError: One line that names the argument, what was expected and what came.

    >>> from typing import Annotated
    >>> class Layer:
    ...     @checked
    ...     def __init__(self, *, heads: Annotated[int, {"ge": 1}] = 4):
    ...         self.heads = heads
    >>> Layer(heads=0)
    Traceback (most recent call last):
    ValueError: heads: expected at least 1, got 0
    """

    @functools.wraps(init)
    def check_and_build(*args: P.args, **kwargs: P.kwargs) -> None:
        hints = get_type_hints(init, include_extras=True)
        for name, value in kwargs.items():
            hint: Any = hints.get(name)
            said = hint.__metadata__[0] if get_origin(hint) is Annotated else {}
            hint = hint.__origin__ if said else hint
            choices = {"choices": get_args(hint)} if get_origin(hint) is Literal else {}
            check_value(name, value, choices | said)
        init(*args, **kwargs)

    return check_and_build


def shown(value: Any) -> str:
    """Return a value as an error message shows it: quoted, and cut when long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def closest(name: Any, known: Any) -> str:
    """Return " (did you mean 'x'?)" for the known name most like `name`, or nothing."""
    import difflib

    close = difflib.get_close_matches(str(name)[:80], list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
