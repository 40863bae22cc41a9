"""What is made of parameters, kept while they stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

from torch import nn

T = TypeVar("T")


class Kept:
    """Something made of a module's parameters and buffers, kept until one is written to, replaced, moved or cast.

    A write through ``.data`` or a NumPy view cannot be seen: the module drops what is kept in ``train`` and ``eval``.
    """

    _value: Any = None
    _made_of: object = None

    def drop(self) -> None:
        """Forget what is kept."""
        self._value = self._made_of = None

    def of(self, module: nn.Module, make: Callable[[], T], fits: Callable[[T], bool] = lambda value: True) -> T:
        """Return what ``make`` gave, made anew if the module is no longer the same or it no longer fits."""
        made_of = [  # an inference tensor does not count its changes: object() equals nothing
            (t.data_ptr(), object() if t.is_inference() else t._version, t.dtype, t.device)
            for t in (*module.parameters(), *module.buffers())
        ]
        if self._made_of != made_of or not fits(self._value):
            self._value, self._made_of = make(), made_of
        return self._value  # type: ignore[no-any-return]


class Keeping(nn.Module):
    """A module with ``Kept`` among its attributes."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and drop what is kept, since not every write to a parameter can be seen."""
        for value in vars(self).values():
            if isinstance(value, Kept):
                value.drop()
        return super().train(mode)
