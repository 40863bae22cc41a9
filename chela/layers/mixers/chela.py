"""CHELA (arXiv 2406.08128): short-long convolution, then linear attention, then a gate.

Shapes: B batch, L length, D model width, H heads, Z query/key width per head, V value width over all heads.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.attention import FEATURE_MAPS, HeadDecay
from chela.layers.expect import checked, expect_causal
from chela.layers.norm import LayerNorm
from chela.layers.padding import zero_padding
from chela.layers.param_groups import mark
from chela.layers.short_long_conv import ShortLongConv, ShortLongConvState
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step
from chela.ops.precision import accumulation_dtype


class ChelaLayer(nn.Module):
    """Short-long convolutions help linear attention to focus (arXiv 2406.08128, section 3).

    With c the convolution of the input x (``ShortLongConv``), φ the feature map and ⊙ the product by channel::

        z = W_z c                       shared by the heads
        q = γ_q ⊙ z + β_q,   k = γ_k ⊙ z + β_k,   v = SiLU(W_v x)
        o = norm(linear_attention(φ(q), φ(k), v))
        h = SiLU(W_h c + W_o (o ⊙ SiLU(W_r c))),   g = σ(W_u c),   returns g ⊙ (h − stream)     gate = "mega"
        h = W_o (o ⊙ SiLU(W_g c))                                 returns h                  gate = "output"
        h = W_o o                                                returns h                  gate = "none"

    Without options it is the system of the tables. Time O(L·log L·D + L·(D·V + Z·V)), memory O(L·(D + V)).
    ``docs/fidelity.md`` says what the paper states and what was decided here.

    Args:
        d_model: Width D.
        l_max: Longest sequence, and taps of the long kernel.
        causal: No position sees a later one.
        dropout: On h, before the gate, as in MEGA.
        d_qk: Width Z of queries and keys, per head.
        d_value: Width V of the values, all heads together; None is 2·D.
        heads: Attention heads H.
        conv: Convolution before the attention; with "none", c = x.
        short_kernel: Taps of the short convolution, odd.
        long_kernel: How the long kernel is made; see ``chela.layers.long_kernel``.
        reparam: Train parallel short branches beside the long kernel; ``conv.merge()`` folds them into it.
        attention: "decay" is linear with a learned decay per head; with "none", o = SiLU(W_v c).
        feature_map: Feature map φ of queries and keys; "elu" is elu + 1.
        normalize: Divide by the sum of the attention weights. With one head the norm on o cancels this factor.
        gate: How the convolution gates the attention.

    Raises:
        ValueError: An argument out of its limits, or ``d_value`` no multiple of ``heads``.

    >>> layer = ChelaLayer(16, l_max=100)
    >>> layer(torch.randn(2, 100, 16)).shape
    torch.Size([2, 100, 16])
    """

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        causal: bool = False,
        dropout: float = 0.0,
        d_qk: Annotated[int, {"ge": 1, "le": 256}] = 32,
        d_value: Annotated[int | None, {"ge": 1, "le": 16384}] = None,
        heads: Annotated[int, {"ge": 1, "le": 256}] = 1,
        conv: Literal["short-long", "short", "long", "none"] = "short-long",
        short_kernel: Annotated[int, {"ge": 3, "le": 31, "odd": True}] = 5,
        long_kernel: Literal["multiscale", "free", "ema"] = "multiscale",
        reparam: bool = True,
        attention: Literal["linear", "decay", "none"] = "linear",
        feature_map: Literal["elu", "silu", "identity"] = "elu",
        normalize: bool = True,
        gate: Literal["output", "mega", "none"] = "mega",
    ) -> None:
        super().__init__()
        d_value = 2 * d_model if d_value is None else d_value
        if d_value % heads:
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        self.heads, self.causal, self.attention, self.gate, self.normalize = heads, causal, attention, gate, normalize
        self.feature_map = FEATURE_MAPS[feature_map]
        self.conv = ShortLongConv(
            d_model,
            l_max=l_max,
            causal=causal,
            mode=conv,
            short_kernel=short_kernel,
            long_kernel=long_kernel,
            reparam=reparam,
        )
        self.query_key = None if attention == "none" else QueryKey(d_model, d_qk, heads)
        self.decay = HeadDecay(heads) if attention == "decay" else None
        self.value = nn.Linear(d_model, d_value)
        self.norm = LayerNorm(d_value)
        if gate != "none":
            self.gate_in = nn.Linear(d_model, d_value)
        if gate == "mega":
            self.skip = nn.Linear(d_model, d_model)
            self.highway = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_value, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, stream: Tensor | None = None) -> Tensor:
        """Map the normed ``x: (B, L, D)`` to the update ``(B, L, D)``, 0 where ``mask: (B, L)`` is False.

        ``gate="mega"`` replaces a part of ``stream: (B, L, D)``, the residual stream; None is x.
        """
        x = zero_padding(x, mask)
        c = self.conv(x, mask, zeroed=True)
        if self.query_key is None:
            o = F.silu(self.value(c))
        else:
            q, k, v = self._project(x, c, self.query_key)
            log_decay = None if self.decay is None else self.decay()
            o = linear_attention(q, k, v, causal=self.causal, log_decay=log_decay, mask=mask, normalize=self.normalize)
            o = o.flatten(-2)
        return self._combine(self.norm(o), c, x if stream is None else stream, mask)

    def _project(self, x: Tensor, c: Tensor, query_key: QueryKey) -> tuple[Tensor, Tensor, Tensor]:
        """Return φ(q), φ(k) ``(…, H, Z)`` and v ``(…, H, V / H)``."""
        q, k = query_key(c)
        v = rearrange(F.silu(self.value(x)), "... (h e) -> ... h e", h=self.heads)
        return self.feature_map(q), self.feature_map(k), v

    def _combine(self, o: Tensor, c: Tensor, stream: Tensor, mask: Tensor | None) -> Tensor:
        if self.gate != "none":
            o = o * F.silu(self.gate_in(c))
        h = self.out(o)
        if self.gate != "mega":
            return zero_padding(self.dropout(h), mask)
        h = self.dropout(F.silu(h + self.skip(c)))
        return torch.sigmoid(self.highway(c)) * zero_padding(h - stream, mask)

    def start(self, batch: int) -> ChelaState:
        """Return the state before the first token, for ``step``, with the long kernel as it is now."""
        expect_causal(self)
        like = self.value.weight
        width = self.value.out_features // self.heads
        attention = None
        if self.query_key is not None:
            sizes = batch, self.heads, self.query_key.project.out_features, width
            dtype = accumulation_dtype(like.dtype)
            attention = LinearAttentionState.zeros(*sizes, device=like.device, dtype=dtype)
        return ChelaState(self.conv.start(batch), attention)

    @torch.no_grad()
    def step(self, x: Tensor, state: ChelaState, stream: Tensor | None = None) -> tuple[Tensor, ChelaState]:
        """Feed one token ``x: (B, D)`` to the causal layer; return its update ``(B, D)`` and the new state.

        It equals the same position of ``forward`` in eval mode; ``stream: (B, D)`` as there. Without gradients,
        O(D·log² L) on average over L tokens for the convolution, O(Z·V) for the attention.
        """
        conv, attention = state
        c, conv = self.conv.step(x, conv)
        if self.query_key is None or attention is None:
            o = F.silu(self.value(c))
        else:
            q, k, v = self._project(x, c, self.query_key)
            log_decay = None if self.decay is None else self.decay()
            o, attention = linear_attention_step(q, k, v, attention, log_decay=log_decay, normalize=self.normalize)
            o = o.flatten(-2)
        return self._combine(self.norm(o), c, x if stream is None else stream, None), ChelaState(conv, attention)

    def state_size(self, length: int) -> int:
        """Count the numbers that ``step`` remembers of ``length`` tokens: sums S and z, and the convolution's past."""
        size = 0
        if self.query_key is not None:
            size = self.query_key.project.out_features * (self.value.out_features + self.heads)
        if self.conv.short is not None:
            size += self.conv.short.weight.numel()
        if self.conv.long is not None:
            size += 2 * self.value.in_features * length  # the tokens, and what they add to later outputs
        return size

    def extra_repr(self) -> str:
        """Show what no submodule shows."""
        return f"heads={self.heads}, causal={self.causal}, attention={self.attention}, gate={self.gate}"


class ChelaState(NamedTuple):
    """What the causal layer remembers: of the convolution, updated in place by a step; of the attention, if any."""

    conv: ShortLongConvState
    attention: LinearAttentionState | None


class QueryKey(nn.Module):
    """One projection, and a scale and shift per head for queries and for keys (arXiv 2209.10655, section 3.2)."""

    def __init__(self, d_model: int, d_qk: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, d_qk)
        self.gamma = nn.Parameter(torch.empty(2, heads, d_qk))
        self.beta = nn.Parameter(torch.empty(2, heads, d_qk))
        mark(self, "gamma", "beta", weight_decay=0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with queries and keys equal to the projection."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``c: (…, D)`` to queries and keys ``(…, H, Z)``."""
        z = self.project(c)[..., None, None, :]
        q, k = (z * self.gamma + self.beta).unbind(-3)
        return q, k


MIXER = ChelaLayer
