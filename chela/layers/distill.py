"""Hedgehog's conversion of a softmax layer: learn feature maps whose weights are those of softmax (arXiv 2402.04347).

``chela.models.convert`` does it for all layers of a network, ``examples/hedgehog_distill.py`` from a trained run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chela.layers.mixers.hedgehog import HedgehogAttention
from chela.layers.mixers.softmax import SoftmaxAttention


def attention_distillation_loss(
    q: Tensor,
    k: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Cross-entropy of linear attention's weights under softmax attention's (arXiv 2402.04347, equation 3).

    `−Σ_j a_ij log b_ij`, averaged over heads and real queries i, with `a_i = softmax_j(q_i·k_j / √Z)` and
    `b_ij = φ(q_i)·φ(k_j) / Σ_j φ(q_i)·φ(k_j)`. Its least value is the entropy of a. O(B·H·L²) time and memory.

    Args:
        q: The teacher's queries `(B, L, H, Z)`.
        k: The teacher's keys `(B, L, H, Z)`.
        student_q: Positive features of the student's queries `(B, L, H, F)`.
        student_k: Positive features of the student's keys `(B, L, H, F)`.
        causal: Whether a token hears only itself and those before it.
        mask: `(B, L)` bool, True = real token.
        eps: Added to the student's weights and to their sum.

    Returns:
        A scalar; no gradient flows to the teacher.

    >>> q, k = torch.randn(2, 1, 5, 1, 4).unbind()
    >>> bool(attention_distillation_loss(q, k, q.exp(), k.exp()) > 0)
    True
    """
    seen = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
    pairs = (seen[:, None, :, None] & seen[:, None, None, :]).expand(-1, q.shape[2], -1, -1)  # (B, H, L, L)
    if causal:
        pairs = pairs.tril()
    with torch.no_grad():
        scores = torch.einsum("bihz,bjhz->bhij", q, k) / math.sqrt(q.shape[-1])
        teacher = scores.masked_fill(~pairs, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~pairs, 0.0)
    weights = torch.einsum("bihf,bjhf->bhij", student_q, student_k).masked_fill(~pairs, 0.0)
    log_student = torch.log(weights + eps) - torch.log(weights.sum(-1, keepdim=True) + eps)
    per_query = -(teacher * log_student).sum(-1)  # (B, H, L), 0 at padding
    return per_query.sum() / (seen.sum() * q.shape[2]).clamp(min=1)


def hedgehog_from_softmax(teacher: SoftmaxAttention) -> HedgehogAttention:
    """Make the Hedgehog layer with the projections of ``teacher`` and feature maps at their start."""
    student = HedgehogAttention(
        teacher.qkv.in_features,
        heads=teacher.heads,
        d_value=teacher.d_value,
        rotary=teacher.rotary,
        causal=teacher.causal,
    ).to(teacher.qkv.weight)
    student.qkv.load_state_dict(teacher.qkv.state_dict())
    student.out.load_state_dict(teacher.out.state_dict())
    return student
