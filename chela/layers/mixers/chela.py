"""CHELA (arXiv 2406.08128): short-long convolution, then linear attention, then a gate.

Shapes: B batch, L length, D model width, H heads, Z query/key width per head, V value width over all heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.decay import HeadDecay
from chela.layers.feature_map import FEATURE_MAPS
from chela.layers.norm import LayerNorm
from chela.layers.padding import zero_padding
from chela.layers.param_groups import mark
from chela.layers.short_long_conv import ShortLongConv, ShortLongConvState
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step
from chela.ops.linear_attention.recurrent import accumulation_dtype


class ChelaLayer(nn.Module):
    """Short-long convolutions help linear attention to focus (arXiv 2406.08128, section 3).

    With c the convolution of the input x (``ShortLongConv``), φ the feature map and ⊙ the product by channel::

        z = W_z c                       shared by the heads
        q = γ_q ⊙ z + β_q,   k = γ_k ⊙ z + β_k,   v = SiLU(W_v x)
        o = norm(linear_attention(φ(q), φ(k), v))
        h = W_o (o ⊙ SiLU(W_g c))                                              gate = "output"
        h = SiLU(W_h c + W_o (o ⊙ SiLU(W_r c))),  g = σ(W_u c), returns (h, g)     gate = "mega"
        h = W_o o                                                             gate = "none"

    Time O(L·log L·D + L·(D·V + Z·V)), memory O(L·(D + V)). What the paper states and what was decided here is told
    apart in ``docs/fidelity.md``.

    Args:
        d_model: Width D.
        l_max: Longest sequence; the long kernel has so many taps.
        causal: No position sees a later one.
        d_qk: Width Z of queries and keys, per head.
        d_value: Width V of the values, all heads together; None is 2·D.
        heads: Attention heads H; V must be a multiple.
        conv: "short-long", "short", "long" or "none" (then c = x).
        short_kernel: Taps of the short convolution, odd.
        long_kernel: "multiscale", "free" or "ema"; see ``chela.layers.long_kernel``.
        reparam: Parallel short branches beside the long kernel in training, see ``ShortLongConv``.
        attention: "linear", "decay" (a learned decay per head) or "none" (then o = SiLU(W_v c)).
        feature_map: φ: "elu" (elu + 1), "silu" or "identity".
        normalize: Divide by the sum of the attention weights. The layer norm that follows undoes what one head does
            here, but for its eps; with several heads it weighs them against each other.
        gate: "output", "mega" (what the models of ``chela.train`` take) or "none".

    Raises:
        ValueError: ``d_value`` no multiple of ``heads``, or an unknown name.

    >>> layer = ChelaLayer(16, l_max=100)
    >>> layer(torch.randn(2, 100, 16)).shape
    torch.Size([2, 100, 16])
    """

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        causal: bool = False,
        d_qk: int = 32,
        d_value: int | None = None,
        heads: int = 1,
        conv: str = "short-long",
        short_kernel: int = 5,
        long_kernel: str = "multiscale",
        reparam: bool = True,
        attention: str = "linear",
        feature_map: str = "elu",
        normalize: bool = True,
        gate: str = "output",
    ) -> None:
        super().__init__()
        d_value = 2 * d_model if d_value is None else d_value
        if d_value % heads:
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        _expect("conv", conv, ("short-long", "short", "long", "none"))
        _expect("attention", attention, ("linear", "decay", "none"))
        _expect("gate", gate, ("output", "mega", "none"))
        _expect("feature_map", feature_map, tuple(FEATURE_MAPS))
        self.heads, self.causal, self.attention, self.gate, self.normalize = heads, causal, attention, gate, normalize
        self.feature_map = FEATURE_MAPS[feature_map]
        self.conv = None
        if conv != "none":
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Mix ``x: (B, L, D)``; ``mask: (B, L)`` bool, True = real token. Padding comes out as 0."""
        x = zero_padding(x, mask)
        c = x if self.conv is None else self.conv(x, mask, zeroed=True)
        o = self.norm(self._attend(x, c, mask))
        return self._combine(o, c, mask)

    def _attend(self, x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        if self.query_key is None:
            return F.silu(self.value(c))
        q, k, v = self._project(x, c, self.query_key)
        log_decay = None if self.decay is None else self.decay()
        o = linear_attention(q, k, v, causal=self.causal, log_decay=log_decay, mask=mask, normalize=self.normalize)
        return o.flatten(-2)

    def _project(self, x: Tensor, c: Tensor, query_key: QueryKey) -> tuple[Tensor, Tensor, Tensor]:
        """Return φ(q), φ(k) `(…, H, Z)` and v `(…, H, V / H)`."""
        q, k = query_key(c)
        v = rearrange(F.silu(self.value(x)), "... (h e) -> ... h e", h=self.heads)
        return self.feature_map(q), self.feature_map(k), v

    def _combine(self, o: Tensor, c: Tensor, mask: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        if self.gate != "none":
            o = o * F.silu(self.gate_in(c))
        h = self.out(o)
        if self.gate == "mega":
            h = F.silu(h + self.skip(c))
        h = zero_padding(h, mask)
        return (h, torch.sigmoid(self.highway(c))) if self.gate == "mega" else h

    def start(self, batch: int) -> ChelaState:
        """Return the state before the first token, for ``step``; the long kernel is the one of now.

        Raises:
            RuntimeError: The layer is not causal.
        """
        if not self.causal:
            raise RuntimeError("ChelaLayer.step: expected causal=True; a two-sided layer needs later tokens")
        like = self.value.weight
        width = self.value.out_features // self.heads
        attention = None
        if self.query_key is not None:
            d_qk = self.query_key.project.out_features
            attention = LinearAttentionState.zeros(
                batch, self.heads, d_qk, width, device=like.device, dtype=accumulation_dtype(like.dtype)
            )
        return ChelaState(None if self.conv is None else self.conv.start(batch), attention)

    @torch.no_grad()
    def step(self, x: Tensor, state: ChelaState) -> tuple[Tensor | tuple[Tensor, Tensor], ChelaState]:
        """Feed one token ``x: (B, D)`` to the causal layer: the same position of ``forward`` in eval mode.

        O(D·log² L) on average over L tokens for the convolution, O(Z·V) for the attention, without gradients.

        Returns:
            What ``forward`` returns, of shape `(B, D)`, and the state.
        """
        conv, attention = state
        c = x
        if self.conv is not None:
            assert conv is not None
            c, conv = self.conv.step(x, conv)
        if self.query_key is None or attention is None:
            o = F.silu(self.value(c))
        else:
            q, k, v = self._project(x, c, self.query_key)
            log_decay = None if self.decay is None else self.decay()
            o, attention = linear_attention_step(q, k, v, attention, log_decay=log_decay, normalize=self.normalize)
            o = o.flatten(-2)
        return self._combine(self.norm(o), c, None), ChelaState(conv, attention)

    def state_size(self, length: int) -> int:
        """Count the numbers that ``step`` remembers of ``length`` tokens: S, z, and what was convolved."""
        size = 0
        if self.query_key is not None:
            size = self.query_key.project.out_features * (self.value.out_features + self.heads)
        if self.conv is not None and self.conv.short is not None:
            size += self.conv.short.weight.numel()
        if self.conv is not None and self.conv.long is not None:
            size += 2 * self.value.in_features * length  # the tokens, and what they add to later outputs
        return size

    def extra_repr(self) -> str:
        """Name the choices that have no module of their own."""
        return f"heads={self.heads}, causal={self.causal}, attention={self.attention}, gate={self.gate}"


class ChelaState(NamedTuple):
    """What the causal layer remembers between steps.

    Attributes:
        conv: Of the convolution, updated in place by a step; None without one.
        attention: Of the attention; None without one.
    """

    conv: ShortLongConvState | None
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


def _expect(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")
