"""Lightning Attention-2 in TransNormerLLM's block (arXiv 2401.04658, 2405.17381)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.mixers.linear import LinearAttention
from chela.layers.multi_head import Heads, Taps, Width


class LightningAttention(LinearAttention):
    """Causal linear attention with a fixed decay per head and no denominator (arXiv 2401.04658, section 3).

    Per head, SiLU on q, k and v::

        o_t = Σ_{s≤t} λ^(t−s) (q_t·k_s) v_s,     λ_h = exp(−slope_h · (1 − layer/(depth − 1) + 1e-5))
        h = W_o (norm(o) ⊙ σ(W_2 W_1 x))

    with ALiBi's slopes, so that deeper layers look further back; the factor is 1 when there is one layer. W_1 and W_2
    pass through the width of one head. O(L·V·(D + Z)) time, O(L·V) memory, a state of about V·Z numbers.

    Args:
        heads: Attention heads H, each with its own decay.
        layer: Index of the layer, from 0.
        depth: Number of layers.
        causal: Must be True: the definition has no other form.

    >>> LightningAttention(16, heads=4)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    normalize = False
    log_decay: Tensor

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        heads: Heads = 8,
        d_value: Width = None,
        short: Taps = 0,
        layer: int = 0,
        depth: int = 1,
        causal: bool = True,
    ) -> None:
        if not causal:
            raise ValueError("lightning: expected causal=True, the only form it is defined in, got causal=False")
        super().__init__(d_model, heads=heads, d_value=d_value, short=short, causal=True)
        factor = 1.0 if depth == 1 else 1 - layer / (depth - 1) + 1e-5
        self.register_buffer("log_decay", -factor * torch.tensor(alibi_slopes(heads)), persistent=False)
        self.norm = nn.LayerNorm(self.d_value)
        self.gate = nn.Sequential(
            nn.Linear(d_model, self.head_width, bias=False), nn.Linear(self.head_width, self.d_value, bias=False)
        )

    def features(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``y: (..., 3V)`` into queries, keys and values ``(..., H, Z)``, SiLU on each.

        The short convolution has SiLU already: then it is not taken twice, as in other systems that have one.
        """
        q, k, v = self.split(y)
        if self.short is not None:
            return q, k, v
        return F.silu(q), F.silu(k), F.silu(v)

    def edges(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the fixed log λ ``(H,)``, and none back."""
        return self.log_decay, None

    def merge(self, o: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise ``o: (..., H, Z)`` and gate it by x; return ``(..., D)``, 0 at padding."""
        gated = self.norm(o.flatten(-2)) * torch.sigmoid(self.gate(x))
        return super().merge(gated.view_as(o), x, mask)


def alibi_slopes(heads: int) -> list[float]:
    """Return ALiBi's slopes (arXiv 2108.12409, section 3): from steep to flat, 2^(−8h/H) for h = 1 … H.

    When H is no power of two, the slopes of the next lower power P come first, then every other one of those for 2·P.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 1 << int(math.log2(heads))
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-4 * h / power) for h in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]


MIXER = LightningAttention
