"""The chunked algorithm, segment by segment: causal of any decay, and bidirectional with decay.

Shapes: n chunks of C tokens, `(n, B, H, C, ·)`; states `(n + 1, B, H, D, E)`, one per chunk border. A state that
runs left to right is a prefix, one that runs right to left a suffix. `a` are the edges that a prefix of k vᵀ crosses,
`z` those that a suffix of k vᵀ crosses; gradients run the other way over the same edges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops.linear_attention.edges import Edges, crossing, edge_gradient, edges
from chela.ops.linear_attention.op import Gradients, Problem
from chela.ops.linear_attention.segments import Segment, chunk_tokens, chunks_per_segment, segments
from chela.ops.memory import Workspace, in_huge_pages


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b over all leading axes, as one batched product."""
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
    return out


def accumulate(a: Tensor, b: Tensor, to: Tensor) -> None:
    """Add a @ b."""
    to.view(-1, *to.shape[-2:]).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))


class Walk:
    """The buffers and the loaded tensors of the segment at hand."""

    def __init__(self, problem: Problem, buffer: Workspace) -> None:
        self.p = problem
        self.buffer = buffer

    def enter(self, s: Segment) -> None:
        """Go to a segment: load q, k and v, and take its edges."""
        self.s = s
        self.lead = (s.n, s.rows.stop - s.rows.start, self.p.q.shape[2])
        self.q = self.load("q", self.p.q)
        self.k = self.load("k", self.p.k)
        self.v = self.load("v", self.p.v, ones=self.p.ones)

    def edges(self, log_decay: Tensor | None) -> Edges:
        """Return the edges of the segment at hand."""
        return edges(log_decay, self.s, self.buffer.dtype, self.buffer.device)

    def tokens(self, name: str, width: int) -> Tensor:
        """Return the buffer of that name as `(n, B, H, C, width)`."""
        return self.buffer(name, *self.lead, self.s.C, width)

    def load(self, name: str, x: Tensor, *, ones: bool = False) -> Tensor:
        """Load the segment of x `(B, L, H, ·)`."""
        return self.s.load(x, self.tokens(name, x.shape[-1] + ones))

    def prefix(self, name: str, weighted_k: Tensor, v: Tensor, e: Edges, carry: Tensor) -> Tensor:
        """Return the states at all borders, coming from the left, of the outer products k vᵀ."""
        states = self.buffer(name, self.lead[0] + 1, *carry.shape)
        states[0] = carry
        product(weighted_k.mT, v, states[1:])
        return e.carry(states)

    def suffix(self, name: str, weighted_k: Tensor, v: Tensor, e: Edges, carry: Tensor) -> Tensor:
        """Return the states at all borders, coming from the right."""
        states = self.buffer(name, self.lead[0] + 1, *carry.shape)
        states[-1] = carry
        product(weighted_k.mT, v, states[:-1])
        return e.carry(states, reverse=True)


def intra(a: Edges, z: Edges | None, x: Tensor) -> Tensor:
    """Return M inside the chunks of x, `(n, B, H, C, C)` or one that broadcasts to it; z is None when causal."""
    M = a.within(x)
    # The diagonal is 1 in both directions and counts once: it is taken from the first.
    return M if z is None else M + z.within(x).tril(-1).mT


def tokens_per_chunk(p: Problem) -> int:
    """Return C: what the caller asked for, or what suits the widths."""
    return p.chunk or chunk_tokens(p.q.shape[-1], p.v.shape[-1])


