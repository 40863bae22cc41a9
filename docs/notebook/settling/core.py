"""Variants of CHELA's layer that the question "which core?" asks for; trained and scored, never stepped.

    chela train model=docs/notebook/settling/core.yaml task=listops model.mixer.begin=zero

Which question each option belongs to: docs/notebook/2026-12-06-settling-the-core.md.
"""

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.attention import Core, columns
from chela.layers.mixers.chela import ChelaLayer
from chela.layers.stages import gate
from chela.ops.linear_attention import linear_attention
from chela.ops.padding import zero_padding

torch.set_float32_matmul_precision("medium")  # products by oneDNN: twice as fast as MKL's on an EPYC, as exact

Width = Annotated[int, {"ge": 1, "le": 16384}]


class Out(nn.Linear):
    """W_o, whose first columns are drawn, halved or zero at the start."""

    def __init__(self, d_in: int, d_out: int, shares: list[tuple[int, float]]) -> None:
        self.shares = shares
        super().__init__(d_in, d_out)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all columns, and scale them."""
        super().reset_parameters()
        for (_, share), weight in zip(self.shares, self.weight.split([n for n, _ in self.shares], dim=1), strict=True):
            weight.mul_(share)


class FreeCore(Core):
    """Selecting heads with other features φ."""

    def __init__(self, *args: Any, phi: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.phi = phi

    def forward(self, c: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with all of ``c: (B, L, D)``; return ``(B, L, W)``."""
        z = self.project(c).unflatten(-1, (self.heads, -1))  # (B, L, H, Z)
        q, k = (self._features(z * gamma + beta) for gamma, beta in zip(self.gamma, self.beta, strict=True))
        values = F.silu(v).unflatten(-1, (self.heads, -1))
        o = linear_attention(q, k, values, causal=self.causal, mask=mask)
        return self.attended(self.norm(o.flatten(2)))

    def _features(self, y: Tensor) -> Tensor:
        match self.phi:
            case "identity":
                return y
            case "unit":
                return F.normalize(F.silu(y), dim=-1)
            case _:  # (q · k)², each product of two once
                i, j = torch.triu_indices(y.shape[-1], y.shape[-1], device=y.device)
                twice = torch.where(i == j, 1.0, 2**0.5).to(y.dtype)
                return y[..., i] * y[..., j] * twice


class Mean(nn.Module):
    """The mean of the values of all tokens, or of those so far: no queries, keys, features."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.width, self.causal, self.pools = width, causal, True
        self.norm = nn.LayerNorm(width)

    def forward(self, c: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean's norm at each position, ``(B, L, W)``."""
        v = zero_padding(F.silu(v), mask)
        real = v.new_ones(v.shape[:2]) if mask is None else mask.to(v.dtype)
        total, count = (
            (v.cumsum(1), real.cumsum(1)) if self.causal else (v.sum(1, keepdim=True), real.sum(1, keepdim=True))
        )
        return self.norm(total / count[..., None].clamp(min=1)).expand_as(v)


class Variant(ChelaLayer):
    """CHELA with one thing changed.

    Args:
        d_model: Width D.
        l_max: Longest sequence.
        causal: No position sees a later one.
        dropout: On h.
        d_qk: Width of queries and keys.
        d_value: Width of the values.
        heads: Selecting heads.
        qk: Stage of queries and keys.
        conv: Convolution before the attention.
        reparam: Short kernels beside the long one.
        pool: What a quarter of the values goes through: the pooling head, a plain mean, or the selecting heads.
        begin: Weights of W_o at the start.
        against: What g ⊙ (h − ·) takes away; ungated is h alone.
        phi: Features of the selecting heads.
    """

    in_pieces = False

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        causal: bool = False,
        dropout: float = 0.0,
        d_qk: Width = 32,
        d_value: Width = 128,
        heads: Width = 4,
        qk: Literal["short", "long"] = "short",
        conv: Literal["short-long", "long"] = "short-long",
        reparam: bool = True,
        pool: Literal["head", "mean", "none"] = "head",
        begin: Literal["drawn", "half", "zero", "select"] = "drawn",
        against: Literal["input", "stream", "nothing", "ungated"] = "input",
        phi: Literal["silu", "identity", "unit", "two"] = "silu",
    ) -> None:
        pooled = 0.0 if pool == "none" else 0.25
        attention: Any = "select" if pool == "none" else "both"
        super().__init__(
            d_model, l_max=l_max, causal=causal, dropout=dropout, d_qk=d_qk, d_value=d_value, pooled=pooled,
            heads=heads, qk=qk, conv=conv, reparam=reparam, attention=attention,
        )  # fmt: skip
        self.against = against
        widths = [core.width for core in self.cores]
        if phi != "silu":
            self.cores[0] = FreeCore(d_model, widths[0], heads, d_qk, pools=False, causal=causal, phi=phi)
        if pool == "mean":
            self.cores[1] = Mean(widths[1], causal)
        if begin != "drawn":
            share = 0.5 if begin == "half" else 0.0
            shares = [share, *[1.0 if begin == "select" else share] * (len(widths) - 1)]
            self.out = Out(d_value, d_model, list(zip(widths, shares, strict=True)))

    def forward(self, x: Tensor, mask: Tensor | None = None, stream: Tensor | None = None) -> Tensor:
        """Map ``x: (B, L, D)`` to the update ``(B, L, D)``."""
        x = zero_padding(x, mask)
        u, c = self.conv.stages(x, mask)
        values = columns(self.value(x), [core.width for core in self.cores])
        read = [u if self.qk == "short" and not core.pools else c for core in self.cores]
        parts = [core(z, v, mask) for core, z, v in zip(self.cores, read, values, strict=True)]
        o = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if self.against == "ungated":
            h = self.out(o * F.silu(self.gate_in(c))) + self.skip(c)
            return zero_padding(self.dropout(F.silu(h)), mask)
        taken = {"input": x, "stream": stream, "nothing": torch.zeros_like(x)}[self.against]
        return gate(o, c, taken, mask, (self.gate_in, self.out, self.skip, self.highway), self.dropout)

    def start(self, batch: int) -> Any:
        """Refuse: a variant is trained and scored only."""
        raise RuntimeError("a variant of the notebook has no step")


MIXER = Variant
