"""Arguments that are cheap to make: autograd holds what they are made of, and makes them again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from chela.ops.again import Recipe

T = TypeVar("T")
SMALL_ELEMENTS = 2**21
"""Of less than this, 8 MiB of float32, what is made is held: to make it again takes 5 to 20 % of a small step."""


class _Pass(threading.local):
    """Of a block that is computed twice: which time is at hand in this thread, 0 outside of one."""

    number = 0


_pass = _Pass()


@contextlib.contextmanager
def whole_block(number: int) -> Iterator[None]:
    """Take what runs inside as a block of which autograd holds the input alone, the first (1) or the second time (2).

    Nothing is made again in it by itself, as the block's hooks must see all that is held; no running statistics count
    its second time.
    """
    before, _pass.number = _pass.number, number
    try:
        yield
    finally:
        _pass.number = before


def is_computed_again() -> bool:
    """Return whether this is the second time."""
    return _pass.number == 2


def with_remade(use: Callable[..., T], *arguments: tuple[Any, ...]) -> T:
    """Return ``use(a, b, …)`` of arguments given as ``(make, *inputs)``, each being ``make(*inputs)``.

    Until the backward pass the inputs are held, not what is made of them, unless they are small. Feature maps and gates
    are a pass over memory each, and what they give is nearly half of what a layer would hold. The result and the
    gradients are those of the plain call, to the last bit. The backward pass calls each ``make`` twice more: once to
    be read, and then, when that is gone, for its gradients.

    Args:
        use: Any differentiable function, such as a product.
        arguments: ``make`` is differentiable, without randomness, and has all that needs gradients among its inputs.

    >>> x, gate, weight = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True), torch.randn(2, 3)
    >>> y = with_remade(lambda product: product @ weight.T, (lambda x, gate: x * gate.sigmoid(), x, gate))
    >>> tuple(y.shape), y.requires_grad
    ((4, 2), True)
    """
    plain = torch.compiler.is_compiling() or _pass.number > 0  # others decide what to hold
    small = sum(x.numel() for _, *inputs in arguments for x in inputs if isinstance(x, Tensor)) < SMALL_ELEMENTS
    if plain or small or not torch.is_grad_enabled():
        return use(*(make(*inputs) for make, *inputs in arguments))
    made, of_storage = [], {}
    for make, *inputs in arguments:
        recipe = Recipe(make)
        made.append(recipe(*inputs))
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
            return recipe.once_more().as_strided(*geometry)  # type: ignore[no-any-return]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return use(*made)
