"""Linear attention by chunks, in short: the algorithm that ``cpu`` and ``kernels`` make fast.

Inside a chunk of C tokens the C × C weights are formed. Everything before the chunk reaches it through one matrix, the
state S ``(D, E)``. So L tokens cost O(L (C (D + E) + D E)) instead of O(L² (D + E)). Differentiable by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops.linear_attention.operator import Call
from chela.ops.linear_attention.reference import divided, heads_first, log_decays


def linear_attention_plain(c: Call) -> tuple[Tensor, Tensor]:
    """Return the output and the last state of a call."""
    q, k, v = heads_first(c)
    state = q.new_zeros(c.state_shape) if c.state is None else c.state.to(q.dtype)
    sums, end = one_way(q, k, v, log_decays(c.log_decay, c.q, c.mask), state, c.chunk or 64)
    if not c.causal:
        # From the other end the edge between t − 1 and t, which was at t, is at L − t.
        edges = log_decays(c.log_decay_back, c.q, c.mask).flip(-1).roll(1, -1)
        back, _ = one_way(q.flip(-2), k.flip(-2), v.flip(-2), edges, state, c.chunk or 64, own=False)
        sums = sums + back.flip(-2)
    return divided(sums, c), end


def one_way(
    q: Tensor, k: Tensor, v: Tensor, edges: Tensor, S: Tensor, chunk: int, *, own: bool = True
) -> tuple[Tensor, Tensor]:
    """Return Σ_{j ≤ i} M_ij (q_i·k_j) v_j, ``(B, H, L, E)``, and the last state; without ``own`` the sum is over j < i.

    ``edges`` ``(B, H, L)`` float64 has the log decay between each token and the one before it; S ``(B, H, D, E)`` is
    the state before the first.
    """
    outputs = []
    for q_, k_, v_, edge in zip(*(torch.split(x, chunk, 2) for x in (q, k, v, edges)), strict=True):
        A = edge.cumsum(-1)  # from the left border of the chunk to each token
        M = (A[..., :, None] - A[..., None, :]).clamp(max=0).exp().tril(0 if own else -1)
        from_left, to_right = A.exp()[..., None], (A[..., -1:] - A).exp()[..., None]
        outputs.append((q_ @ k_.mT * M.to(q.dtype)) @ v_ + (q_ * from_left.to(q.dtype)) @ S)
        S = S * from_left[..., -1:, :].to(q.dtype) + (k_ * to_right.to(q.dtype)).mT @ v_
    return torch.cat(outputs, 2), S
