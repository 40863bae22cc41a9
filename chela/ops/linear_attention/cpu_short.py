"""Linear attention over a short sequence: its L × L weights, as the definition has them, a few batch rows at a time.

Up to a hundred or two tokens this takes half the time of chunks with states at their borders.

Shapes: R batch rows at hand, N = R·H; what all rows have in common has a leading axis of 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chela.ops.linear_attention.operator import Call, Gradients
from chela.ops.linear_attention.reference import lowest_log_decay
from chela.ops.memory import Workspace

LONGEST = {True: 96, False: 192}
"""Most tokens when causal, and when not: in both directions chunks need twice as many states."""
SLICE_ELEMENTS = 2**18
"""Weights that are worked on at once, so that they stay in the cache: 1 MiB of float32."""


def suits(c: Call) -> bool:
    """Return whether this is the way: few tokens, no first state, and at most one decay a head."""
    few = not c.chunk and c.q.shape[1] <= LONGEST[c.causal]
    return few and c.state is None and (c.log_decay is None or c.log_decay.ndim == 1)


class Rows:
    """The batch rows at hand, heads apart; absent tokens are 0."""

    def __init__(self, c: Call, rows: slice, lags: Tensor, buffer: Workspace) -> None:
        self.rows, self.buffer, self.heads = rows, buffer, c.q.shape[2]
        self.absent = None if c.mask is None else ~c.mask[rows, None, :, None]
        self.lags = lags if len(lags) == 1 else lags[rows]
        self.q, self.k, self.v = self.load("q", c.q), self.load("k", c.k), self.load("v", c.v)

    def load(self, name: str, x: Tensor) -> Tensor:
        """Return these rows of x ``(B, L, H, ·)`` as ``(N, L, ·)``."""
        mine = x[self.rows].transpose(1, 2)
        return self.fill(self.buffer(name, *mine.shape).copy_(mine).flatten(0, 1), 0)

    def store(self, y: Tensor, x: Tensor) -> None:
        """Put y ``(N, L, ·)`` in its place in x ``(B, L, H, ·)``."""
        x[self.rows] = self.by_head(y).transpose(1, 2)

    def fill(self, y: Tensor, value: float) -> Tensor:
        """Set y ``(N, L, ·)`` to a value where tokens are absent, in place."""
        if self.absent is not None:
            self.by_head(y).masked_fill_(self.absent, value)
        return y

    def by_head(self, y: Tensor) -> Tensor:
        """Return y ``(N, …)`` seen as ``(R, H, …)``."""
        return y.view(-1, self.heads, *y.shape[1:])

    def products(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Return a bᵀ ``(N, L, L)``."""
        return torch.bmm(a, b.mT, out=self.buffer(name, len(a), a.shape[1], b.shape[1]))

    def to_end(self, rates: list[Tensor]) -> Tensor:
        """Return the decay from each token to the last, ``(1 | R, 1 | H, L, 1)``."""
        return _decay(self.lags[:, -1:].mT, rates[:1]).to(self.buffer.dtype)


