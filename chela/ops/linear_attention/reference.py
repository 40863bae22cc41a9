"""The definition of linear attention, written as it stands: every weight of the L × L matrix M.

O(L² (D + E)) time and O(L²) memory. It is what every other backend is held to; for long sequences use those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela.ops.linear_attention.recurrent import LinearAttentionState, accumulation_dtype

# exp of this is 0 in float64; a finite floor keeps -inf (a full reset) out of the sums.
_LOWEST = -800.0


def decay_sums(log_decay: Tensor | None, like: Tensor, mask: Tensor | None) -> Tensor:
    """Return Σ_{t ≤ i} of the log decays `(B, H, L)`, in float64; masked tokens' edges do not decay."""
    B, L, H, _ = like.shape
    if log_decay is None:
        return torch.zeros(B, H, L, dtype=torch.float64, device=like.device)
    edges = log_decay.double().clamp(min=_LOWEST).expand(B, L, H).transpose(1, 2)
    if mask is not None:
        edges = edges.masked_fill(~mask[:, None, :], 0)
    return edges.cumsum(-1)


def weights(
    q: Tensor, *, causal: bool, log_decay: Tensor | None, log_decay_back: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Return M `(B, H, L, L)`, the weight of token j (last axis) in the output of token i, in float64."""
    L = q.shape[1]
    row = torch.arange(L, device=q.device)[:, None]
    column = torch.arange(L, device=q.device)[None, :]
    ahead = decay_sums(log_decay, q, mask)
    M = (ahead[..., :, None] - ahead[..., None, :]).masked_fill(row < column, 0).exp()
    if causal:
        return M.masked_fill(row < column, 0)
    back = decay_sums(log_decay_back, q, mask)
    return torch.where(row < column, (back[..., None, :] - back[..., :, None]).masked_fill(row >= column, 0).exp(), M)


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    log_decay: Tensor | None,
    log_decay_back: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    eps: float,
    initial_state: LinearAttentionState | None,
    return_state: bool,
    chunk_size: int | None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """Compute ``linear_attention`` from its definition; ``chunk_size`` has no meaning here."""
    dtype = accumulation_dtype(v.dtype)
    q_, k_, v_ = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        q_, k_, v_ = (x.masked_fill(~mask[:, None, :, None], 0) for x in (q_, k_, v_))
    M = weights(q, causal=causal, log_decay=log_decay, log_decay_back=log_decay_back, mask=mask)
    P = (q_ @ k_.transpose(-1, -2)) * M.to(dtype)
    out, total = P @ v_, P.sum(-1, keepdim=True)
    sums = decay_sums(log_decay, q, mask)
    if initial_state is not None:
        reach = q_ * sums.exp().to(dtype)[..., None]
        out = out + reach @ initial_state.S.to(dtype)
        total = total + (reach @ initial_state.z.to(dtype)[..., None])
    if normalize:
        total = eps + total
        out = out / (total if mask is None else total.masked_fill(~mask[:, None, :, None], 1))
    state = _final_state(k_, v_, sums, initial_state) if return_state else None
    return out.transpose(1, 2).to(v.dtype), state


def _final_state(
    k: Tensor, v: Tensor, sums: Tensor, initial_state: LinearAttentionState | None
) -> LinearAttentionState:
    """Return Σ_j exp(Σ_{t > j} log_decay_t) k_j v_jᵀ and the same of k, plus what is left of the initial state."""
    kept = k * (sums[..., -1:] - sums).exp().to(k.dtype)[..., None]
    S, z = kept.transpose(-1, -2) @ v, kept.sum(-2)
    if initial_state is not None:
        left = sums[..., -1:].sum(-1).exp().to(k.dtype)[..., None]
        S, z = S + initial_state.S.to(k.dtype) * left[..., None], z + initial_state.z.to(k.dtype) * left
    return LinearAttentionState(S, z)
