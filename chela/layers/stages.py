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
    """Tokens are N rows ``(N, ·)``; the backward pass takes a block of them at a time, so that little is made at once.

    Gradients take the place of what was held, of which nobody else knows; a second backward pass makes it once more.
    """

    @staticmethod
    def forward(ctx: Any, o: Tensor, c: Tensor, x: Tensor, mask: Tensor | None, *weights: Tensor) -> Tensor:
        r, h, u = held = _Gate.made(o, c, *weights)
        ctx.save_for_backward(o, c, x, mask, *weights, *held)
        ctx.spent = False
        return zero_padding_(F.silu(h).sub_(x).mul_(torch.sigmoid(u)), mask)

    @staticmethod
    def made(
        o: Tensor, c: Tensor, W_r: Tensor, b_r: Tensor, W_o: Tensor, b_o: Tensor, W_h: Tensor, b_h: Tensor,
        W_u: Tensor, b_u: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        r, u = F.linear(c, W_r, b_r), F.linear(c, W_u, b_u)
        h = F.linear(F.silu(r).mul_(o), W_o, b_o + b_h)
        h.view(-1, h.shape[-1]).addmm_(c.flatten(0, -2), W_h.mT)
        return r, h, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        o, c, x, mask, *weights, r, h, u = ctx.saved_tensors
        W_r, _, W_o, _, W_h, _, W_u, _ = weights
        r, h, u = _Gate.made(o, c, *weights) if ctx.spent else (t.data for t in (r, h, u))
        ctx.spent = True
        rows = [t.reshape(-1, t.shape[-1]) for t in (zero_padding(d_y, mask), o, c, x, r, h, u)]

        def of(at: slice) -> tuple[Tensor, ...]:
            """Write a block's gradients of o, c and x to r, h and u; return those of the weights."""
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
            add(total, *of(at))
        d_W_r, d_b_r, d_W_o, d_b, d_W_h, d_W_u, d_b_u = total
        return r, h, u, None, d_W_r, d_b_r, d_W_o, d_b, d_W_h, d_b, d_W_u, d_b_u


def features(z: Tensor, gamma: Tensor, beta: Tensor, *, positive: bool) -> Tensor:
    """Return queries and keys ``φ(γ ⊙ z + β)``, ``(2, …, H·Z)``.

    Args:
        z: The projection ``(…, H·Z)``.
        gamma: Scales of queries and of keys, ``(2, H, Z)``.
        beta: Shifts of queries and of keys, ``(2, H, Z)``.
        positive: φ is elu + 1, else SiLU.
    """
    y, in_place = scaled(z, gamma, beta), not torch.is_grad_enabled()
    return F.elu(y, inplace=in_place).add_(1) if positive else F.silu(y, inplace=in_place)


def scaled(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Return ``γ ⊙ z + β``, as in ``features``; of queries or keys alone by one γ and β, ``(1, H, Z)``."""
    gamma, beta = (x.view(len(x), *[1] * (z.ndim - 1), -1) for x in (gamma, beta))
    return torch.addcmul(beta, z, gamma)


def attend(
    c: Tensor,
    v: Tensor,
    mask: Tensor | None,
    project: nn.Linear,
    gamma: Tensor,
    beta: Tensor,
    norm: nn.LayerNorm,
    positive: bool,
) -> Tensor | None:
    """Return the norm of bidirectional linear attention of the features of ``project(c)`` over values ``SiLU(v)``.

    It is ``linear_attention`` without decay, normalised if ``positive``; what it gives at padding means nothing. None
    where a stage does not take its own backward pass.

    Args:
        c: ``(B, L, D)``.
        v: ``(B, L, H·E)``.
        mask: True = real token.
        project: D → H·Z.
        gamma: As in ``features``.
        beta: As in ``features``.
        norm: Of all heads together.
        positive: As in ``features``.
    """
    if not untouched(project, norm):
        return None
    tensors = (c, v, project.weight, project.bias, gamma, beta, norm.weight, norm.bias)
    if not by_hand(*tensors) or c.dtype not in (torch.float32, torch.float64):
        return None
    return _Attend.apply(*tensors, norm.eps, mask, positive)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    """N = B·H heads ``(N, L, ·)`` see one state S = Σ k vᵀ ``(N, Z, E)``, which is all that tokens tell each other.

    Where weights are divided by their sum one more value is −1, so that a token gets minus that sum.
    """

    @staticmethod
    def forward(
        ctx: Any, c: Tensor, v: Tensor, W: Tensor, b: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor,
        bias: Tensor, eps: float, mask: Tensor | None, positive: bool,
    ) -> Tensor:  # fmt: skip
        ctx.positive = positive
        z = F.linear(c, W, b)
        q, k = y = _apart(_masked(features(z, gamma, beta, positive=positive), mask), gamma.shape[1])
        values = _Attend.values(v, gamma, positive)
        S = k.mT @ values
        raw, total = _Attend.read(q, S, gamma, positive)
        o, mean, rstd = torch.native_layer_norm(raw, weight.shape, weight, bias, eps)
        held = (y, values, raw, total) if is_small(c, v, z) else ()
        ctx.save_for_backward(c, v, z, S, mean, rstd, W, gamma, beta, weight, bias, mask, *held)
        return o

    @staticmethod
    def values(v: Tensor, gamma: Tensor, positive: bool) -> Tensor:
        values = _apart(F.silu(v), gamma.shape[1])
        return F.pad(values, (0, 1), value=-1.0) if positive else values

    @staticmethod
    def read(q: Tensor, S: Tensor, gamma: Tensor, positive: bool) -> tuple[Tensor, Tensor | None]:
        """Return what tokens get ``(B, L, H·E)``, and the sum of their weights ``(N, L, 1)``."""
        o, total = q @ S, None
        if positive:
            total = EPS - o[..., -1:]
            o = o[..., :-1] / total
        return _together(o, gamma.shape[1]), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        c, v, z, S, mean, rstd, W, gamma, beta, weight, bias, mask, *held = ctx.saved_tensors
        (B, L), heads, positive = c.shape[:2], gamma.shape[1], ctx.positive
        d_c, d_v, d_z, dS = torch.empty_like(c), torch.empty_like(v), torch.empty_like(z), torch.empty_like(S)
        of_project, of_norm, of_features = [], [], ([], [])  # type: ignore[var-annotated]

        def by_sequence(S: Tensor, at: tuple[slice, slice]) -> Tensor:
            return S.view(B, heads, *S.shape[1:])[at[0]].flatten(0, 1)

        def of_queries(at: tuple[slice, slice]) -> Tensor:
            """Add what the block's queries give to the gradients of the state, and to those of ``through``."""
            S_b, dS_b = by_sequence(S, at), by_sequence(dS, at)
            y = held[0] if held else _apart(features(z[at], gamma[:1], beta[:1], positive=positive), heads)
            raw, total = held[2:] or _Attend.read(y[0], S_b, gamma, positive)
            backward = torch.ops.aten.native_layer_norm_backward
            g, *d_norm = backward(d_o[at], raw, weight.shape, mean[at], rstd[at], weight, bias, [True] * 3)
            add(of_norm, *d_norm)
            g = _apart(g, heads)
            if positive:  # o = sums / total
                d_sums = g.new_empty(*g.shape[:-1], S.shape[-1])
                torch.div(g, total, out=d_sums[..., :-1])
                torch.div((g * _apart(raw, heads)).sum(-1, keepdim=True), total, out=d_sums[..., -1:])
                g = d_sums
            torch.baddbmm(dS_b, y[0].mT, g, beta=float(at[1].start > 0), out=dS_b)
            d = torch.empty_like(y)
            torch.bmm(g, S_b.mT, out=d[0])
            if not held:
                through(d, y, 0, at)
            return d

        def of_keys(at: tuple[slice, slice], d: Tensor) -> None:
            """Write a block's gradients of v and c, once those of the state are known."""
            dS_b = by_sequence(dS, at)
            if held:
                y, values, *_ = held
            else:
                y = _apart(_masked(features(z[at], gamma[1:], beta[1:], positive=positive), cut(mask, at)), heads)
                values, d = _Attend.values(v[at], gamma, positive), torch.empty_like(y)
            torch.bmm(values, dS_b.mT, out=d[-1])
            d_values = _together(y[-1] @ dS_b[..., : v.shape[-1] // heads], heads)
            torch.ops.aten.silu_backward.grad_input(d_values, v[at], grad_input=d_v[at])
            through(d, y, 0 if held else 1, at)
            rows = d_z[at].flatten(0, 1)
            torch.mm(rows, W, out=d_c[at].flatten(0, 1))
            add(of_project, *gradients(rows, c[at].flatten(0, 1)))

        def through(d: Tensor, y: Tensor, first: int, at: tuple[slice, slice]) -> None:
            """Add to the gradients what those of features ``d: (1 | 2, N, L, Z)`` give; it is overwritten."""
            side = slice(first, first + len(d))
            if positive:  # elu + 1 has the slope exp(y) = elu(y) + 1 below 0, and 1 above; keys at padding are 0
                d_y = _together(d.mul_(y.clamp(max=1)), heads)
            else:
                d_y = _together(d, heads)
                if side.stop == 2:
                    _masked(d_y, mask if held else cut(mask, at))
                torch.ops.aten.silu_backward.grad_input(d_y, scaled(z[at], gamma[side], beta[side]), grad_input=d_y)
            if first == 0:
                torch.mul(d_y[0], gamma[0].flatten(), out=d_z[at])
            if side.stop == 2:
                d_z[at].addcmul_(d_y[-1], gamma[1].flatten())
            add(of_features[first], (d_y * z[at]).sum((1, 2)), d_y.sum((1, 2)))

        parts = blocks(B, L, small=bool(held))
        for at in parts:
            d = of_queries(at)
        for at in parts:
            of_keys(at, d)
        of_gamma_beta = of_features[0] if held else map(torch.cat, zip(*of_features, strict=True))
        return d_c, d_v, *of_project, *(x.view_as(gamma) for x in of_gamma_beta), *of_norm, None, None, None


EPS = 1e-6
"""Added to the sum of the weights, as by ``linear_attention``."""

ROWS = 1024
"""Tokens of a block, where inputs are not small."""


def is_small(*inputs: Tensor) -> bool:
    """Whether what is made of the inputs of a stage is held."""
    return sum(x.numel() for x in inputs) < SMALL_ELEMENTS


def blocks(batch: int, length: int, *, small: bool) -> list[tuple[slice, slice]]:
    """Cut B sequences of L tokens into blocks of some sequences or of a piece of one; a small batch is one block."""
    if small:
        return [(slice(0, batch), slice(0, length))]
    rows, tokens = max(1, ROWS // length), min(length, ROWS)
    return [(slice(b, b + rows), slice(t, t + tokens)) for b in range(0, batch, rows) for t in range(0, length, tokens)]


def cut(mask: Tensor | None, at: tuple[slice, slice]) -> Tensor | None:
    return None if mask is None else mask[at]


def _masked(y: Tensor, mask: Tensor | None) -> Tensor:
    """Set the keys, the last of ``y: (·, B, L, H·Z)``, to 0 at padding, in place."""
    zero_padding_(y[-1], mask)
    return y


def add(total: list[Tensor], *parts: Tensor) -> None:
    """Add the parts to the total in place; the first ones become it."""
    for sum_so_far, part in zip(total, parts, strict=False):
        sum_so_far.add_(part)
    total.extend(parts[len(total) :])


def _apart(x: Tensor, heads: int) -> Tensor:
    """Return ``x: (…, B, L, H·E)`` by heads, ``(…, B·H, L, E)``."""
    return x if heads == 1 else x.unflatten(-1, (heads, -1)).transpose(-3, -2).flatten(-4, -3)


def _together(x: Tensor, heads: int) -> Tensor:
    """Return ``x: (…, B·H, L, E)`` as ``(…, B, L, H·E)``."""
    return x if heads == 1 else x.unflatten(-3, (-1, heads)).transpose(-3, -2).flatten(-2)


def gradients(d_y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight and bias that made rows ``y: (N, ·)`` of ``x: (N, ·)``."""
    return d_y.mT @ x, d_y.sum(0)


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Return ``function(*inputs)``, of which autograd holds the inputs alone and computes the rest once more.

    Small inputs are not worth it. A block that is computed twice as a whole, a compiler, and processes that share a
    sequence must see what the function does.
    """
    seen = torch.compiler.is_compiling() or _pass.number > 0 or current() is not None
    if is_small(*inputs) or seen or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def untouched(*linears: nn.Module) -> bool:
    """Whether the weights of these layers say all: no adapter is in their place, no hook on them."""
    return all(type(m) in (nn.Linear, nn.LayerNorm) and not m._forward_hooks and not m._forward_pre_hooks for m in linears)


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
