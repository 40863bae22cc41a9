"""Stages of a layer as one autograd function each: it holds its inputs, and computes what lies between once more.

Beside each stands its plain statement. It runs wherever somebody else decides what to hold or in which dtype: under
``torch.compile`` and autocast, and without gradients.

Shapes: B batch, L length, D model width, V inner width, H heads, Z and E width of a head of keys and of values.
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
from torch.utils.checkpoint import checkpoint

from chela.ops.padding import zero_padding, zero_padding_
from chela.ops.sequence_parallel import current

SMALL_ELEMENTS = 2**21
"""Of inputs smaller than this, 8 MiB of float32, what is made is held: to make it again costs more than it saves."""

silu_backward = torch.ops.aten.silu_backward.default
sigmoid_backward = torch.ops.aten.sigmoid_backward.default


def feed_forward(down: nn.Linear, inner: Tensor) -> Tensor:
    """Return ``down(SiLU(inner))``, of ``inner: (…, V)``."""
    if untouched(down) and by_hand(inner, down.weight, down.bias):
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
        _, d_weight, d_bias = gradients(d_y, F.silu(inner))
        return silu_backward(d_y @ weight, inner), d_weight, d_bias


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
        o: What the attention gave, ``(…, V)``.
        c: What the convolution gave, ``(…, D)``.
        x: What is replaced, ``(…, D)``.
        mask: True = real token.
        linears: W_r, W_o, W_h and W_u.
        dropout: Of h.
    """
    weights = [p for linear in linears for p in (linear.weight, linear.bias)] if untouched(*linears) else []
    if weights and by_hand(o, c, x, *weights) and not (dropout.training and dropout.p):
        return _Gate.apply(o, c, x, mask, *weights)  # type: ignore[no-any-return, no-untyped-call]
    gate_in, out, skip, highway = linears
    h = out(o * F.silu(gate_in(c))) + skip(c)
    return zero_padding(torch.sigmoid(highway(c)) * (dropout(F.silu(h)) - x), mask)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, c: Tensor, x: Tensor, mask: Tensor | None, *weights: Tensor) -> Tensor:
        W_r, b_r, W_o, b_o, W_h, b_h, W_u, b_u = weights
        r, u = F.linear(c, W_r, b_r), F.linear(c, W_u, b_u)
        h = F.linear(F.silu(r).mul_(o), W_o, b_o + b_h)
        h.view(-1, h.shape[-1]).addmm_(c.flatten(0, -2), W_h.mT)
        ctx.save_for_backward(o, c, x, mask, r, h, u, W_r, W_o, W_h, W_u)
        return zero_padding_(F.silu(h).sub_(x).mul_(torch.sigmoid(u)), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        o, c, x, mask, r, h, u, W_r, W_o, W_h, W_u = ctx.saved_tensors
        d_y, opened = zero_padding(d_y, mask), torch.sigmoid(u)
        d_u = sigmoid_backward(F.silu(h).sub_(x).mul_(d_y), opened)
        d_x = opened.mul_(d_y)
        d_h = silu_backward(d_x, h)
        passed = F.silu(r)
        d_o = d_h @ W_o
        d_r = silu_backward(d_o * o, r)
        d_o.mul_(passed)
        _, d_W_o, d_b = gradients(d_h, passed.mul_(o))
        d_c, d_W_r, d_b_r = gradients(d_r, c, W_r)
        d_c, d_W_u, d_b_u = gradients(d_u, c, W_u, d_c)
        d_c, d_W_h, _ = gradients(d_h, c, W_h, d_c, bias=False)
        return d_o, d_c, d_x.neg_(), None, d_W_r, d_b_r, d_W_o, d_b, d_W_h, d_b, d_W_u, d_b_u


def features(z: Tensor, gamma: Tensor, beta: Tensor, *, positive: bool) -> Tensor:
    """Return queries and keys ``φ(γ ⊙ z + β)``, ``(…, 2, H, Z)``.

    Args:
        z: The projection ``(…, H·Z)``.
        gamma: Scales of queries and of keys, ``(2, H, Z)``.
        beta: Shifts of queries and of keys, ``(2, H, Z)``.
        positive: φ is elu + 1, else SiLU.
    """
    y = torch.addcmul(beta.flatten(1), z.unsqueeze(-2), gamma.flatten(1))
    y = F.elu(y) + 1 if positive else F.silu(y)
    return y.view(*y.shape[:-1], *gamma.shape[1:])


def attend(
    c: Tensor, v: Tensor, mask: Tensor | None, project: nn.Linear, gamma: Tensor, beta: Tensor, positive: bool
) -> Tensor | None:
    """Return bidirectional linear attention of the features of ``project(c)`` over values ``SiLU(v)``.

    It is ``linear_attention`` without decay, normalised if ``positive``; what it gives at padding means nothing. None
    where a stage does not take its own backward pass.

    Args:
        c: ``(B, L, D)``.
        v: ``(B, L, H·E)``.
        mask: True = real token.
        project: D → H·Z.
        gamma: As in ``features``.
        beta: As in ``features``.
        positive: As in ``features``.
    """
    if not untouched(project):
        return None
    tensors = (c, v, project.weight, project.bias, gamma, beta)
    if not by_hand(*tensors) or c.dtype not in (torch.float32, torch.float64):
        return None
    return _Attend.apply(*tensors, mask, positive)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    """N = B·H heads ``(N, L, ·)`` see one state S = Σ k vᵀ ``(N, D, E)``, and its sum of keys."""

    @staticmethod
    def forward(
        ctx: Any, c: Tensor, v: Tensor, W: Tensor, b: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor | None,
        positive: bool,
    ) -> Tensor:  # fmt: skip
        ctx.positive = positive
        z = F.linear(c, W, b)
        made = _, q, k, values = _Attend.made(z, v, gamma, beta, mask, positive)
        S = k.mT @ values
        o, total = q @ S, None
        if positive:
            total = EPS - o[..., -1:]
            o = o[..., :-1] / total
        held = made if z.numel() < SMALL_ELEMENTS else ()
        ctx.save_for_backward(c, v, W, gamma, beta, mask, z, S, total, o if positive else None, *held)
        return _together(o, gamma.shape[1])

    @staticmethod
    def made(
        z: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor | None, positive: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries and keys together ``(B, L, 2, H·Z)``, then these and values by heads; keys are 0 at padding.

        Where weights are divided by their sum one more value is −1, so that a token gets minus that sum.
        """
        heads = gamma.shape[1]
        y = torch.addcmul(beta.flatten(1), z.unsqueeze(-2), gamma.flatten(1))
        if positive:
            F.elu_(y).add_(1)
        else:
            F.silu(y, inplace=True)
        zero_padding_(y[:, :, 1], mask)
        q, k = _apart(y.flatten(2), heads, 2)
        (values,) = _apart(F.silu(v), heads)
        return y, q, k, F.pad(values, (0, 1), value=-1.0) if positive else values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        c, v, W, gamma, beta, mask, z, S, total, o, *made = ctx.saved_tensors
        y, q, k, values = made or _Attend.made(z, v, gamma, beta, mask, ctx.positive)
        (g,) = _apart(d_o, gamma.shape[1])
        d_y = torch.empty_like(y) if gamma.shape[1] == 1 else y.new_empty(2, *q.shape)
        d_q, d_k = d_y.unbind(2) if gamma.shape[1] == 1 else d_y
        if ctx.positive:  # o = sums / total
            d_sums = torch.empty_like(values)
            torch.div(g, total, out=d_sums[..., :-1])
            torch.div((g * o).sum(-1, keepdim=True), total, out=d_sums[..., -1:])
            g = d_sums
        torch.bmm(g, S.mT, out=d_q)
        dS = q.mT @ g
        torch.bmm(values, dS.mT, out=d_k)
        d_v = silu_backward(_together(k @ dS[..., : d_o.shape[-1] // gamma.shape[1]], gamma.shape[1]), v)
        shape, slope = y.shape, y if ctx.positive else None
        del y, q, k, values, made, g, d_q, d_k  # a step's memory is at its peak here
        if gamma.shape[1] > 1:
            d_y = d_y.view(2, len(z), gamma.shape[1], z.shape[1], -1).permute(1, 3, 0, 2, 4).reshape(shape)
        if slope is not None:  # elu + 1 has the slope exp(y) = elu(y) + 1 below 0, and 1 above; keys at padding are 0
            d_y.mul_(slope.clamp(max=1))
        else:
            zero_padding_(d_y[:, :, 1], mask)
            y = torch.addcmul(beta.flatten(1), z.unsqueeze(-2), gamma.flatten(1))
            torch.ops.aten.silu_backward.grad_input(d_y, y, grad_input=d_y)
            del y
        d_beta, d_gamma = d_y.sum((0, 1)), (d_y * z.unsqueeze(-2)).sum((0, 1))
        d_c, d_W, d_b = gradients(d_y.mul_(gamma.flatten(1)).sum(2), c, W)
        return d_c, d_v, d_W, d_b, d_gamma.view_as(gamma), d_beta.view_as(beta), None, None


EPS = 1e-6
"""Added to the sum of the weights, as by ``linear_attention``."""


def _apart(x: Tensor, heads: int, parts: int = 1) -> tuple[Tensor, ...]:
    """Return parts ``(B·H, L, ·)`` of ``x: (B, L, parts·H·…)``."""
    B, L = x.shape[:2]
    if heads == 1:
        return x.chunk(parts, dim=-1)
    return x.view(B, L, parts, heads, -1).permute(2, 0, 3, 1, 4).reshape(parts, B * heads, L, -1).unbind()


def _together(x: Tensor, heads: int) -> Tensor:
    """Return ``x: (B·H, L, ·)`` as ``(B, L, H·…)``."""
    return x if heads == 1 else x.view(-1, heads, *x.shape[1:]).transpose(1, 2).flatten(2)


def gradients(
    d_y: Tensor, x: Tensor, weight: Tensor | None = None, to: Tensor | None = None, *, bias: bool = True
) -> tuple[Any, Tensor, Any]:
    """Return the gradients of ``F.linear(x, weight, bias)``'s x, added to another one in place, weight and bias.

    Those of x, without ``weight``, and of the bias, if so asked, are None.
    """
    rows = d_y.flatten(0, -2)
    d_x = to
    if weight is not None:
        d_x = d_y @ weight if to is None else to.view(-1, to.shape[-1]).addmm_(rows, weight).view_as(to)
    return d_x, rows.mT @ x.flatten(0, -2), rows.sum(0) if bias else None


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Return ``function(*inputs)``, of which autograd holds the inputs alone and computes the rest once more.

    Small inputs are not worth it. A block that is computed twice as a whole, a compiler, and processes that share a
    sequence must see what the function does.
    """
    small = sum(x.numel() for x in inputs) < SMALL_ELEMENTS
    seen = torch.compiler.is_compiling() or _pass.number > 0 or current() is not None
    if small or seen or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def untouched(*linears: nn.Module) -> bool:
    """Whether these are linear layers whose weights say all: no adapter in their place, no hook on them."""
    return all(type(m) is nn.Linear and not m._forward_hooks and not m._forward_pre_hooks for m in linears)


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
