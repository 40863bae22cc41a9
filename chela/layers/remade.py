"""Arguments that are cheap to make: autograd holds what they are made of, and makes them again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

T = TypeVar("T")
_thread = threading.local()


@contextlib.contextmanager
def plain_calls() -> Iterator[None]:
    """Make nothing again here, in this thread: where a whole block is, its hooks must see all that is held."""
    before, _thread.plain = getattr(_thread, "plain", False), True
    try:
        yield
    finally:
        _thread.plain = before


def with_remade(use: Callable[..., T], *arguments: tuple[Any, ...]) -> T:
    """Return ``use(a, b, …)`` of arguments given as ``(make, *inputs)``, each being ``make(*inputs)``.

    Until the backward pass the inputs are held, not what is made of them. Feature maps and gates are a pass over memory
    each, and what they give is nearly half of what a layer would hold. The result and the gradients are those of the
    plain call, to the last bit. The backward pass calls each ``make`` twice more.

    Args:
        use: Any differentiable function, such as a product.
        arguments: ``make`` is differentiable, without randomness, and has all that needs gradients among its inputs.

    >>> x, gate, weight = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True), torch.randn(2, 3)
    >>> y = with_remade(lambda product: product @ weight.T, (lambda x, gate: x * gate.sigmoid(), x, gate))
    >>> tuple(y.shape), y.requires_grad
    ((4, 2), True)
    """
    plain = torch.compiler.is_compiling() or getattr(_thread, "plain", False)  # others decide what to hold
    if plain or not torch.is_grad_enabled():
        return use(*(make(*inputs) for make, *inputs in arguments))
    made, of_storage = [], {}
    for make, *inputs in arguments:
        recipe = _Recipe(make, inputs[0].device.type)
        made.append(_Make.apply(recipe, *inputs))  # type: ignore[no-untyped-call]
        if made[-1].requires_grad:
            of_storage[made[-1].untyped_storage()._cdata] = recipe

    def pack(x: Tensor) -> Any:
        """Say how to make x, or what x is a view of; other tensors are held themselves."""
        recipe = of_storage.get(x.untyped_storage()._cdata)
        return x if recipe is None else (recipe, x.size(), x.stride(), x.storage_offset())

    def unpack(held: Any) -> Tensor:
        if isinstance(held, Tensor):
            return held
        recipe, *geometry = held
        with torch.no_grad():
            return recipe.remake(recipe.context.saved_tensors).as_strided(*geometry)  # type: ignore[no-any-return]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return use(*made)


class _Recipe:
    """How to make a tensor again, under the autocast that it was first made under."""

    def __init__(self, make: Callable[..., Tensor], device: str) -> None:
        self.make, self.device = make, device
        self.enabled, self.dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.context: Any = None

    def remake(self, inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled):
            return self.make(*inputs)


class _Make(torch.autograd.Function):
    """``make(*inputs)``, which saves its inputs alone."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe, recipe.context = recipe, ctx
        ctx.save_for_backward(*inputs)
        return recipe.make(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = tuple(x.detach().requires_grad_(g) for x, g in zip(ctx.saved_tensors, needed, strict=True))
        with torch.enable_grad():
            made = ctx.recipe.remake(inputs)
        found = iter(torch.autograd.grad(made, [x for x in inputs if x.requires_grad], grad))
        return None, *(next(found) if x.requires_grad else None for x in inputs)