def saved_shape(p: Problem) -> tuple[int, ...]:
    """Return the shape of the states at segment borders: from the left and, when bidirectional, from the right."""
    _, L, H, D = p.q.shape
    chunk = tokens_per_chunk(p)
    tokens = chunks_per_segment(H, D, p.v.shape[-1], chunk) * chunk
    return (1 if p.causal else 2, (L + tokens - 1) // tokens, *p.state_shape)


def forward(p: Problem, buffer: Workspace, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the normaliser, the last state and the states at segment borders."""
    E = p.v.shape[-1]
    out, total, end = p.new_outputs()
    in_huge_pages(out)
    saved = p.new(*saved_shape(p))
    walk = Walk(p, buffer)
    for block in segments(p.q, p.v.shape[-1], tokens_per_chunk(p), p.mask):
        rows = block[0].rows
        carry = torch.zeros_like(saved[0, 0, rows])
        if not p.causal:
            for s in reversed(block):
                saved[1, s.index, rows] = carry
                walk.enter(s)
                z = walk.edges(p.log_decay_back)
                carry = walk.suffix("after", z.entering(walk.k), walk.v, z, carry)[0].clone()
            carry = carry.zero_()
        if state is not None:
            carry = state[rows].to(saved.dtype)
        for s in block:
            saved[0, s.index, rows] = carry
            walk.enter(s)
            o, carry = _segment_output(walk, carry, None if p.causal else saved[1, s.index, rows])
            if p.normalize:
                s.store(o[..., E:], total.mT[..., None])
                o[..., :E] /= s.fill(o[..., E:] + p.eps, 1)
            s.store(o[..., :E], out)
        if p.causal:
            end[rows] = carry
    return out, total, end, saved


def _segment_output(w: Walk, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums of the segment at hand `(n, B, H, C, E + ones)`, and the state that leaves it to the right."""
    C, D, E = w.s.C, w.q.shape[-1], w.v.shape[-1]
    a = w.edges(w.p.log_decay)
    z = None if right is None else w.edges(w.p.log_decay_back)
    P = product(w.q, w.k.mT, w.tokens("P", C)).mul_(intra(a, z, w.q))
    o = product(P, w.v, w.tokens("o", E))
    x = w.tokens("weighted", D)
    before = w.prefix("before", a.leaving(w.k, x), w.v, a, left)
    accumulate(a.entering(w.q, x), before[:-1], o)
    if z is not None and right is not None:
        after = w.suffix("after", z.entering(w.k, x), w.v, z, right)
        accumulate(z.leaving(w.q, x), after[1:], o)
    return o, before[-1]


class BackwardWalk(Walk):
    """A walk that also holds the gradient of the sums, before division, of the segment at hand."""

    def __init__(self, problem: Problem, buffer: Workspace, d_out: Tensor, out: Tensor, total: Tensor) -> None:
        super().__init__(problem, buffer)
        self.d_out, self.out, self.total = d_out, out, total

    def enter(self, s: Segment) -> None:
        """Go to a segment and load what its gradients need."""
        super().enter(s)
        p = self.p
        self.do = self.load("do", self.d_out, ones=p.ones)
        if p.normalize:
            dot = self.load("o", self.out).mul_(self.do[..., :-1]).sum(-1, keepdim=True)
            self.do[..., -1:] = dot.neg_()
            self.do /= s.fill(self.load("total", self.total.mT[..., None]).add_(p.eps), 1)
        elif p.ones:
            self.do[..., -1] = 0


def backward(
    p: Problem,
    buffer: Workspace,
    d_out: Tensor,
    d_end: Tensor | None,
    out: Tensor,
    total: Tensor,
    saved: Tensor,
    decay_grad: bool,
) -> Gradients:
    """Return the gradients of q, k, v, log_decay, log_decay_back and the initial state; empty where there is none."""
    E = p.v.shape[-1]
    dq, dk, dv, *decays, d_state = p.new_gradients(decay_grad)
    in_huge_pages(dq, dk, dv)
    walk = BackwardWalk(p, buffer, d_out, out, total)
    for block in segments(p.q, p.v.shape[-1], tokens_per_chunk(p), p.mask):
        rows = block[0].rows
        carry = torch.zeros_like(saved[0, 0, rows])
        lefts: list[Tensor] = []
        if not p.causal:
            # The gradient of what came from the right runs to the right: its states first.
            for s in block:
                lefts.append(carry)
                walk.enter(s)
                z = walk.edges(p.log_decay_back)
                carry = walk.prefix("d_before", z.leaving(walk.q), walk.do, z, carry)[-1].clone()
            carry = torch.zeros_like(carry)
        if d_end is not None:
            carry = d_end[rows].to(saved.dtype)
        for s in reversed(block):
            walk.enter(s)
            right = None if p.causal else (saved[1, s.index, rows], lefts[s.index])
            carry = _segment_gradient(walk, (saved[0, s.index, rows], carry), right, decays if decay_grad else None)
            s.store(walk.tokens("dq", p.q.shape[-1]), dq)
            s.store(walk.tokens("dk", p.q.shape[-1]), dk)
            s.store(walk.tokens("dv", E + p.ones)[..., :E], dv)
        if p.causal:
            d_state[rows] = carry
    return dq, dk, dv, decays[0], decays[1], d_state


def _segment_gradient(
    w: BackwardWalk, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor] | None, decays: list[Tensor] | None
) -> Tensor:
    """Write the gradients of the segment at hand to the buffers dq, dk, dv.

    Args:
        w: The walk.
        left: The state that enters from the left, and the gradient of the one that leaves to the right.
        right: The state that enters from the right, and the gradient of the one that leaves to the left.
        decays: Where the gradients of the log decays go; None when nobody asks for them.

    Returns:
        The gradient of the state that enters from the left.
    """
    C, D, E = w.s.C, w.q.shape[-1], w.v.shape[-1]
    a = w.edges(w.p.log_decay)
    z = None if right is None else w.edges(w.p.log_decay_back)
    M = intra(a, z, w.q)
    P = product(w.q, w.k.mT, w.tokens("P", C)).mul_(M)
    G = product(w.do, w.v.mT, w.tokens("G", C))
    flow = None if decays is None else torch.mul(P, G, out=w.tokens("flow", C))
    G.mul_(M)
    dq = product(G, w.k, w.tokens("dq", D))
    dk = product(G.mT, w.q, w.tokens("dk", D))
    product(P.mT, w.do, w.tokens("dv", E))

    x = w.tokens("weighted", D)
    before = w.prefix("before", a.leaving(w.k, x), w.v, a, left[0])
    d_after = w.suffix("d_after", a.entering(w.q, x), w.do, a, left[1])
    accumulate(a.leaving(w.k, x), d_after[1:], w.tokens("dv", E))
    if flow is None and a.enter is None:
        accumulate(w.do, before[:-1].mT, dq)
        accumulate(w.v, d_after[1:].mT, dk)
        return d_after[0]
    dq_a = product(w.do, before[:-1].mT, w.tokens("dq_inter", D))
    dk_a = product(w.v, d_after[1:].mT, w.tokens("dk_inter", D))
    dq_a, dk_a = a.entering(dq_a, dq_a), a.leaving(dk_a, dk_a)
    dq += dq_a
    dk += dk_a
    if flow is not None and decays is not None:
        through = a.across((before[:-1] * d_after[1:]).sum((-1, -2)))
        g = edge_gradient(crossing(flow.tril(-1)), (w.q * dq_a).sum(-1), (w.k * dk_a).sum(-1), through)
        add_edge_gradient(w.s, g, decays[0])
    if z is None or right is None:
        return d_after[0]

    after = w.suffix("after", z.entering(w.k, x), w.v, z, right[0])
    d_before = w.prefix("d_before", z.leaving(w.q, x), w.do, z, right[1])
    accumulate(z.entering(w.k, x), d_before[:-1], w.tokens("dv", E))
    dq_z = product(w.do, after[1:].mT, w.tokens("dq_inter", D))
    dk_z = product(w.v, d_before[:-1].mT, w.tokens("dk_inter", D))
    dq_z, dk_z = z.leaving(dq_z, dq_z), z.entering(dk_z, dk_z)
    dq += dq_z
    dk += dk_z
    if flow is not None and decays is not None:
        through = z.across((after[1:] * d_before[:-1]).sum((-1, -2)))
        g = edge_gradient(crossing(flow.triu(1).mT), (w.k * dk_z).sum(-1), (w.q * dq_z).sum(-1), through)
        add_edge_gradient(w.s, g, decays[1])
    return d_after[0]


def add_edge_gradient(s: Segment, gradient: Tensor, to: Tensor) -> None:
    """Put the gradient `(n, B, H, C)` of a segment's edges into that of `(H,)` or `(B, L, H)` log decays."""
    if s.absent is not None:
        gradient = gradient.masked_fill(s.absent, 0)
    if to.ndim == 1:
        to += gradient.sum((0, 1, 3))
    else:
        s.store(gradient[..., None], to[..., None])
