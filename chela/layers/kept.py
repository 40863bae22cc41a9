"""What is made of parameters, built once in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Kept:
    """A cache of something that is made of a module's parameters."""

    value: Any = None

    def of(self, module: nn.Module, make: Callable[[], T], fits: Callable[[T], bool] = lambda value: True) -> T:
        """Return what ``make`` gave; in eval mode without gradients it is made anew only if it no longer fits."""
        if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if self.value is None or not fits(self.value):
            self.value = make()
        return self.value  # type: ignore[no-any-return]


class Keeping(nn.Module):
    """A module with ``Kept`` among its attributes.

    ``train()``, ``eval()``, loading a state dict, a move and a cast drop what is kept; ``forward`` and ``prefill`` with
    gradients do so by ``renew``, since an optimiser's step may follow. After any other write call ``eval()``.
    """

    def drop(self) -> None:
        """Forget what is kept."""
        for value in vars(self).values():
            if isinstance(value, Kept):
                value.value = None

    def renew(self) -> None:
        """Forget what is kept if this is a pass with gradients."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.drop()

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget what is kept."""
        self.drop()
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> Self:
        self.drop()
        return super()._apply(*args, **options)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.drop()
        super()._load_from_state_dict(*args, **options)
