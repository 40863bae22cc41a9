"""Stages of a layer, each one autograd function that saves its inputs and recomputes the rest in the backward pass.

Beside each stands its plain form, which runs under ``torch.compile`` and autocast, and without gradients.

Shapes: B batch, L length, D model width, V inner width, H heads, Z and E width of a head of keys and of values.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chela.ops.fft_conv.cpu import convolve, convolve_backward
from chela.ops.padding import zero_padding, zero_padding_
from chela.ops.sequence_parallel import current, within

SMALL_ELEMENTS = 2**21
"""For inputs below this, 8 MiB of float32, all is saved: to recompute it costs more than its memory."""
MANY_LAGS = 2**19
"""A long kernel of so many numbers, 2 MiB of float32, or more is recomputed."""
ROWS = 1024
"""The least tokens of a block of the backward pass; a quarter of all tokens if that is more."""

silu_backward = torch.ops.aten.silu_backward.default
sigmoid_backward = torch.ops.aten.sigmoid_backward.default


class Factor(NamedTuple):
    """Some columns of the parameters, the constant matrix that turns them into lags, and which lags."""

    columns: slice
    matrix: Tensor
    lags: slice


def feed_forward(down: nn.Linear, inner: Tensor) -> Tensor:
    """Return ``down(SiLU(inner))``, of ``inner: (…, V)``."""
    if plain_layers(down) and own_backward(inner, down.weight, down.bias):
        return _FeedForward.apply(inner, down.weight, down.bias)  # type: ignore[no-any-return, no-untyped-call]
    return down(F.silu(inner))  # type: ignore[no-any-return]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(inner, weight)
        return F.linear(F.silu(inner), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, ...]:
        inner, weight = ctx.saved_tensors
        d_inner = silu_backward(d_y @ weight, inner)
        return d_inner, *gradients(d_y.flatten(0, -2), F.silu(inner).flatten(0, -2))


def gate(
    o: Tensor,
    c: Tensor,
    x: Tensor,
    mask: Tensor | None,
    linears: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear],
    dropout: nn.Dropout,
) -> Tensor:
    """Return ``σ(W_u c) ⊙ (dropout(SiLU(W_h c + W_o (o ⊙ SiLU(W_r c)))) − x)``, 0 where ``mask: (B, L)`` is False.

    Args:
        o: The attention's output, ``(…, V)``.
        c: The convolution's output, ``(…, D)``.
        x: The layer's input, of which the gate replaces a part, ``(…, D)``.
        mask: True = real token.
        linears: W_r, W_o, W_h and W_u.
        dropout: Of h.
    """
    weights = [p for linear in linears for p in (linear.weight, linear.bias)] if plain_layers(*linears) else []
    if weights and own_backward(o, c, x, *weights) and not (dropout.training and dropout.p):
        return _Gate.apply(o, c, x, mask, *weights)  # type: ignore[no-any-return, no-untyped-call]
    gate_in, out, skip, highway = linears
    h = out(o * F.silu(gate_in(c))) + skip(c)
    return zero_padding(torch.sigmoid(highway(c)) * (dropout(F.silu(h)) - x), mask)


class _Gate(torch.autograd.Function):
    """See ``gate``. Tokens are N rows ``(N, ·)``; the backward pass takes a block of them at a time, to save memory.

    Gradients are written over the saved r, h and u; a second backward pass recomputes these.
    """

    @staticmethod
    def forward(ctx: Any, o: Tensor, c: Tensor, x: Tensor, mask: Tensor | None, *weights: Tensor) -> Tensor:
        saved = _, h, u = _Gate.pre_activations(o, c, *weights)
        ctx.save_for_backward(o, c, x, mask, *weights, *saved)
        ctx.spent = False
        return zero_padding_(F.silu(h).sub_(x).mul_(torch.sigmoid(u)), mask)

    @staticmethod
    def pre_activations(o: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        W_r, b_r, W_o, b_o, W_h, b_h, W_u, b_u = weights
        r, u = F.linear(c, W_r, b_r), F.linear(c, W_u, b_u)
        h = F.linear(F.silu(r).mul_(o), W_o, b_o + b_h)
        h.view(-1, h.shape[-1]).addmm_(c.flatten(0, -2), W_h.mT)
        return r, h, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        o, c, x, mask, *weights, r, h, u = ctx.saved_tensors
        W_r, _, W_o, _, W_h, _, W_u, _ = weights
        r, h, u = _Gate.pre_activations(o, c, *weights) if ctx.spent else (t.data for t in (r, h, u))
        ctx.spent = True
        rows = [t.reshape(-1, t.shape[-1]) for t in (zero_padding(d_y, mask), o, c, x, r, h, u)]

        def block_backward(at: slice) -> tuple[Tensor, ...]:
            """Write the gradients of a block's o, c and x over r, h and u; return those of the weights."""
            d_y, o, c, x, r, h, u = (t[at] for t in rows)
            opened = torch.sigmoid(u)
            d_u = sigmoid_backward(F.silu(h).sub_(x).mul_(d_y), opened)
            d_h = silu_backward(torch.mul(opened, d_y, out=u), h)
            u.neg_()
            passed, d_passed = F.silu(r), d_h @ W_o
            d_r = silu_backward(d_passed * o, r)
            torch.mul(d_passed, passed, out=r)
            torch.mm(d_r, W_r, out=h).addmm_(d_u, W_u).addmm_(d_h, W_h)
            return *gradients(d_r, c), *gradients(d_h, passed.mul_(o)), d_h.mT @ c, *gradients(d_u, c)

        total: list[Tensor] = []
        for _, at in blocks(1, len(rows[0]), small=is_small(o, c, x)):
            add(total, *block_backward(at))
        d_W_r, d_b_r, d_W_o, d_b, d_W_h, d_W_u, d_b_u = total
        return r, h, u, None, d_W_r, d_b_r, d_W_o, d_b, d_W_h, d_b, d_W_u, d_b_u


