"""The chunked algorithm, segment by segment: causal of any decay, and bidirectional with decay.

Shapes: n chunks of C tokens, `(n, B, H, C, ·)`; states `(n + 1, B, H, D, E)`, one per chunk border. Forward edges are
called A, backward ones Z. A state that runs left to right is a prefix, one that runs right to left a suffix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops.linear_attention.edges import Edges, edge_gradient, edge_gradient_back, edges
from chela.ops.linear_attention.recurrent import accumulation_dtype
from chela.ops.linear_attention.segments import Segment, chunks_per_segment, segments


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b over all leading axes as one batched product."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])


def prefix(weighted_k: Tensor, v: Tensor, e: Edges, carry: Tensor) -> Tensor:
    """Return the states at all borders, coming from the left, of the outer products k vᵀ."""
    return e.carry(torch.cat([carry[None], product(weighted_k.mT, v)]))


def suffix(weighted_k: Tensor, v: Tensor, e: Edges, carry: Tensor) -> Tensor:
    """Return the states at all borders, coming from the right."""
    return e.carry(torch.cat([product(weighted_k.mT, v), carry[None]]), reverse=True)


def intra(a: Edges, z: Edges | None, C: int) -> Tensor:
    """Return M inside the chunks, `(n, B, H, C, C)` or one that broadcasts to it; z is None when causal."""
    M = a.within(C)
    # The diagonal is 1 in both directions and counts once: it is taken from the first.
    return M if z is None else M + z.within(C).tril(-1).mT


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_decay_back: Tensor | None,
    mask: Tensor | None,
    state: Tensor | None,
    causal: bool,
    normalize: bool,
    ones: bool,
    eps: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the normaliser, the last state and the states at segment borders."""
    B, L, H, D = q.shape
    E = v.shape[-1]
    dtype = accumulation_dtype(v.dtype)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    total = torch.empty((B, L, H) if normalize else (0,), dtype=dtype, device=v.device)
    tokens = chunks_per_segment(H, D, E, chunk) * chunk
    shape = (B, H, D, E + ones)
    saved = torch.empty((1 if causal else 2, -(-L // tokens), *shape), dtype=dtype, device=v.device)
    end = torch.empty(shape if causal else (0,), dtype=dtype, device=v.device)
    for block in segments(q, E, chunk, mask):
        rows = block[0].rows
        zero = torch.zeros_like(saved[0, 0, rows])
        if not causal:
            carry = zero
            for s in reversed(block):
                saved[1, s.index, rows] = carry
                e = edges(log_decay_back, s, dtype, q.device)
                carry = suffix(e.entering(s.load(k, dtype)), s.load(v, dtype, ones=ones), e, carry)[0]
        carry = zero if state is None else state[rows].to(dtype)
        for s in block:
            saved[0, s.index, rows] = carry
            a = edges(log_decay, s, dtype, q.device)
            z = None if causal else edges(log_decay_back, s, dtype, q.device)
            q_, k_, v_ = s.load(q, dtype), s.load(k, dtype), s.load(v, dtype, ones=ones)
            before = prefix(a.leaving(k_), v_, a, carry)
            o = product(product(q_, k_.mT).mul_(intra(a, z, s.C)), v_)
            o += product(a.entering(q_), before[:-1])
            if z is not None:
                after = suffix(z.entering(k_), v_, z, saved[1, s.index, rows])
                o += product(z.leaving(q_), after[1:])
            carry = before[-1]
            if normalize:
                s.store(o[..., E:], total[..., None])
                o = o[..., :E] / (o[..., E:] + eps)
            s.store(o[..., :E], out)
        if causal:
            end[rows] = carry
    return out, total, end, saved


def output_gradient(
    s: Segment, d_out: Tensor, out: Tensor, total: Tensor, normalize: bool, ones: bool, eps: float, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the sums before division `(n, B, H, C, E + ones)`, the normaliser's in the last column."""
    do = s.load(d_out, dtype, ones=ones)
    if not ones:
        return do
    if not normalize:
        do[..., -1] = 0
        return do
    scale = 1 / (s.load(total[..., None], dtype) + eps)
    do[..., -1:] = -(do[..., :-1] * s.load(out, dtype)).sum(-1, keepdim=True)
    return do.mul_(scale)


def backward(
    d_out: Tensor,
    d_end: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_decay_back: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    saved: Tensor,
    causal: bool,
    normalize: bool,
    ones: bool,
    eps: float,
    chunk: int,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_decay, log_decay_back and the initial state; empty where there is none."""
    dtype, E = saved.dtype, v.shape[-1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    nothing = saved.new_empty(0)
    d_decay = nothing if log_decay is None or not decay_grad else torch.zeros_like(log_decay)
    d_back = nothing.clone() if log_decay_back is None or not decay_grad else torch.zeros_like(log_decay_back)
    d_state = torch.empty_like(saved[0, 0]) if causal else nothing.clone()
    for block in segments(q, E, chunk, mask):
        rows = block[0].rows
        zero = torch.zeros_like(saved[0, 0, rows])
        lefts: list[Tensor] = []
        if not causal:
            # The gradient of what came from the right runs to the right: its states first.
            carry = zero
            for s in block:
                lefts.append(carry)
                e = edges(log_decay_back, s, dtype, q.device)
                do = output_gradient(s, d_out, out, total, normalize, ones, eps, dtype)
                carry = prefix(e.leaving(s.load(q, dtype)), do, e, carry)[-1]
        carry = zero if d_end is None else d_end[rows].to(dtype)
        for s in reversed(block):
            a = edges(log_decay, s, dtype, q.device)
            z = None if causal else edges(log_decay_back, s, dtype, q.device)
            q_, k_, v_ = s.load(q, dtype), s.load(k, dtype), s.load(v, dtype, ones=ones)
            do = output_gradient(s, d_out, out, total, normalize, ones, eps, dtype)
            M = intra(a, z, s.C)
            P = product(q_, k_.mT).mul_(M)
            raw = product(do, v_.mT)
            flow = P * raw if decay_grad else None
            G = raw.mul_(M)

            before = prefix(a.leaving(k_), v_, a, saved[0, s.index, rows])
            d_after = suffix(a.entering(q_), do, a, carry)
            dq_a = a.entering(product(do, before[:-1].mT))
            dk_a = a.leaving(product(v_, d_after[1:].mT))
            if flow is not None:
                through = a.across((before[:-1] * d_after[1:]).sum((-1, -2)))
                g = edge_gradient(flow.tril(-1), (q_ * dq_a).sum(-1), (k_ * dk_a).sum(-1), through)
                add_edge_gradient(s, g, d_decay)
            dq_ = product(G, k_) + dq_a
            dk_ = product(G.mT, q_) + dk_a
            dv_ = product(P.mT, do) + product(a.leaving(k_), d_after[1:])
            if z is not None:
                after = suffix(z.entering(k_), v_, z, saved[1, s.index, rows])
                d_before = prefix(z.leaving(q_), do, z, lefts[s.index])
                dq_z = z.leaving(product(do, after[1:].mT))
                dk_z = z.entering(product(v_, d_before[:-1].mT))
                if flow is not None:
                    through = z.across((after[1:] * d_before[:-1]).sum((-1, -2)))
                    g = edge_gradient_back(flow.triu(1), (q_ * dq_z).sum(-1), (k_ * dk_z).sum(-1), through)
                    add_edge_gradient(s, g, d_back)
                dq_ += dq_z
                dk_ += dk_z
                dv_ += product(z.entering(k_), d_before[:-1])
            carry = d_after[0]
            s.store(dq_, dq)
            s.store(dk_, dk)
            s.store(dv_[..., :E], dv)
        if causal:
            d_state[rows] = carry
    return dq, dk, dv, d_decay, d_back, d_state


def add_edge_gradient(s: Segment, gradient: Tensor, to: Tensor) -> None:
    """Put the gradient `(n, B, H, C)` of a segment's edges into that of `(H,)` or `(B, L, H)` log decays."""
    if s.absent is not None:
        gradient = gradient.masked_fill(s.absent, 0)
    if to.ndim == 1:
        to += gradient.sum((0, 1, 3))
    else:
        s.store(gradient[..., None], to[..., None])
