"""Reads the plain data of a pickle without running any of it.

A pickle is a program, and the Python version of CIFAR-10 is shipped as one. `read` walks through its operations as
`pickletools` lists them and builds lists, dicts, numbers and strings only. What the pickle wants called or imported is
kept as an inert `Call`; nothing is looked up, nothing is called.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

from lra.errors import DataError


@dataclass
class Call:
    """What a pickle wanted to call, uncalled.

    Attributes:
        name: `module name` as written.
        arguments: of the call.
        state: what the result was to be filled with.
    """

    name: Any
    arguments: Any = ()
    state: Any = None


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_IGNORED = {"PROTO", "FRAME", "STOP"}
_PUT = {"BINPUT", "LONG_BINPUT", "PUT"}
_GET = {"BINGET", "LONG_BINGET", "GET"}


def read(raw: bytes) -> Any:
    """The plain data of a pickle.

    Raises:
        DataError: for operations outside the plain ones, or a pickle that ends early.

    >>> import pickle
    >>> read(pickle.dumps({"labels": [6, 9], "data": (None, True, 1.5, b"x")}, protocol=2))["labels"]
    [6, 9]
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for operation, argument, _ in pickletools.genops(raw):
            _step(operation.name, argument, stack, memo)
        (result,) = stack
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"this pickle is truncated or not plain data ({error})") from None
    return result


def _since_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise ValueError("no mark")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _IGNORED:
        return
    if name in _PUT:
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in _GET:
        stack.append(memo[argument])
    elif name == "MARK":
        stack.append(_MARK)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
        stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        number = int(name[-1])
        stack[-number:] = [tuple(stack[-number:])]
    elif name == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif name in ("APPEND", "APPENDS"):
        items = _since_mark(stack) if name == "APPENDS" else [stack.pop()]
        stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = _since_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name == "GLOBAL":
        stack.append(Call(argument))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(Call(f"{module} {attribute}"))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, called = stack.pop(), stack.pop()
        stack.append(Call(called.name if isinstance(called, Call) else called, arguments))
    elif name == "BUILD":
        state = stack.pop()
        if not isinstance(stack[-1], Call):
            raise ValueError("a state for plain data")
        stack[-1].state = state
    elif isinstance(argument, int | float | str | bytes):
        stack.append(argument)
    else:
        raise ValueError(f"operation {name}")
