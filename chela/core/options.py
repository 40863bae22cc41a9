"""Options: typed values with a meaning and limits, declared in one way and read in one way.

A run, a task or a command declares them as fields of a dataclass, a system as arguments of its constructor, whose
meanings are the ``Args`` of its docstring::

    depth: int = option(4, "blocks", ge=1)
    def __init__(self, d_model: int, *, heads: Annotated[int, {"ge": 1}] = 4, norm: Literal["layer", "rms"] = "rms")
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, Union, get_args, get_origin, get_type_hints

from chela.core.errors import OptionError

P = ParamSpec("P")
Field = dataclasses.Field[Any]

BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str, str]] = {
    "ge": (operator.ge, "at least", "≥"),
    "gt": (operator.gt, "more than", ">"),
    "le": (operator.le, "at most", "≤"),
    "lt": (operator.lt, "less than", "<"),
}
_TRUE, _FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
_WANTED = {"int": "a whole number", "float": "a number", "str": "a text", "Path": "a path"}
_WANTED |= {f"list[{kind}]": f"a list of {wanted[2:]}s" for kind, wanted in _WANTED.items()} | {"bool": "true or false"}
"""The types of options, alone or ``| None``, and what an error says was expected."""


def option(default: Any, meaning: str, **limits: Any) -> Any:
    """Declare a field of a dataclass.

    Args:
        default: Its value when nothing is said; `dataclasses.MISSING` makes it required.
        meaning: One line for `--help`.
        limits: `ge`, `gt`, `le`, `lt` bound a number, `choices` lists the values.
            `neutral` is the value at which a newer option changes nothing: there it is left out of a run's fingerprint,
            and older runs are read as having it. `identity=False` leaves it out of the fingerprint at any value.
            `positional=True` and `key="dotted.name"` say how a command line gives it.
    """
    metadata = {"help": meaning, **limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(name: str, made: Any, given: Collection[str] = ()) -> type:
    """Return a dataclass of a class's options: `name`, then its fields or the arguments of its constructor.

    Each argument needs an annotation and a default, except those in `given`; OptionError names one that lacks them.

    >>> class Layer:
    ...     def __init__(self, d_model: int, *, heads: Annotated[int, {"ge": 1}] = 4): ...
    >>> options_of("layer", Layer, ["d_model"])(heads=2)
    LayerOptions(name='layer', heads=2)
    """
    hints = get_type_hints(made.__init__, include_extras=True)
    docs = [text for base in made.__mro__ for text in (base.__doc__, base.__init__.__doc__) if text]
    text = "\n".join(map(inspect.cleandoc, docs))
    fields: list[Any] = [("name", "str", option(name, "what is built"))]
    for key, parameter in [*inspect.signature(made.__init__).parameters.items()][1:]:
        if key in given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind, limits = _declared(hints[key]) if key in hints else ("", {})
        if declared := getattr(made, "__dataclass_fields__", {}).get(key):
            copied = {name: getattr(declared, name) for name in ("default", "default_factory", "metadata")}
            field: Any = dataclasses.field(**copied)
        else:
            meaning = re.search(rf"^    {key}(?: \(.*\))?: (.*(?:\n     +.*)*)", text, re.MULTILINE)
            default = dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
            field = option(default, " ".join(meaning[1].split()) if meaning else "", **limits)
        if key == "name" or field.default is field.default_factory is dataclasses.MISSING:
            raise OptionError(f"{name}: {key} of its constructor: expected a default, and another word than name")
        if kind.removesuffix(" | None") not in _WANTED:
            raise OptionError(
                f"{name}: {key} of its constructor: expected an annotation int, float, bool, str, Literal[…] or one of "
                f'these | None, with limits Annotated[int, {{"ge": 1}}], got {kind or "none"}'
            )
        fields.append((key, kind, field))
    return dataclasses.make_dataclass(f"{made.__name__}Options", fields, kw_only=True)


def _declared(hint: Any) -> tuple[str, dict[str, Any]]:
    """Return the type of an annotation in words, and its limits."""
    limits: dict[str, Any] = {}
    if get_origin(hint) is Annotated:
        hint, limits = hint.__origin__, hint.__metadata__[0]
    if get_origin(hint) is Literal:
        return "str", {"choices": get_args(hint), **limits}
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = ["None" if part is NoneType else part.__name__ if type(part) is type else str(part) for part in parts]
    return " | ".join(names), limits


def read_value(key: str, kind: str, given: Any) -> Any:
    """Read a value of a YAML file, or the text of a word, as a type such as ``int`` or ``list[str] | None``.

    A list may be the text ``1,2`` or ``[1, 2]``. OptionError says which option, ``key``, is not of its type.

    >>> read_value("lr", "float", "1e-3"), read_value("root", "str | None", "null")
    (0.001, None)
    >>> read_value("seeds", "list[int]", "0,1")
    [0, 1]
    >>> read_value("model.depth", "int", "deep")
    Traceback (most recent call last):
    chela.core.errors.OptionError: model.depth: expected a whole number, got 'deep'
    """
    plain, null, _ = kind.partition(" | None")
    if null and given in (None, "null"):
        return None
    try:
        return _read(plain, given)
    except (ValueError, OverflowError):
        raise OptionError(f"{key}: expected {_WANTED[plain]}{' or null' * bool(null)}, got {shown(given)}") from None


def _read(kind: str, given: Any) -> Any:
    if kind.startswith("list["):
        if isinstance(given, str):
            text = given[1:-1] if given[:1] + given[-1:] == "[]" else given
            given = [item.strip() for item in text.split(",")] if text.strip() else []
        return [_read(kind[5:-1], item) for item in (given if isinstance(given, list) else [given])]
    if kind == "bool" and (word := str(given).lower()) in _TRUE + _FALSE:
        return word in _TRUE
    if kind in ("int", "float") and (type(given) in (str, int) or (type(given) is float and kind == "float")):
        return int(given) if kind == "int" else float(given)
    if kind == "str" and isinstance(given, str | int | float):
        return str(given)
    if kind == "Path" and isinstance(given, str | Path):
        return Path(given)
    raise ValueError


def check_options(options: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against its limits; OptionError names the option and what was expected."""
    for field in dataclasses.fields(options):
        check_value(field.metadata.get("key", f"{prefix}{field.name}"), getattr(options, field.name), field.metadata)


