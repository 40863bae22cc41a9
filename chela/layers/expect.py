"""What constructors and steps expect of their caller."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, ParamSpec, get_args, get_origin, get_type_hints

from torch import nn

from lra.options import check_value

P = ParamSpec("P")


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """Hold the keyword arguments of a constructor to their annotations, before it runs.

    ``Literal["a", "b"]`` lists the values; the dict in ``Annotated[int, {"ge": 1}]`` has the limits that
    ``lra.options.option`` takes.

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
            hint = hints.get(name)
            choices = {"choices": get_args(hint)} if get_origin(hint) is Literal else {}
            check_value(name, value, next(iter(getattr(hint, "__metadata__", ())), choices))
        init(*args, **kwargs)

    return check_and_build


def expect_causal(layer: nn.Module) -> None:
    """Refuse a state to a layer that looks ahead.

    Raises:
        RuntimeError: The layer was built with ``causal=False``.
    """
    if not layer.causal:
        raise RuntimeError(f"{type(layer).__name__}.start: expected causal=True; a two-sided layer needs later tokens")
