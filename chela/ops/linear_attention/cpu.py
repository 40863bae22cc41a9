"""The chunked algorithm made fast on a CPU; it runs on any device. Called ``backend="chunked"``.

Here: causal attention with or without decay, and bidirectional attention with decay. Without decay, bidirectional
attention is in ``cpu_undecayed.py``; a short sequence is one chunk, in ``cpu_short.py``. Others are taken segment by
segment (``cpu_segments.py``). The forward pass saves the states at the borders of segments; the backward pass makes all
else again, last segment first.

Shapes: n chunks of C tokens, ``(n, B, H, C, ·)``; states ``(n, B, H, D, E)``, the one that reaches each chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops.linear_attention import cpu_short, cpu_undecayed
from chela.ops.linear_attention.cpu_segments import Edges, Segment, crossing, segments, tokens_per_segment
from chela.ops.linear_attention.operator import Call, Gradients, Outputs, define, edge_gradient
from chela.ops.memory import Workspace, in_huge_pages


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b over all leading axes, as one batched product."""
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
    return out


def accumulate(a: Tensor, b: Tensor, to: Tensor) -> None:
    """Add a @ b."""
    to.view(-1, *to.shape[-2:]).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))


class Walk:
    """The buffers, and the loaded tensors and the edges of the segment at hand."""

    def __init__(self, call: Call, buffer: Workspace, *results: Tensor) -> None:
        self.call, self.buffer = call, buffer
        self.results = results  # the gradient of the output, the output, the normaliser: for a backward pass

    def enter(self, s: Segment) -> None:
        """Go to a segment and load q, k, v and, given ``results``, the gradient of the sums before division."""
        self.s = s
        self.lead = (s.n, s.rows.stop - s.rows.start, self.call.q.shape[2])
        self.q = self.load("q", self.call.q)
        self.k = self.load("k", self.call.k)
        self.v = self.load("v", self.call.v, ones=self.call.ones)
        if not self.results:
            return
        d_out, out, total = self.results
        self.do = self.load("do", d_out, ones=self.call.ones)
        if self.call.normalize:
            dot = self.load("o", out).mul_(self.do[..., :-1]).sum(-1, keepdim=True)
            self.do[..., -1:] = dot.neg_()
            self.do /= s.fill(self.load("total", total.mT[..., None]).add_(self.call.eps), 1)
        elif self.call.ones:
            self.do[..., -1] = 0

    def tokens(self, name: str, width: int) -> Tensor:
        """Return the buffer of that name as ``(n, B, H, C, width)``."""
        return self.buffer(name, *self.lead, self.s.C, width)

    def load(self, name: str, x: Tensor, *, ones: bool = False) -> Tensor:
        """Load the segment of x ``(B, L, H, ·)``."""
        return self.s.load(x, self.tokens(name, x.shape[-1] + ones))

    def states(
        self, name: str, e: Edges, x: Tensor, y: Tensor, carry: Tensor, *, leftward: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the states Σ x yᵀ that reach each chunk over edges e, and the one that leaves the segment.

        x ``(n, B, H, C, D)``, y ``(n, B, H, C, E)``; ``carry`` ``(B, H, D, E)`` is the state that enters the segment.
        """
        borders = self.buffer(name, self.lead[0] + 1, *carry.shape)
        first, last = (-1, 0) if leftward else (0, -1)
        reached, added = (borders[1:], borders[:-1]) if leftward else (borders[:-1], borders[1:])
        borders[first] = carry
        product(e.sent(x, self.tokens("weighted", x.shape[-1]), leftward=leftward).mT, y, added)
        e.carry(borders, leftward=leftward)
        return reached, borders[last]

    def within(self, a: Edges, z: Edges | None) -> Tensor:
        """Return M inside the chunks, ``(n, B, H, C, C)`` or one that broadcasts to it; z is None when causal."""
        M = a.within(self.q)
        # The diagonal is 1 in both directions and counts once: it is taken from the first.
        return M if z is None else M + z.within(self.q).tril(-1).mT


def saved_shape(c: Call) -> tuple[int, ...]:
    """Return the shape of the states at segment borders: from the left and, when bidirectional, from the right."""
    if c.undecayed:
        return c.state_shape
    tokens = tokens_per_segment(c)
    return (1 if c.causal else 2, (c.q.shape[1] + tokens - 1) // tokens, *c.state_shape)


def forward(c: Call) -> Outputs:
    """Return the output, the normaliser, the last state and the states at segment borders."""
    with _workspace(c) as buffer:
        if c.undecayed:
            return cpu_undecayed.forward(c, buffer)
        if cpu_short.suits(c):
            return *cpu_short.forward(c, buffer), c.new(*saved_shape(c)).zero_()  # a shape that depends on L is a guard
        return _forward(c, Walk(c, buffer))


def backward(
    c: Call, d_out: Tensor, d_end: Tensor | None, out: Tensor, total: Tensor, saved: Tensor, decay_grad: bool
) -> Gradients:
    """Return the gradients of q, k, v, both log decays and the first state; empty where there is none."""
    with _workspace(c) as buffer:
        if c.undecayed:
            return cpu_undecayed.backward(c, buffer, d_out, out, total, saved)
        if cpu_short.suits(c):
            return cpu_short.backward(c, buffer, d_out, d_end, out, total, decay_grad)
        return _backward(Walk(c, buffer, d_out, out, total), d_end, saved, decay_grad)


def _workspace(c: Call) -> Workspace:
    return Workspace(c.sum_dtype, c.q.device, buffers_per_block=2 if c.undecayed else 16)


def _forward(c: Call, w: Walk) -> Outputs:
    E = c.v.shape[-1]
    out, total, end = c.new_outputs()
    in_huge_pages(out)
    saved = c.new(*saved_shape(c))
    for block in segments(c):
        rows = block[0].rows
        carry = torch.zeros_like(saved[0, 0, rows])
        if not c.causal:
            for s in reversed(block):
                saved[1, s.index, rows] = carry
                w.enter(s)
                carry = w.states("states", w.s.edges(c, leftward=True), w.k, w.v, carry, leftward=True)[1].clone()
            carry = carry.zero_()
        if c.state is not None:
            carry = c.state[rows].to(saved.dtype)
        for s in block:
            saved[0, s.index, rows] = carry
            w.enter(s)
            o, carry = _segment_output(w, carry, None if c.causal else saved[1, s.index, rows])
            if c.normalize:
                s.store(o[..., E:], total.mT[..., None])
                o[..., :E] /= s.fill(o[..., E:] + c.eps, 1)
            s.store(o[..., :E], out)
        if c.causal:
            end[rows] = carry
    return out, total, end, saved


def _segment_output(w: Walk, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums of the segment at hand ``(n, B, H, C, E + ones)``, and the state that leaves it to the right."""
    a, z = w.s.edges(w.call), None if right is None else w.s.edges(w.call, leftward=True)
    P = product(w.q, w.k.mT, w.tokens("P", w.s.C)).mul_(w.within(a, z))
    o = product(P, w.v, w.tokens("o", w.v.shape[-1]))
    x = w.tokens("weighted", w.q.shape[-1])
    states, end = w.states("states", a, w.k, w.v, left, leftward=False)
    accumulate(a.received(w.q, x, leftward=False), states, o)
    if z is not None and right is not None:
        states, _ = w.states("states back", z, w.k, w.v, right, leftward=True)
        accumulate(z.received(w.q, x, leftward=True), states, o)
    return o, end


def _backward(w: Walk, d_end: Tensor | None, saved: Tensor, decay_grad: bool) -> Gradients:
    c, E = w.call, w.call.v.shape[-1]
    dq, dk, dv, *decays, d_state = c.new_gradients(decay_grad)
    in_huge_pages(dq, dk, dv)
    for block in segments(c):
        rows = block[0].rows
        carry = torch.zeros_like(saved[0, 0, rows])
        lefts: list[Tensor] = []
        if not c.causal:
            # The gradient of what came from the right runs to the right: its states first.
            for s in block:
                lefts.append(carry)
                w.enter(s)
                carry = w.states("gradients", w.s.edges(c, leftward=True), w.q, w.do, carry, leftward=False)[1].clone()
            carry = torch.zeros_like(carry)
        if d_end is not None:
            carry = d_end[rows].to(saved.dtype)
        for s in reversed(block):
            w.enter(s)
            right = None if c.causal else (saved[1, s.index, rows], lefts[s.index])
            carry = _segment_gradient(w, (saved[0, s.index, rows], carry), right, decays if decay_grad else None)
            s.store(w.tokens("dq", c.q.shape[-1]), dq)
            s.store(w.tokens("dk", c.q.shape[-1]), dk)
            s.store(w.tokens("dv", E + c.ones)[..., :E], dv)
        if c.causal:
            d_state[rows] = carry
    return dq, dk, dv, decays[0], decays[1], d_state


Carries = tuple[Tensor, Tensor]


def _segment_gradient(w: Walk, left: Carries, right: Carries | None, decays: list[Tensor] | None) -> Tensor:
    """Write the gradients of the segment at hand to the buffers dq, dk, dv; return that of the state from the left.

    ``left`` and ``right`` are the state that enters from that side, and the gradient of the one that leaves on the
    other. Gradients of the log decays go to ``decays``, where somebody asks for them.
    """
    C, D, E = w.s.C, w.q.shape[-1], w.v.shape[-1]
    a, z = w.s.edges(w.call), None if right is None else w.s.edges(w.call, leftward=True)
    M = w.within(a, z)
    P = product(w.q, w.k.mT, w.tokens("P", C)).mul_(M)
    G = product(w.do, w.v.mT, w.tokens("G", C))
    flow = None if decays is None else torch.mul(P, G, out=w.tokens("flow", C))
    G.mul_(M)
    product(G, w.k, w.tokens("dq", D))
    product(G.mT, w.q, w.tokens("dk", D))
    product(P.mT, w.do, w.tokens("dv", E))
    d_first = _gradient_through_states(w, a, left, flow, decays)
    if z is not None and right is not None:
        _gradient_through_states(w, z, right, flow, decays)
    return d_first


def _gradient_through_states(
    w: Walk, e: Edges, carries: Carries, flow: Tensor | None, decays: list[Tensor] | None
) -> Tensor:
    """Add what reaches the gradients through the states of one direction; return that of the state that enters.

    ``flow`` ``(n, B, H, C, C)`` is what flows from token j to token i inside the chunks.
    """
    D, E = w.q.shape[-1], w.v.shape[-1]
    there, back = e.leftward, not e.leftward  # gradients run against the states
    name = "leftward" if there else "rightward"
    states, _ = w.states(f"states {name}", e, w.k, w.v, carries[0], leftward=there)
    gradients, d_first = w.states(f"gradients {name}", e, w.q, w.do, carries[1], leftward=back)
    accumulate(e.received(w.k, w.tokens("weighted", D), leftward=back), gradients, w.tokens("dv", E))
    dq, dk = w.tokens("dq", D), w.tokens("dk", D)
    if flow is None and e.enter is None:
        accumulate(w.do, states.mT, dq)
        accumulate(w.v, gradients.mT, dk)
        return d_first
    own_dq = product(w.do, states.mT, w.tokens("own dq", D))
    own_dk = product(w.v, gradients.mT, w.tokens("own dk", D))
    dq += e.received(own_dq, own_dq, leftward=there)
    dk += e.received(own_dk, own_dk, leftward=back)
    if flow is not None and decays is not None:
        through = e.across((states * gradients).sum((-1, -2)))
        exchanged = (w.q * own_dq).sum(-1), (w.k * own_dk).sum(-1)
        inside = crossing((flow.mT if there else flow).tril(-1))
        gradient = edge_gradient(inside, *(exchanged[::-1] if there else exchanged), through)
        if w.s.absent is not None:
            gradient = gradient.masked_fill(w.s.absent, 0)
        if decays[there].ndim == 1:
            decays[there] += gradient.sum((0, 1, 3))
        else:
            w.s.store(gradient[..., None], decays[there][..., None])
    return d_first


linear_attention_chunked = define("linear_attention_chunked", forward, backward, saved_shape)
