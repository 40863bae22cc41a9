"""Keys and values of the tokens so far, in tensors with room for more: a step writes its own alone.

Shapes: B batch, T tokens held, L new ones, R tokens that have room, Z width; "…" may be heads.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

LEAST = 64
"""Tokens that a cache has room for at the start, as the inputs of a long kernel."""


def room(tokens: int, most: int = sys.maxsize) -> int:
    """Return R for so many tokens: the next power of two, at least ``LEAST`` and at most ``most``.

    >>> room(0), room(64), room(65), room(65, most=100)
    (64, 64, 128, 100)
    """
    doubled = 1 << (max(tokens, LEAST) - 1).bit_length()
    return min(doubled, most)


def with_room(tokens: Tensor, size: int) -> Tensor:
    """Copy ``tokens: (B, …, T, Z)`` to the beginning of zeros ``(B, …, R, Z)``, R being ``size``.

    The copy has no gradients.

    >>> with_room(torch.ones(2, 5, 3), room(5)).shape
    torch.Size([2, 64, 3])
    """
    *outer, held, width = tokens.shape
    cache = tokens.new_zeros(*outer, size, width)
    cache[..., :held, :] = tokens.detach()
    return cache


def joined(cache: Tensor, held: int, new: Tensor) -> Tensor:
    """Return the ``held`` tokens of a cache and ``new: (B, …, L, Z)``, in a tensor of their own.

    >>> joined(torch.zeros(1, 64, 3), 5, torch.ones(1, 2, 3)).shape
    torch.Size([1, 7, 3])
    """
    return torch.cat([cache[..., :held, :].to(new.dtype), new], dim=-2)


def append(cache: Tensor, held: int, new: Tensor, most: int = sys.maxsize) -> Tensor:
    """Write a token ``new: (B, …, 1, Z)`` behind the ``held`` ones of a cache; return the cache.

    The write is in place. A cache ``(B, …, R, Z)`` that is full is first copied to one with
    ``room(held + 1, most)``: it doubles, so that is O(B·Z) a token on average. One of another dtype,
    autocast's, is copied too.

    >>> cache = torch.zeros(1, 64, 1)
    >>> append(cache, 63, torch.ones(1, 1, 1)) is cache
    True
    >>> append(cache, 64, torch.ones(1, 1, 1)).shape
    torch.Size([1, 128, 1])
    """
    size = max(room(held + 1, most), cache.shape[-2])
    if size > cache.shape[-2] or cache.dtype is not new.dtype:
        cache = with_room(cache[..., :held, :].to(new.dtype), size)
    cache[..., held : held + 1, :] = new
    return cache