def check_value(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Check one value; see `check_options`."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise OptionError(f"{key}: expected a finite number, got {number}")
    for name, (holds, text, _) in BOUNDS.items():
        if value is not None and name in limits and not holds(value, limits[name]):
            raise OptionError(f"{key}: expected {text} {limits[name]:,}, got {shown(value)}")
    choices = limits.get("choices")
    if choices and value not in choices:
        raise OptionError(f"{key}: expected one of {', '.join(choices)}, got {shown(value)}{closest(value, choices)}")


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """Hold the keyword arguments of a constructor to the limits of their annotations, before it runs.

    >>> class Layer:
    ...     @checked
    ...     def __init__(self, *, heads: Annotated[int, {"ge": 1}] = 4):
    ...         self.heads = heads
    >>> Layer(heads=0)
    Traceback (most recent call last):
    chela.core.errors.OptionError: heads: expected at least 1, got 0
    """

    @functools.wraps(init)
    def check_and_build(*args: P.args, **kwargs: P.kwargs) -> None:
        hints = get_type_hints(init, include_extras=True)
        for name, value in kwargs.items():
            check_value(name, value, _declared(hints[name])[1] if name in hints else {})
        init(*args, **kwargs)

    return check_and_build


def shown(value: Any) -> str:
    """Return a value as an error message shows it: quoted, and cut when long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def split_words(words: Sequence[str], bare: str = "") -> Iterator[tuple[str, str]]:
    """Yield key and value of words ``key=value``; where there is a key ``bare``, of a word without one.

    >>> [*split_words(["runs/listops", "seed=2"], bare="run")]
    [('run', 'runs/listops'), ('seed', '2')]
    >>> [*split_words(["--task", "listops"])]
    Traceback (most recent call last):
    chela.core.errors.OptionError: expected key=value, got '--task', say task=listops; see --help
    """
    for word, after in itertools.pairwise([*words, ""]):
        key, equals, value = word.partition("=")
        if word.startswith("-") or not (equals or bare):
            name = key.lstrip("-").replace("-", "_")
            value = value or (after if "=" not in after and after[:1] not in ("", "-") else "…")
            hint = f", say {name}={value}" if name and word.startswith("--") else ""
            raise OptionError(f"expected key=value, got {shown(word)}{hint}; see --help")
        yield (key, value) if equals else (bare, word)


def closest(name: Any, known: Any) -> str:
    """Return " (did you mean 'x'?)" for the known name of the same ending, or most like `name`; else nothing."""
    name, known = str(name)[:80], list(known)
    same = [key for key in known if "." in key and key.rpartition(".")[2] == name.rpartition(".")[2]]
    close = same or difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
