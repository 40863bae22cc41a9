"""Stages of a layer as one autograd function each: it holds its inputs, and makes what lies between once more.

Beside each stands its plain statement. It runs wherever somebody else decides what to hold or in which dtype: under
``torch.compile`` and autocast, and without gradients.

Shapes: N tokens ``(..., ·)`` of any leading dimensions, V inner width, H heads, Z width of a head.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chela.ops.again import Recipe
from chela.ops.sequence_parallel import current

SMALL_ELEMENTS = 2**21
"""Of inputs smaller than this, 8 MiB of float32, what is made is held: to make it again costs more than it saves."""

silu_backward = torch.ops.aten.silu_backward.default


def gated_linear(linear: nn.Linear, gate: Tensor, x: Tensor | None = None) -> Tensor:
    """Return ``linear(x ⊙ SiLU(gate))``; without x, ``linear(SiLU(gate))``."""
    tensors = (gate, *(() if x is None else (x,)), linear.weight, linear.bias)
    if by_hand(*tensors):
        return _GatedLinear.apply(gate, x, linear.weight, linear.bias)  # type: ignore[no-any-return, no-untyped-call]
    gated = F.silu(gate)
    return linear(gated if x is None else x * gated)  # type: ignore[no-any-return]


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x, weight)
        gated = F.silu(gate)
        return F.linear(gated if x is None else gated.mul_(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, x, weight = ctx.saved_tensors
        gated = F.silu(gate)
        d_inner, d_x = d_y @ weight, None
        rows = d_y.flatten(0, -2)
        if x is not None:
            d_x = d_inner * gated
            d_inner.mul_(x)
            gated.mul_(x)
        return silu_backward(d_inner, gate), d_x, rows.mT @ gated.flatten(0, -2), rows.sum(0)


def highway(h: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """Return ``σ(gate) ⊙ (SiLU(h) − x)``, each ``(..., D)``."""
    if by_hand(h, gate, x):
        return _Highway.apply(h, gate, x)  # type: ignore[no-any-return, no-untyped-call]
    return torch.sigmoid(gate) * (F.silu(h) - x)


class _Highway(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(h, gate, x)
        return F.silu(h).sub_(x).mul_(torch.sigmoid(gate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, ...]:
        h, gate, x = ctx.saved_tensors
        open_ = torch.sigmoid(gate)
        d_candidate = d_y * open_
        d_gate = F.silu(h).sub_(x).mul_(d_candidate).mul_(open_.neg_().add_(1))
        return silu_backward(d_candidate, h), d_gate, d_candidate.neg_()


def queries_and_keys(z: Tensor, gamma: Tensor, beta: Tensor, *, positive: bool) -> tuple[Tensor, Tensor]:
    """Return ``φ(γ_q ⊙ z + β_q)`` and ``φ(γ_k ⊙ z + β_k)``, each ``(..., H, Z)``.

    Args:
        z: The projection ``(..., H·Z)``.
        gamma: Scales of queries and of keys, ``(2, H, Z)``.
        beta: Shifts of queries and of keys, ``(2, H, Z)``.
        positive: φ is elu + 1, else SiLU.
    """
    z = z.view(*z.shape[:-1], *gamma.shape[1:])
    if by_hand(z, gamma, beta):
        return _QueriesAndKeys.apply(z, gamma, beta, positive)  # type: ignore[no-any-return, no-untyped-call]
    pairs = zip(gamma, beta, strict=True)
    q, k = (F.elu(y) + 1 if positive else F.silu(y) for y in (torch.addcmul(b, z, g) for g, b in pairs))
    return q, k


class _QueriesAndKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor, beta: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, gamma, beta)
        ctx.positive = positive
        q, k = (torch.addcmul(shift, z, scale) for scale, shift in zip(gamma, beta, strict=True))
        for y in (q, k):
            F.elu_(y).add_(1) if positive else F.silu(y, inplace=True)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
        z, gamma, beta = ctx.saved_tensors
        d_z, d_gamma, d_beta = None, torch.empty_like(gamma), torch.empty_like(beta)
        tokens = tuple(range(z.ndim - 2))
        for i, d_y in enumerate((d_q, d_k)):
            y = torch.addcmul(beta[i], z, gamma[i])
            # elu + 1 has the slope exp(y) = elu(y) + 1 below 0, and 1 above
            d_y = F.elu_(y).add_(1).clamp_(max=1).mul_(d_y) if ctx.positive else silu_backward(d_y, y)
            torch.sum(d_y, tokens, out=d_beta[i])
            torch.sum(d_y * z, tokens, out=d_gamma[i])
            d_z = d_y * gamma[i] if d_z is None else d_z.addcmul_(d_y, gamma[i])
        return d_z, d_gamma, d_beta, None


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return ``function(*inputs)``, of which autograd holds the inputs alone and computes the rest once more.

    Small inputs are not worth it. A block that is computed twice as a whole, a compiler, and processes that share a
    sequence must see what the function does.

    Args:
        function: Differentiable, without randomness, with all that needs gradients among its inputs.
        inputs: Tensors.
    """
    small = sum(x.numel() for x in inputs) < SMALL_ELEMENTS
    seen = torch.compiler.is_compiling() or _pass.number > 0 or current() is not None
    if small or seen or not torch.is_grad_enabled():
        return function(*inputs)
    return Recipe(function)(*inputs)  # type: ignore[no-any-return]


def by_hand(*tensors: Tensor) -> bool:
    """Whether a stage takes its own backward pass: for plain or fake tensors of one dtype that need gradients."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and all(type(t) in (Tensor, nn.Parameter, FakeTensor) and t.dtype == tensors[0].dtype for t in tensors)
    )


class _Pass(threading.local):
    """Which time a block that is computed twice runs in this thread: 0 is outside of one."""

    number = 0


_pass = _Pass()


@contextlib.contextmanager
def whole_block(number: int) -> Iterator[None]:
    """Take what runs inside as a block that autograd computes twice, the first (1) or the second time (2)."""
    before, _pass.number = _pass.number, number
    try:
        yield
    finally:
        _pass.number = before


def is_recomputed() -> bool:
    """Return whether this is a block's second time, which running statistics do not count."""
    return _pass.number == 2
