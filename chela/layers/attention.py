"""CHELA's linear attention: a core of heads, and its bidirectional form as one autograd function.

Shapes: B batch, L length, D model width, V width over all heads, H heads, Z and E width of a head of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chela.layers.param_groups import mark
from chela.layers.stages import add, blocks, gradients, is_small, own_backward, plain_layers, recomputed
from chela.layers.state import State, detached
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step
from chela.ops.padding import zero_padding_
from chela.ops.sequence_parallel import current

EPS = 1e-6
"""Added to the sum of the weights, as by ``linear_attention``."""


class Attended(nn.Identity):
    """The attention's output at each position, ``(B, L, …)``: a module of its own, so that a probe can replace it."""


def columns(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """Split ``x: (..., W)`` into parts of these widths, on a CPU into contiguous copies.

    SiLU of 20 columns out of 72 takes seven times as long as of contiguous rows.

    >>> [tuple(part.shape) for part in columns(torch.randn(2, 10, 72), [52, 20])]
    [(2, 10, 52), (2, 10, 20)]
    """
    if x.device.type != "cpu":
        return list(torch.split(x, sizes, dim=-1))
    return list(torch.ops.aten.split_with_sizes_copy.default(x, sizes, -1))


class Core(nn.Module):
    """Linear attention over values ``SiLU(v: (B, L, W))``, with queries and keys of c, then a norm.

    Queries and keys of a head are one projection, each with its own scale and shift (arXiv 2209.10655, section 3.2): at
    the start equal tokens match, which is what recall is learned from (docs/attention.md). A core that ``pools`` has
    positive weights, divided by their sum; one that does not has signed ones.
    """

    def __init__(self, d_model: int, width: int, heads: int, d_qk: int, *, pools: bool, causal: bool) -> None:
        super().__init__()
        self.width, self.heads, self.d_qk, self.pools, self.causal = width, heads, d_qk, pools, causal
        self.project = nn.Linear(d_model, heads * d_qk)
        self.gamma = nn.Parameter(torch.empty(2, heads, d_qk))
        self.beta = nn.Parameter(torch.empty(2, heads, d_qk))
        mark(self, "gamma", "beta", weight_decay=0.0)
        self.norm = nn.LayerNorm(width)
        self.attended = Attended()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with queries and keys equal to the projection."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, c: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with all of ``c: (B, L, D)``; return ``(B, L, W)``."""
        o, _ = self._attend(c, v, mask)
        return self.attended(o)  # type: ignore[no-any-return]

    def _attend(self, c: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Any]:
        """Return the norm of what the attention gives, ``(B, L, W)``, and the new state if the op's options ask for it.

        Weights that are divided by their sum are kept in float32 under autocast: they are nearly equal, and rounding
        them to bf16 takes a quarter of what tells positions apart.
        """
        if self.pools and torch.is_autocast_enabled(c.device.type):
            with torch.autocast(c.device.type, enabled=False):
                return self._attend(c.float(), v.float(), mask, **options)
        gamma, beta, norm = self.gamma, self.beta, self.norm
        if not self.causal and current() is None and plain_layers(self.project, norm):
            tensors = (c, v, self.project.weight, self.project.bias, gamma, beta, norm.weight, norm.bias)
            if own_backward(*tensors) and c.dtype in (torch.float32, torch.float64):
                return _Attend.apply(*tensors, norm.eps, mask, self.pools), None  # type: ignore[no-untyped-call]

        def op(z: Tensor, v: Tensor, gamma: Tensor, beta: Tensor) -> Any:
            qkv = self._parts(z, v, gamma, beta)
            return linear_attention(*qkv, causal=self.causal, normalize=self.pools, mask=mask, **options)

        found = recomputed(op, self.project(c), v, gamma, beta)
        o, sums = found if options else (found, None)
        return norm(o.flatten(2)), sums

    def _parts(self, z: Tensor, v: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map the projection ``(…, H·Z)`` and values ``(…, W)`` to q, k ``(…, H, Z)`` and v ``(…, H, W / H)``."""
        q, k, v = *features(z, gamma, beta, positive=self.pools), F.silu(v)
        q, k, v = (x.view(*x.shape[:-1], self.heads, -1) for x in (q, k, v))
        return q, k, v

    def start(self, batch: int) -> State:
        """Return the state before the first token: the sums S and z."""
        sizes = batch, self.heads, self.d_qk, self.width // self.heads
        return LinearAttentionState.zeros(*sizes, like=self.norm.weight)._asdict()

    def prefill(self, c: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """Attend with the tokens ``c: (B, L, D)``, ``v: (B, L, W)`` that follow those of ``state``."""
        o, sums = self._attend(c, v, initial_state=LinearAttentionState(**state), return_state=True)
        return self.attended(o), detached(**sums._asdict())

    def step(self, c: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """Attend with one token more, ``c: (B, D)``, ``v: (B, W)``."""
        q, k, v = self._parts(self.project(c), v, self.gamma, self.beta)
        o, sums = linear_attention_step(q, k, v, LinearAttentionState(**state), normalize=self.pools)
        return self.norm(o.flatten(-2)), sums._asdict()


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


class _Attend(torch.autograd.Function):
    """Bidirectional attention: all tokens of a head read one state S = Σ k vᵀ ``(B, H, Z, E)``.

    Tokens exchange nothing else, so the backward pass goes block by block: first the queries of all blocks, which give
    the gradient of S, then keys and values. Heads are N = B·H rows ``(N, L, ·)``. Where weights are divided by their
    sum, values have one more column of −1, which gives minus that sum.
    """

    @staticmethod
    def forward(
        ctx: Any, c: Tensor, v: Tensor, W: Tensor, b: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor,
        bias: Tensor, eps: float, mask: Tensor | None, positive: bool,
    ) -> Tensor:  # fmt: skip
        ctx.positive = positive
        z = F.linear(c, W, b)
        q, k = y = _by_heads(_masked(features(z, gamma, beta, positive=positive), mask), gamma.shape[1])
        values = _Attend.values(v, gamma, positive)
        S = k.mT @ values
        raw, total = _Attend.read(q, S, gamma, positive)
        S = S.view(len(c), -1, *S.shape[1:])
        o, mean, rstd = torch.native_layer_norm(raw, weight.shape, weight, bias, eps)
        saved = (y, values, raw, total) if is_small(c, v, z) else ()
        ctx.save_for_backward(c, v, z, S, mean, rstd, W, gamma, beta, weight, bias, mask, *saved)
        return o

    @staticmethod
    def values(v: Tensor, gamma: Tensor, positive: bool) -> Tensor:
        values = _by_heads(F.silu(v), gamma.shape[1])
        return F.pad(values, (0, 1), value=-1.0) if positive else values

    @staticmethod
    def read(q: Tensor, S: Tensor, gamma: Tensor, positive: bool) -> tuple[Tensor, Tensor | None]:
        """Return the outputs ``(B, L, H·E)``, and the sums of the weights ``(N, L, 1)``."""
        o, total = q @ S, None
        if positive:
            total = EPS - o[..., -1:]
            o = o[..., :-1] / total
        return _merged(o, gamma.shape[1]), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        c, v, z, S, mean, rstd, W, gamma, beta, weight, bias, mask, *saved = ctx.saved_tensors
        (B, L), heads, positive = c.shape[:2], gamma.shape[1], ctx.positive
        d_c, d_v, d_z, dS = (x.new_empty(x.shape) for x in (c, v, z, S))
        of_project, of_norm, of_features = [], [], ([], [])  # type: ignore[var-annotated]

        def queries_backward(at: tuple[slice, slice]) -> Tensor:
            """Add the part of a block's queries to the gradient of S; return the gradient of its features."""
            S_b, dS_b = (x[at[0]].flatten(0, 1) for x in (S, dS))
            y = saved[0] if saved else _by_heads(features(z[at], gamma[:1], beta[:1], positive=positive), heads)
            read: Any = saved[2:] or _Attend.read(y[0], S_b, gamma, positive)
            raw, total = read
            backward = torch.ops.aten.native_layer_norm_backward
            g, *d_norm = backward(d_o[at], raw, weight.shape, mean[at], rstd[at], weight, bias, [True] * 3)
            add(of_norm, *d_norm)
            g = _by_heads(g, heads)
            if positive:  # o = sums / total
                d_sums = g.new_empty(*g.shape[:-1], S.shape[-1])
                torch.div(g, total, out=d_sums[..., :-1])
                torch.div((g * _by_heads(raw, heads)).sum(-1, keepdim=True), total, out=d_sums[..., -1:])
                g = d_sums
            torch.baddbmm(dS_b, y[0].mT, g, beta=float(at[1].start > 0), out=dS_b)
            d = torch.empty_like(y)
            torch.bmm(g, S_b.mT, out=d[0])
            if not saved:
                features_backward(d, y, 0, at)
            return d

        def keys_backward(at: tuple[slice, slice], d: Tensor) -> None:
            """Write a block's gradients of v and c, once those of the state are known."""
            dS_b = dS[at[0]].flatten(0, 1)
            if saved:
                y, values, *_ = saved
            else:
                keys = _masked(features(z[at], gamma[1:], beta[1:], positive=positive), mask, at)
                y = _by_heads(keys, heads)
                values, d = _Attend.values(v[at], gamma, positive), torch.empty_like(y)
            torch.bmm(values, dS_b.mT, out=d[-1])
            d_values = _merged(y[-1] @ dS_b[..., : v.shape[-1] // heads], heads)
            torch.ops.aten.silu_backward.grad_input(d_values, v[at], grad_input=d_v[at])
            features_backward(d, y, 0 if saved else 1, at)
            rows = d_z[at].flatten(0, 1)
            torch.mm(rows, W, out=d_c[at].flatten(0, 1))
            add(of_project, *gradients(rows, c[at].flatten(0, 1)))

        def features_backward(d: Tensor, y: Tensor, first: int, at: tuple[slice, slice]) -> None:
            """Take the gradient of features, ``d: (1 | 2, N, L, Z)``, back to z, γ and β; d is overwritten."""
            side = slice(first, first + len(d))
            if positive:  # elu + 1 has the slope exp(y) = elu(y) + 1 below 0, and 1 above; keys at padding are 0
                d_y = _merged(d.mul_(y.clamp(max=1)), heads)
            else:
                d_y = _merged(d, heads)
                if side.stop == 2:
                    _masked(d_y, mask, None if saved else at)
                torch.ops.aten.silu_backward.grad_input(d_y, scaled(z[at], gamma[side], beta[side]), grad_input=d_y)
            if first == 0:
                torch.mul(d_y[0], gamma[0].flatten(), out=d_z[at])
            if side.stop == 2:
                d_z[at].addcmul_(d_y[-1], gamma[1].flatten())
            add(of_features[first], (d_y * z[at]).sum((1, 2)), d_y.sum((1, 2)))

        parts = blocks(B, L, small=bool(saved))
        for at in parts:
            d = queries_backward(at)
        for at in parts:
            keys_backward(at, d)
        of_gamma_beta = of_features[0] if saved else map(torch.cat, zip(*of_features, strict=True))
        return d_c, d_v, *of_project, *(x.view_as(gamma) for x in of_gamma_beta), *of_norm, None, None, None


def _masked(y: Tensor, mask: Tensor | None, at: Any = None) -> Tensor:
    """Set the keys, the last of ``y: (·, B, L, H·Z)``, to 0 at padding, in place; all of them, or those of a block."""
    zero_padding_(y[-1], mask if mask is None or at is None else mask[at])
    return y


def _by_heads(x: Tensor, heads: int) -> Tensor:
    """Return ``x: (…, B, L, H·E)`` by heads, ``(…, B·H, L, E)``."""
    return x if heads == 1 else x.view(*x.shape[:-1], heads, -1).transpose(-3, -2).flatten(-4, -3)


def _merged(x: Tensor, heads: int) -> Tensor:
    """Return ``x: (…, B·H, L, E)`` as ``(…, B, L, H·E)``."""
    return x if heads == 1 else x.view(*x.shape[:-3], -1, heads, *x.shape[-2:]).transpose(-3, -2).flatten(-2)
