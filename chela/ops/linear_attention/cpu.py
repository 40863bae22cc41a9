"""The chunked algorithm made fast on a CPU; it runs on any device. Called ``backend="chunked"``.

Here: causal attention with or without decay, and bidirectional attention with decay; without, it is
``attend_undecayed``. It is taken segment by segment (``cpu_segments.py``); a short sequence is one chunk, without
states. The forward pass saves the states at the borders of segments; the backward pass makes all else again, last
segment first.

Shapes: n chunks of C tokens, ``(n, B, H, C, ·)``; states ``(n, B, H, D, E)``, the one that reaches each chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from chela.ops.linear_attention.cpu_segments import Edges, Segment, crossing, is_one_chunk, segments, tokens_per_segment
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
    """The buffers, and what belongs to the segment at hand, each made when it is first asked for."""

    def __init__(self, call: Call, buffer: Workspace, *results: Tensor) -> None:
        self.call, self.buffer = call, buffer
        self.results = results  # the gradient of the output, the output, the normaliser: for a backward pass
        self._shared: dict[Any, Any] = {}  # decays of segments that have no edges of their own

    def enter(self, s: Segment) -> None:
        """Go to a segment."""
        self.s = s
        self.lead = (s.n, s.rows.stop - s.rows.start, self.call.q.shape[2])
        self._own: dict[Any, Any] = {}

    def tokens(self, name: str, width: int) -> Tensor:
        """Return the buffer of that name as ``(n, B, H, C, width)``."""
        return self.buffer(name, *self.lead, self.s.C, width)

    def load(self, name: str, x: Tensor, *, ones: bool = False) -> Tensor:
        """Load the segment of x ``(B, L, H, ·)``."""
        return self.s.load(x, self.tokens(name, x.shape[-1] + ones))

    @property
    def q(self) -> Tensor:
        """Queries ``(n, B, H, C, D)``."""
        return _once(self._own, "q", lambda: self.load("q", self.call.q))

    @property
    def k(self) -> Tensor:
        """Keys ``(n, B, H, C, D)``."""
        return _once(self._own, "k", lambda: self.load("k", self.call.k))

    @property
    def v(self) -> Tensor:
        """Values ``(n, B, H, C, E)``; one more column is ones, where sums of weights are kept."""
        return _once(self._own, "v", lambda: self.load("v", self.call.v, ones=self.call.ones))

    @property
    def g(self) -> Tensor:
        """The gradient of the sums before division, in the shape of v."""
        return _once(self._own, "g", self._before_division)

    def _before_division(self) -> Tensor:
        d_out, out, total = self.results
        g = self.load("g", d_out, ones=self.call.ones)
        if self.call.normalize:
            g[..., -1:] = self.load("out", out).mul_(g[..., :-1]).sum(-1, keepdim=True).neg_()
            g /= self.s.fill(self.load("total", total.mT[..., None]).add_(self.call.eps), 1)
        elif self.call.ones:
            g[..., -1] = 0
        return g

    def edges(self) -> list[Edges]:
        """Return the decays of what travels rightward and, unless causal, of what travels leftward."""
        return [self.edge(leftward) for leftward in ((False,) if self.call.causal else (False, True))]

    def edge(self, leftward: bool) -> Edges:
        """Return the decays of one direction."""
        return _once(*self._kept(leftward), lambda: self.s.edges(self.call, leftward=leftward))

    def within(self) -> Tensor:
        """Return M inside the chunks, ``(n, B, H, C, C)`` or one that broadcasts to it."""
        return _once(*self._kept("within"), self._within)

    def _within(self) -> Tensor:
        M, *back = (e.within(self.q) for e in self.edges())
        # The diagonal is 1 in both directions and counts once: it is taken from the first.
        return M + back[0].tril(-1).mT if back else M

    def _kept(self, key: Any) -> tuple[dict[Any, Any], Any]:
        return (self._own, key) if self.s.own_edges else (self._shared, (key, self.s.C))

    def sent(self, e: Edges) -> Tensor:
        """Return v weighted by the way from each token to the border over which it leaves its chunk."""
        return self._weighted(f"sent {e.leftward}", self.v, e.sending)

    def received(self, e: Edges) -> Tensor:
        """Return g weighted by the way to each token from the border over which states come in."""
        return self._weighted(f"received {e.leftward}", self.g, e.receiving)

    def _weighted(self, name: str, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return _once(self._own, name, lambda: torch.mul(x, weight, out=self.tokens(name, x.shape[-1])))

    def states(self, e: Edges, carry: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states Σ k vᵀ that reach each chunk, and the one that leaves the segment.

        ``carry`` ``(B, H, D, E)`` is the one that enters it.
        """
        return self._carried(f"states {e.leftward}", e, e.leftward, product_of=(self.k, self.sent(e)), carry=carry)

    def gradients(self, e: Edges, carry: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients Σ q gᵀ of the states that leave each chunk; they run the other way."""
        name = f"gradients {e.leftward}"
        return self._carried(name, e, not e.leftward, product_of=(self.q, self.received(e)), carry=carry)

    def _carried(
        self, name: str, e: Edges, leftward: bool, *, product_of: tuple[Tensor, Tensor], carry: Tensor
    ) -> tuple[Tensor, Tensor]:
        borders = self.buffer(name, self.lead[0] + 1, *carry.shape)
        first, last = (-1, 0) if leftward else (0, -1)
        reached, added = (borders[1:], borders[:-1]) if leftward else (borders[:-1], borders[1:])
        borders[first] = carry
        product(product_of[0].mT, product_of[1], added)
        e.carry(borders, leftward=leftward)
        return reached, borders[last]


Made = TypeVar("Made", Tensor, Edges)


def _once(made: dict[Any, Any], key: Any, make: Callable[[], Made]) -> Made:
    """Return what was made under that key, or make it."""
    found: Made = made[key] if key in made else made.setdefault(key, make())
    return found


def saved_shape(c: Call) -> tuple[int, ...]:
    """Return the shape of the states at segment borders: from the left and, when bidirectional, from the right."""
    tokens = tokens_per_segment(c)
    return (1 if c.causal else 2, (c.q.shape[1] + tokens - 1) // tokens, *c.state_shape)


def forward(c: Call) -> Outputs:
    """Return the output, the normaliser, the last state and the states at segment borders."""
    with _workspace(c) as buffer:
        return _forward(c, Walk(c, buffer))


def backward(
    c: Call, d_out: Tensor, d_end: Tensor | None, out: Tensor, total: Tensor, saved: Tensor, decay_grad: bool
) -> Gradients:
    """Return the gradients of q, k, v, both log decays and the first state; empty where there is none."""
    with _workspace(c) as buffer:
        return _backward(Walk(c, buffer, d_out, out, total), d_end, saved, decay_grad)


def _workspace(c: Call) -> Workspace:
    return Workspace(c.sum_dtype, c.q.device)


def _forward(c: Call, w: Walk) -> Outputs:
    E = c.v.shape[-1]
    out, total, end = c.new_outputs()
    in_huge_pages(out)
    saved = c.new(*saved_shape(c))
    if is_one_chunk(c):
        saved.zero_()  # where nothing is written
    for block in segments(c):
        rows = block[0].rows
        carry = torch.zeros_like(saved[0, 0, rows])
        if not c.causal and not is_one_chunk(c):
            for s in reversed(block):
                saved[1, s.index, rows] = carry
                w.enter(s)
                carry = w.states(w.edge(True), carry)[1].clone()
            carry = carry.zero_()
        if c.state is not None:
            carry = c.state[rows].to(saved.dtype)
        for s in block:
            saved[0, s.index, rows] = carry
            w.enter(s)
            o, carry = _segment_output(w, saved[:, s.index, rows])
            if c.normalize:
                s.store(o[..., E:], total.mT[..., None])
                o[..., :E] /= s.fill(o[..., E:] + c.eps, 1)
            s.store(o[..., :E], out)
        if c.causal:
            end[rows] = carry
    return out, total, end, saved


def _segment_output(w: Walk, carries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of the segment at hand ``(n, B, H, C, E)``, and the state that leaves it to the right.

    ``carries`` are the states that enter it, one a direction.
    """
    P = product(w.q, w.k.mT, w.tokens("P", w.s.C)).mul_(w.within())
    o = product(P, w.v, w.tokens("o", w.v.shape[-1]))
    if is_one_chunk(w.call):  # nothing comes in
        return o, w.states(w.edge(False), carries[0])[1] if w.call.causal and w.call.ones else carries[0]
    ends = []
    for e, carry in zip(w.edges(), carries, strict=True):
        states, end = w.states(e, carry)
        _add(w, o, w.q, states, e.receiving)
        ends.append(end)
    return o, ends[0]


def _add(w: Walk, to: Tensor, x: Tensor, states: Tensor, weight: Tensor | None) -> Tensor | None:
    """Add x @ states ``(n, B, H, C, E)``, weighted; return the product if there is a weight."""
    if weight is None:
        accumulate(x, states, to)
        return None
    through = product(x, states, w.tokens("through", to.shape[-1]))
    to.addcmul_(through, weight)
    return through


def _backward(w: Walk, d_end: Tensor | None, saved: Tensor, decay_grad: bool) -> Gradients:
    c, E = w.call, w.call.v.shape[-1]
    dq, dk, dv, *decays, d_state = c.new_gradients(decay_grad)
    in_huge_pages(dq, dk, dv)
    for block in segments(c):
        rows = block[0].rows
        carry = torch.zeros_like(saved[0, 0, rows])
        lefts: list[Tensor] = []
        if not c.causal and not is_one_chunk(c):
            # The gradient of what came from the right runs to the right: its states first.
            for s in block:
                lefts.append(carry)
                w.enter(s)
                carry = w.gradients(w.edge(True), carry)[1].clone()
            carry = torch.zeros_like(carry)
        if d_end is not None:
            carry = d_end[rows].to(saved.dtype)
        for s in reversed(block):
            w.enter(s)
            ends = [carry, *lefts[s.index : s.index + 1]] if d_end is not None or not is_one_chunk(c) else []
            carry = _segment_gradient(w, saved[:, s.index, rows], ends, decays if decay_grad else None)
            s.store(w.tokens("dq", c.q.shape[-1]), dq)
            s.store(w.tokens("dk", c.q.shape[-1]), dk)
            s.store(w.tokens("dv", E + c.ones)[..., :E], dv)
        if c.causal:
            d_state[rows] = carry
    return dq, dk, dv, decays[0], decays[1], d_state


def _segment_gradient(w: Walk, carries: Tensor, ends: list[Tensor], decays: list[Tensor] | None) -> Tensor:
    """Write the gradients of the segment at hand to the buffers dq, dk, dv; return that of the state from the left.

    ``carries`` are the states that enter it, and ``ends`` the gradients of those that leave it, one a direction, or
    none where no state enters or leaves. Gradients of the log decays go to ``decays``, where somebody asks for them.
    """
    C, D, E = w.s.C, w.q.shape[-1], w.v.shape[-1]
    P = product(w.q, w.k.mT, w.tokens("P", C)).mul_(w.within())
    G = product(w.g, w.v.mT, w.tokens("G", C))
    flow = None if decays is None else torch.mul(P, G, out=w.tokens("flow", C))
    G.mul_(w.within())
    dq = product(G, w.k, w.tokens("dq", D))
    dk = product(G.mT, w.q, w.tokens("dk", D))
    dv = product(P.mT, w.g, w.tokens("dv", E))
    start = torch.zeros_like(carries[0])
    for e, carry, end in itertools.zip_longest(w.edges(), carries, ends):
        outside = None
        if end is not None:
            (states, _), (gradients, first) = w.states(e, carry), w.gradients(e, end)
            start = start if e.leftward else first
            accumulate(w.received(e), states.mT, dq)
            accumulate(w.sent(e), gradients.mT, dk)
            leaving = _add(w, dv, w.k, gradients, e.sending)
            outside = None if leaving is None else (leaving, states, gradients)
        if flow is not None and decays is not None and e.sums is not None:
            _add_decay_gradient(w, e, decays[e.leftward], flow, outside)
    return start


def _add_decay_gradient(
    w: Walk, e: Edges, to: Tensor, flow: Tensor, outside: tuple[Tensor, Tensor, Tensor] | None
) -> None:
    """Add the gradient of one direction's log decays.

    ``flow`` ``(n, B, H, C, C)`` is what flows from token j to token i inside the chunks. ``outside`` is what each key
    meets outside its own chunk ``(n, B, H, C, E)``, the states that reach the chunks, and the gradients of those that
    leave them; None where there is but one chunk.
    """
    flow = flow.mT if e.leftward else flow
    if e.steps is None:
        gradient = crossing(flow.tril(-1))
    else:  # one decay a head: each flow counts once for each edge on its way
        lags, gradient = e.lags(flow), flow.new_zeros(1)
        if lags.shape[:2] == (1, 1):
            flow = flow.sum((0, 1), keepdim=True)
        to += (flow * lags).sum((0, 1, 3, 4))
    if outside is not None:
        leaving, states, gradients = outside
        sent = (w.sent(e) * leaving).sum(-1)
        received = (w.received(e) * product(w.q, states, w.tokens("through", states.shape[-1]))).sum(-1)
        exchanged = (sent, received) if e.leftward else (received, sent)
        gradient = edge_gradient(gradient, *exchanged, e.across((states * gradients).sum((-1, -2))))
    elif e.steps is not None:
        return
    if w.s.absent is not None:
        gradient = gradient.masked_fill(w.s.absent, 0)
    if to.ndim == 1:
        to += gradient.sum((0, 1, 3))
    else:
        w.s.store(gradient[..., None], to[..., None])


linear_attention_chunked = define("linear_attention_chunked", forward, backward, saved_shape)