def _rows(c: Call, buffer: Workspace, rates: list[Tensor]) -> Iterator[tuple[Rows, Tensor]]:
    """Go through the batch; give some rows and their weights M ``(1 | R, 1 | H, L, L)``."""
    B, L, H, _ = c.q.shape
    step = max(1, SLICE_ELEMENTS // (H * L * L))
    lags, M = _lags(c), torch.empty(0)
    for start in range(0, B, step):
        x = Rows(c, slice(start, min(start + step, B)), lags, buffer)
        if start == 0 or len(lags) > 1:
            M = _decay(x.lags, rates[:1]).tril_()
            if not c.causal:  # the diagonal is 1 in both directions and counts once
                M += _decay(-x.lags, rates[1:]).triu_(1)
            M = M.to(c.sum_dtype)
        yield x, M


def _lags(c: Call) -> Tensor:
    """Return how many real tokens i lies behind j, ``(1 | B, L, L)`` float64."""
    at = torch.arange(c.q.shape[1], dtype=torch.float64, device=c.q.device)[None]
    if c.mask is not None and not bool((c.mask[:, 1:] <= c.mask[:, :-1]).all()):  # absent are not the last ones alone
        at = c.mask.double().cumsum(-1)
    return at[:, :, None] - at[:, None, :]


def _rates(c: Call) -> list[Tensor]:
    """Return log λ ``(H, 1, 1)`` rightward and leftward, as far as there are, float64 and finite."""
    given = [x for x in (c.log_decay, c.log_decay_back) if x is not None]
    return [x.detach().double().clamp(min=lowest_log_decay(c.sum_dtype))[:, None, None] for x in given]


def _decay(lags: Tensor, rates: list[Tensor]) -> Tensor:
    """Return the decay ``(1 | R, 1 | H, …)`` over lags ``(1 | R, …)``; over those below 0 it is 1."""
    lags = lags.clamp(min=0)[:, None]
    return (lags * rates[0]).exp_() if rates else torch.ones_like(lags)


def forward(c: Call, buffer: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the normaliser and the last state."""
    E, rates = c.v.shape[-1], _rates(c)
    out, total, end = c.new_outputs()
    for x, M in _rows(c, buffer, rates):
        P = x.products("P", x.q, x.k)
        x.by_head(P).mul_(M)
        o = torch.bmm(P, x.v)
        if c.normalize:
            sums = P.sum(-1, keepdim=True)
            x.store(sums, total.mT[..., None])
            o /= x.fill(sums.add_(c.eps), 1)
        x.store(o, out)
        if c.causal:
            x.by_head(x.k).mul_(x.to_end(rates))
            end[x.rows, ..., :E] = x.by_head(x.k.mT @ x.v)
            if c.ones:
                end[x.rows, ..., E] = x.by_head(x.k.sum(1))
    return out, total, end


def backward(
    c: Call, buffer: Workspace, d_out: Tensor, d_end: Tensor | None, out: Tensor, total: Tensor, decay_grad: bool
) -> Gradients:
    """Return the gradients of q, k, v and both log decays; there is no first state, and its gradient is 0."""
    rates = _rates(c)
    dq, dk, dv, *decays, d_state = c.new_gradients(decay_grad)
    d_state.zero_()
    for x, M in _rows(c, buffer, rates):
        do = x.load("do", d_out)
        if c.normalize:
            do /= x.fill(x.load("total", total.mT[..., None]).add_(c.eps), 1)
        P, G = x.products("P", x.q, x.k), x.products("G", do, x.v)
        x.by_head(P).mul_(M)
        if c.normalize:
            G -= (do * x.load("out", out)).sum(-1, keepdim=True)
        if decay_grad:
            flow = x.by_head(P * G).mul_(x.lags[:, None])
            decays[0] += flow.tril().sum((0, 2, 3))
            if not c.causal:
                decays[1] -= flow.triu().sum((0, 2, 3))
        x.by_head(G).mul_(M)
        x.store(torch.bmm(G, x.k), dq)
        of_k, of_v = torch.bmm(G.mT, x.q), torch.bmm(P.mT, do)
        if d_end is not None:
            of_decay = _add_gradient_of_end(c, x, rates, d_end[x.rows].to(c.sum_dtype).flatten(0, 1), of_k, of_v)
            if decay_grad:
                decays[0] += of_decay
        x.store(x.fill(of_k, 0), dk)
        x.store(of_v, dv)
    return dq, dk, dv, decays[0], decays[1], d_state


def _add_gradient_of_end(c: Call, x: Rows, rates: list[Tensor], d_end: Tensor, of_k: Tensor, of_v: Tensor) -> Tensor:
    """Add what reaches k and v through the last state, given its gradient ``(N, D, E + ones)``; return the decay's."""
    E, kept = c.v.shape[-1], x.to_end(rates)
    of_weighted = x.v @ d_end[..., :E].mT
    if c.ones:
        of_weighted += d_end[..., E][:, None]
    x.by_head(x.k).mul_(kept)
    of_v.baddbmm_(x.k, d_end[..., :E])
    flow = (x.k * of_weighted).sum(-1)
    x.by_head(of_weighted).mul_(kept)
    of_k += of_weighted
    return (x.by_head(flow) * x.lags[:, None, -1].clamp(min=0)).sum((0, 2))
