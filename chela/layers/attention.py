"""What the attention layers share: heads, rotary positions, and attention without decay as one stage.

Shapes: B batch, L length, D model width, V width over all heads, H heads, Z and E width of a head of keys and values.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.stages import add, blocks, by_hand, cut, gradients, is_small, untouched
from chela.layers.state import Stepwise
from chela.ops.padding import zero_padding, zero_padding_
from chela.ops.sequence_parallel import first_position


class Attended(nn.Identity):
    """What attention gave each position, ``(B, L, …)``: where a probe listens, or puts something else."""


class MultiHead(Stepwise):
    """``[q, k, v] = W x`` per head, and ``h = W_o o``.

    Args:
        d_model: Width D.
        heads: Attention heads H.
        d_value: Width V of queries, keys and values, all heads together; None is D.
        causal: No position sees a later one.

    Raises:
        ValueError: V is no multiple of H.
    """

    rotary = False

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        heads: Annotated[int, {"ge": 1, "le": 256}] = 4,
        d_value: Annotated[int | None, {"ge": 1, "le": 16384}] = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        d_value = d_model if d_value is None else d_value
        if d_value % heads:
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        self.heads, self.d_value, self.causal = heads, d_value, causal
        self.head_width = d_value // heads
        self.qkv = nn.Linear(d_model, 3 * d_value)
        self.out = nn.Linear(d_value, d_model)
        self.attended = Attended()

    def set_rotary(self, rotary: bool) -> None:
        """Say whether ``split`` turns queries and keys by their position, which needs an even width of a head."""
        width = self.head_width
        if rotary and width % 2:
            raise ValueError(f"rotary: expected an even width of a head, got {width}; change d_value or heads")
        self.rotary = rotary

    def split(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x: (..., D)`` to queries, keys and values ``(..., H, Z)``, turned by position if ``rotary``.

        ``start`` is the position of the first token; x is ``(B, L, D)`` if it is turned.
        """
        q, k, v = (rearrange(t, "... (h z) -> ... h z", h=self.heads) for t in columns(self.qkv(x), self.d_value))
        start += first_position()
        return (rotate(q, start), rotate(k, start), v) if self.rotary else (q, k, v)

    def merge(self, o: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map ``o: (..., H, Z)`` to ``(..., D)``, 0 at padding; a system may gate it by the input ``x: (..., D)``."""
        return zero_padding(self.out(o.flatten(-2)), mask)


def columns(x: Tensor, sizes: int | list[int]) -> list[Tensor]:
    """Cut ``x: (..., W)`` into parts of so many columns each, on a CPU into copies.

    SiLU of 20 columns out of 72 takes seven times as long as of rows that follow one another.

    >>> [tuple(part.shape) for part in columns(torch.randn(2, 10, 72), [52, 20])]
    [(2, 10, 52), (2, 10, 20)]
    """
    if x.device.type != "cpu":
        return list(torch.split(x, sizes, dim=-1))
    sizes = [sizes] * (x.shape[-1] // sizes) if isinstance(sizes, int) else sizes
    copies: Any = torch.ops.aten.split_with_sizes_copy.default(x, sizes, -1)
    return list(copies)


def rotate(x: Tensor, start: int = 0, base: float = 10_000.0) -> Tensor:
    """Turn each pair of features, i and i + Z/2, by an angle that grows with the position (arXiv 2104.09864).

    ``x: (B, L, H, Z)`` has an even Z, its first token the position ``start``; the slowest pair turns by about 1/base a
    position. Angles are computed in at least float32.
    """
    length, heads, width = x.shape[1:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rates = base ** (-torch.arange(0, width, 2, device=x.device, dtype=dtype) / width)
    angles = torch.arange(start, start + length, device=x.device, dtype=dtype)[:, None, None] * rates
    # One factor for each number of a record, so that a product is one long loop.
    cos = torch.cat([angles.cos()] * 2, dim=-1).expand(-1, heads, -1).contiguous().to(x.dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).expand(-1, heads, -1).contiguous().to(x.dtype)
    return torch.addcmul(x * cos, x.roll(width // 2, dims=-1), sin)


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
    """N = B·H heads ``(N, L, ·)`` see one state S = Σ k vᵀ ``(B, H, Z, E)``, which is all that tokens tell each other.

    So the backward pass takes a block of tokens at a time, first the queries of all. Where weights are divided by their
    sum one more value is −1, so that a token gets minus that sum.
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
        S = S.view(len(c), -1, *S.shape[1:])
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
        d_c, d_v, d_z, dS = (x.new_empty(x.shape) for x in (c, v, z, S))
        of_project, of_norm, of_features = [], [], ([], [])  # type: ignore[var-annotated]

        def of_queries(at: tuple[slice, slice]) -> Tensor:
            """Add what the block's queries give to the gradients of the state, and to those of ``through``."""
            S_b, dS_b = (x[at[0]].flatten(0, 1) for x in (S, dS))
            y = held[0] if held else _apart(features(z[at], gamma[:1], beta[:1], positive=positive), heads)
            read: Any = held[2:] or _Attend.read(y[0], S_b, gamma, positive)
            raw, total = read
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
            dS_b = dS[at[0]].flatten(0, 1)
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


def _masked(y: Tensor, mask: Tensor | None) -> Tensor:
    """Set the keys, the last of ``y: (·, B, L, H·Z)``, to 0 at padding, in place."""
    zero_padding_(y[-1], mask)
    return y


def _apart(x: Tensor, heads: int) -> Tensor:
    """Return ``x: (…, B, L, H·E)`` by heads, ``(…, B·H, L, E)``."""
    return x if heads == 1 else x.view(*x.shape[:-1], heads, -1).transpose(-3, -2).flatten(-4, -3)


def _together(x: Tensor, heads: int) -> Tensor:
    """Return ``x: (…, B·H, L, E)`` as ``(…, B, L, H·E)``."""
    return x if heads == 1 else x.view(*x.shape[:-3], -1, heads, *x.shape[-2:]).transpose(-3, -2).flatten(-2)
