"""The state of causal linear attention, and one step of it: constant time and memory per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chela.ops.backend import accumulation_dtype


class LinearAttentionState(NamedTuple):
    """All that causal linear attention remembers of the tokens seen so far.

    Attributes:
        S: ``(B, H, D, E)``, the decayed sum of outer products k vᵀ.
        z: ``(B, H, D)``, the decayed sum of keys, used when ``normalize=True``.
    """

    S: Tensor
    z: Tensor

    @classmethod
    def zeros(cls, *sizes: int, like: Tensor | None = None) -> LinearAttentionState:
        """Return the state before the first token, of sizes B, H, D, E: float32, or for inputs ``like`` these."""
        S = torch.zeros(sizes) if like is None else like.new_zeros(sizes, dtype=accumulation_dtype(like.dtype))
        return cls(S, torch.zeros_like(S[..., 0]))


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearAttentionState,
    *,
    log_decay: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, LinearAttentionState]:
    """Feed one token to causal linear attention: O(D E) per head, whatever came before.

    Args:
        q: Queries ``(B, H, D)``.
        k: Keys ``(B, H, D)``.
        v: Values ``(B, H, E)``.
        state: The state after the previous token; it is not changed.
        log_decay: Log of the decay of the edge from the previous token to this one: None, ``(H,)`` or ``(B, H)``, ≤ 0.
        normalize: Divide by ``eps`` plus the sum of the weights.
        eps: See ``normalize``.

    Returns:
        The output ``(B, H, E)`` in the dtype of v, and the new state in its accumulation dtype.

    >>> import torch
    >>> from chela.ops import LinearAttentionState, linear_attention_step
    >>> state = LinearAttentionState.zeros(1, 2, 4, 3)
    >>> out, state = linear_attention_step(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 3), state)
    >>> out[0, 0].tolist()
    [4.0, 4.0, 4.0]
    """
    dtype = accumulation_dtype(v.dtype)
    q_, k_, v_ = (x.to(dtype) for x in (q, k, v))
    S, z = (x.to(dtype) for x in state)
    if log_decay is not None:
        decay = log_decay.to(dtype).expand(k.shape[:2]).exp()[..., None]
        S, z = S * decay[..., None], z * decay
    S = S + k_[..., :, None] * v_[..., None, :]
    z = z + k_
    out = (q_[..., None] * S).sum(-2)  # not a matrix product: autocast would round it
    if normalize:
        out = out / (eps + (q_ * z).sum(-1, keepdim=True))
    return out.to(v.dtype), LinearAttentionState(S, z)
