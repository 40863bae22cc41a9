"""Linear attention where each process has a piece of the sequence: pieces exchange their states and nothing else.

Each computes the state that its own tokens send to the border, ``Σ_j w_j k_j [v_j, 1]ᵀ`` ``(B, H, D, E + 1)`` with w_j
the decay on the way, and the decay over the whole piece. One all-gather shares both, whatever the length; the state
that arrives at a piece is the decayed sum of the states on that side of it. Sums over tokens are recomputed in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chela.ops.linear_attention.operator import Call
from chela.ops.linear_attention.reference import divided, log_decays
from chela.ops.sequence_parallel import Piece


def attend_in_pieces(
    c: Call, run: Callable[[Call], tuple[Tensor, Tensor]], piece: Piece
) -> tuple[Tensor, Tensor | None]:
    """Return the output ``(B, L, H, E)`` of this process's tokens, and for causal attention the state after them.

    ``run`` does what stays inside the piece.
    """
    c = c._replace(ones=c.normalize or c.causal)
    if c.undecayed:
        state = piece.gather(_recomputed(_leaving, False, *c)[0]).sum(0)
        sums = _recomputed(_received, False, state, *c)
    elif c.causal:
        return run(c._replace(state=_arriving(c, piece)[0]))
    else:
        left, right = _arriving(c, piece)
        if c.normalize:  # the sums of weights are one more column, until the states from both sides are added
            q, k, v = (x.to(c.sum_dtype) for x in (c.q, c.k, c.v))
            inside = c._replace(q=q, k=k, v=F.pad(v, (0, 1), value=1.0), normalize=False, ones=False)
        else:
            inside = c
        sums = run(inside)[0]
        for state, leftward in ((left, False), (right, True)):
            sums = sums + _recomputed(_received, leftward, state, *c)
    return divided(sums.transpose(1, 2), c), None


def _arriving(c: Call, piece: Piece) -> list[Tensor]:
    """Return the state that arrives from the left, and from the right unless causal; in one all-gather."""
    sent = [_recomputed(_leaving, leftward, *c) for leftward in ((False,) if c.causal else (False, True))]
    packed = [torch.cat([state.flatten(2), over[..., None]], dim=-1) for state, over in sent]
    arriving = []
    for leftward, of_all in enumerate(piece.gather(torch.stack(packed)).unbind(1)):
        states, over = of_all[..., :-1], of_all[..., -1:].exp()
        arrived = states[:0].sum(0)  # zeros, of which the first piece too has a gradient: all must exchange it
        way = range(piece.count - 1, piece.rank, -1) if leftward else range(piece.rank)
        for p in way:
            arrived = arrived * over[p] + states[p]
        arriving.append(arrived.view(c.state_shape))
    return arriving


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:  # the tensors apart, so that autograd saves them
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _leaving(leftward: bool, *call: Any) -> tuple[Tensor, Tensor]:
    """Return the state that the piece's own tokens send over its border, and its whole log decay ``(B, H)``."""
    c = Call(*call)
    weighted, over = _weighted(c.k.to(c.sum_dtype), c, leftward, to_right=not leftward)
    v = F.pad(c.v.to(c.sum_dtype), (0, 1), value=1.0) if c.ones else c.v.to(c.sum_dtype)
    if c.mask is not None:
        v = v.masked_fill(~c.mask[:, :, None, None], 0)
    return torch.einsum("blhd,blhe->bhde", weighted, v), over


def _received(leftward: bool, state: Tensor, *call: Any) -> Tensor:
    """Return what an arriving state adds to the sums of each token, ``(B, L, H, E + ones)``."""
    c = Call(*call)
    weighted, _ = _weighted(c.q.to(state.dtype), c, leftward, to_right=leftward)
    return torch.einsum("blhd,bhde->blhe", weighted, state)


def _weighted(x: Tensor, c: Call, leftward: bool, *, to_right: bool) -> tuple[Tensor, Tensor]:
    """Weight ``x: (B, L, H, D)`` by the way to a border of the piece, 0 where absent; return also the whole log decay.

    The edge that belongs to the first token is the one to the piece before. No sum is the difference of two others, so
    the decay's gradient keeps its digits.
    """
    log_decay = c.log_decay_back if leftward else c.log_decay
    if c.mask is not None:
        x = x.masked_fill(~c.mask[:, :, None, None], 0)
    if log_decay is None:
        return x, x.new_zeros(x.shape[0], x.shape[2])
    edges = log_decays(log_decay, x, c.mask)  # (B, H, L)
    if to_right:
        after = edges[..., 1:].flip(-1).cumsum(-1).flip(-1)
        way = F.pad(after, (0, edges.shape[-1] - after.shape[-1]))
    else:
        way = edges.cumsum(-1)
    return x * way.exp().to(x.dtype).transpose(1, 2)[..., None], edges.sum(-1).to(x.dtype)