class _Convolved(torch.autograd.Function):
    """The convolution of ``u: (B, L, C)``, as ``convolve_in_order``, by lags that are linear in ``learned: (C, P)``.

    One of the factors takes all columns of ``learned``; each other one takes some, and adds to their gradient.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, learned: Tensor, factors: list[Factor]) -> Tensor:
        ctx.factors = factors
        lags = _Convolved.lags(learned, factors)
        ctx.save_for_backward(u, learned, lags if lags.numel() < MANY_LAGS else None)
        return convolve(u, lags)  # type: ignore[no-any-return]

    @staticmethod
    def lags(learned: Tensor, factors: list[Factor]) -> Tensor:
        lags = learned.new_empty(len(learned), factors[-1].lags.stop)
        for columns, matrix, at in factors:
            torch.mm(learned[:, columns], matrix, out=lags[:, at])
        return lags

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        u, learned, lags = ctx.saved_tensors
        lags = _Convolved.lags(learned, ctx.factors) if lags is None else lags
        d_u, d_lags = convolve_backward(d_y, u, lags, ctx.needs_input_grad[0], True)
        d_learned: Any = None
        for columns, matrix, at in sorted(ctx.factors, key=lambda factor: factor.columns != slice(None)):
            part = d_lags[:, at] @ matrix.mT
            if d_learned is None:
                d_learned = part
            else:
                d_learned[:, columns].add_(part)
        return d_u if ctx.needs_input_grad[0] else None, d_learned, None


convolved: Callable[[Tensor, Tensor, list[Factor]], Tensor] = _Convolved.apply


def is_small(*inputs: Tensor) -> bool:
    """Whether a stage saves its intermediate results."""
    return sum(x.numel() for x in inputs) < SMALL_ELEMENTS


def blocks(batch: int, length: int, *, small: bool) -> list[tuple[slice, slice]]:
    """Cut B sequences of L tokens into blocks of some sequences or of a piece of one; a small batch is one block."""
    if small:
        return [(slice(0, batch), slice(0, length))]
    size = max(ROWS, batch * length // 4)
    rows, tokens = max(1, size // length), min(length, size)
    return [(slice(b, b + rows), slice(t, t + tokens)) for b in range(0, batch, rows) for t in range(0, length, tokens)]


def add(total: list[Tensor], *parts: Tensor) -> None:
    """Add the parts to the total in place; the first ones become it."""
    for sum_so_far, part in zip(total, parts, strict=False):
        sum_so_far.add_(part)
    total.extend(parts[len(total) :])


def gradients(d_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight and bias that made rows ``y: (N, ·)`` of ``x: (N, ·)``."""
    return d_y.mT @ x, d_y.sum(0)


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Return ``function(*inputs)``; autograd saves the inputs alone and recomputes the rest.

    Small inputs are not worth it. Within a block that is recomputed as a whole, under a compiler, and where processes
    share a sequence, it is called as it is.
    """
    plain = torch.compiler.is_compiling() or _pass.number > 0 or current() is not None
    if is_small(*inputs) or plain or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def plain_layers(*layers: nn.Module) -> bool:
    """Whether these layers are plain ones: no adapter is in their place, no hook on them."""
    plain = nn.Linear, nn.LayerNorm
    return all(type(m) in plain and not m._forward_hooks and not m._forward_pre_hooks for m in layers)


def own_backward(*tensors: Tensor) -> bool:
    """Whether a stage takes its own backward pass: for plain or fake tensors of one dtype that need gradients."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and all(type(t) in (Tensor, nn.Parameter, FakeTensor) and t.dtype == tensors[0].dtype for t in tensors)
    )


class _Pass(threading.local):
    """In this thread: 1 in the first run of a block that will be recomputed, 2 in its recomputation, else 0."""

    number = 0


_pass = _Pass()


def recompute_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Return the contexts of a block's first run and of its recomputation, for ``checkpoint``."""
    piece = current()  # the piece of a sequence; by the recomputation its context has been left

    @contextlib.contextmanager
    def run(number: int) -> Iterator[None]:
        before, _pass.number = _pass.number, number
        try:
            with within(piece):
                yield
        finally:
            _pass.number = before

    return run(1), run(2)


def is_recomputed() -> bool:
    """Return whether a block is being recomputed: running statistics must not count it twice."""
    return _pass.number == 2
