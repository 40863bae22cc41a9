"""A function of which autograd holds the inputs alone: the backward pass computes it once more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Recipe:
    """A differentiable function without randomness, to be called again under the autocast of its first call.

    ``torch.utils.checkpoint`` would hold the inputs past hooks on saved tensors, and hide them from those around it.

    >>> x = torch.ones(3, requires_grad=True)
    >>> Recipe(lambda x: x.exp().square())(x).sum().backward()
    >>> bool(torch.allclose(x.grad, 2 * x.exp().square()))
    True
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.again: Callable[..., Any] = function  # under the first call's autocast
        self.context: Any = None  # what holds the inputs

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Return ``function(*inputs)``, a tensor or a tuple of some; gradients flow to ``inputs`` and no further."""
        device = next(x.device.type for x in inputs if x is not None)
        self.again = functools.partial(
            _under_autocast,
            self.function,
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
        )
        return _Again.apply(self, *inputs)  # type: ignore[no-untyped-call]

    def once_more(self) -> Any:
        """Compute it again from the inputs that autograd holds."""
        return self.again(*self.context.saved_tensors)


def _under_autocast(
    function: Callable[..., Any], device: str, dtype: torch.dtype, enabled: bool, *inputs: Tensor | None
) -> Any:
    with torch.autocast(device, dtype=dtype, enabled=enabled):
        return function(*inputs)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: Tensor | None) -> Any:
        # Not the recipe itself: it leads back here, and of a circle through autograd's nodes nothing is ever freed.
        ctx.again, recipe.context = recipe.again, ctx
        ctx.save_for_backward(*inputs)
        return recipe.function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        held, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        inputs = tuple(
            x if x is None else x.detach().requires_grad_(wanted) for x, wanted in zip(held, needed, strict=True)
        )
        with torch.enable_grad():
            made = ctx.again(*inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        reached = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if y.requires_grad]
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        made, of_made = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(made, wanted, of_made, materialize_grads=True))
        return None, *(next(found) if x is not None and x.requires_grad else None for x in inputs)
