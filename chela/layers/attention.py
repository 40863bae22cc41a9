"""What the attention layers share: heads, rotary positions, feature maps, learned decays.

Shapes: B batch, L length, D model width, V width over all heads, H heads, Z = V / H. A decay λ ∈ (0, 1] is given as
log λ ≤ 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from chela.core.options import checked
from chela.layers.padding import zero_padding
from chela.layers.state import Stepwise
from chela.ops.sequence_parallel import first_position


class Attended(nn.Identity):
    """What attention gave each position, ``(B, L, …)``: where a probe listens, or puts something else."""


class MultiHead(Stepwise):
    """``[q, k, v] = W x`` per head, and ``h = W_o o``.

    Args:
        d_model: Width D.
        heads: Attention heads H.
        d_value: Width V of queries, keys and values, all heads together; None is D.
        causal: No position sees a later one.

    Raises:
        ValueError: V is no multiple of H.
    """

    rotary = False

    @checked
    def __init__(
        self,
        d_model: int,
        *,
        heads: Annotated[int, {"ge": 1, "le": 256}] = 4,
        d_value: Annotated[int | None, {"ge": 1, "le": 16384}] = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        d_value = d_model if d_value is None else d_value
        if d_value % heads:
            raise ValueError(f"d_value: expected a multiple of heads={heads}, got {d_value}")
        self.heads, self.d_value, self.causal = heads, d_value, causal
        self.head_width = d_value // heads
        self.qkv = nn.Linear(d_model, 3 * d_value)
        self.out = nn.Linear(d_value, d_model)
        self.attended = Attended()

    def set_rotary(self, rotary: bool) -> None:
        """Say whether ``split`` turns queries and keys by their position, which needs an even width of a head."""
        width = self.head_width
        if rotary and width % 2:
            raise ValueError(f"rotary: expected an even width of a head, got {width}; change d_value or heads")
        self.rotary = rotary

    def split(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x: (..., D)`` to queries, keys and values ``(..., H, Z)``, turned by position if ``rotary``.

        ``start`` is the position of the first token; x is ``(B, L, D)`` if it is turned.
        """
        q, k, v = (rearrange(t, "... (h z) -> ... h z", h=self.heads) for t in columns(self.qkv(x), self.d_value))
        start += first_position()
        return (rotate(q, start), rotate(k, start), v) if self.rotary else (q, k, v)

    def merge(self, o: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map ``o: (..., H, Z)`` to ``(..., D)``, 0 at padding; a system may gate it by the input ``x: (..., D)``."""
        return zero_padding(self.out(o.flatten(-2)), mask)

    def extra_repr(self) -> str:
        """Show what no submodule shows."""
        return f"heads={self.heads}, causal={self.causal}"


def columns(x: Tensor, sizes: int | list[int]) -> list[Tensor]:
    """Cut ``x: (..., W)`` into parts of so many columns each, on a CPU into copies with rows of their own.

    Where rows lie apart, PyTorch takes what is left of each after the last 32 columns number by number: SiLU of 20
    columns out of 72 takes seven times as long as in rows that follow one another.

    >>> [tuple(part.shape) for part in columns(torch.randn(2, 10, 72), [52, 20])]
    [(2, 10, 52), (2, 10, 20)]
    """
    return [part.contiguous() if x.device.type == "cpu" else part for part in torch.split(x, sizes, dim=-1)]


def rotate(x: Tensor, start: int = 0, base: float = 10_000.0) -> Tensor:
    """Turn each pair of features, i and i + Z/2, by an angle that grows with the position (arXiv 2104.09864).

    Args:
        x: ``(B, L, H, Z)``, Z even.
        start: Position of the first token.
        base: The slowest pair turns by about 1/base a position.

    Returns:
        ``(B, L, H, Z)`` in the dtype of x; angles are computed in at least float32.
    """
    length, heads, width = x.shape[1:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rates = base ** (-torch.arange(0, width, 2, device=x.device, dtype=dtype) / width)
    angles = torch.arange(start, start + length, device=x.device, dtype=dtype)[:, None, None] * rates
    # One factor for each number of a record, so that a product is one long loop.
    cos = torch.cat([angles.cos()] * 2, dim=-1).expand(-1, heads, -1).contiguous().to(x.dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).expand(-1, heads, -1).contiguous().to(x.dtype)
    return torch.addcmul(x * cos, x.roll(width // 2, dims=-1), sin)


def elu_plus_one(x: Tensor) -> Tensor:
    """Return elu(x) + 1, positive (arXiv 2006.16236, equation 7)."""
    return F.elu(x) + 1


def shifted_silu(x: Tensor) -> Tensor:
    """Return (SiLU(x) + 0.5) / ‖SiLU(x) + 0.5‖ over the last dimension, positive (arXiv 2502.16249)."""
    return F.normalize(F.silu(x) + 0.5, dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "silu": F.silu,
    "shifted_silu": shifted_silu,
    "identity": torch.positive,
}
"""Feature maps φ of linear attention; only with positive ones can the sum of the weights be divided by."""


class FixedDecay(nn.Module):
    """A fixed decay per head, log λ = −slope·(1 − layer/(depth − 1) + 1e-5): deeper layers look further.

    The slopes are ALiBi's; the factor is 1 when there is one layer (arXiv 2401.04658, 2405.17381).
    """

    log_decay: Tensor

    def __init__(self, heads: int, layer: int, depth: int) -> None:
        super().__init__()
        factor = 1.0 if depth == 1 else 1 - layer / (depth - 1) + 1e-5
        self.register_buffer("log_decay", -factor * torch.tensor(alibi_slopes(heads)), persistent=False)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Return ``log_decay: (H,)``, whatever x is."""
        return self.log_decay


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


class HeadDecay(nn.Module):
    """A learned decay per head, log λ = −softplus(a) ≤ 0, with the heads' initial reach spread from near to far."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spread the heads' reach 1 / (1 − λ) over about 4 to 1,000 tokens, on a log scale."""
        with torch.no_grad():
            self.raw.copy_(torch.log(torch.expm1(_spread(self.raw.numel()))))

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Return ``log_decay: (H,)``, whatever x is."""
        return -F.softplus(self.raw)


class TokenDecay(nn.Linear):
    """A decay per token and head, λ = σ(W x + b); the biases start spread as those of ``HeadDecay``, W ~ N(0, 0.1²)."""

    def reset_parameters(self) -> None:
        """Draw W and set the biases."""
        nn.init.normal_(self.weight, std=0.1)
        with torch.no_grad():
            self.bias.copy_(-torch.log(torch.expm1(_spread(self.bias.numel()))))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x: (..., D)`` to log λ ``(..., H)``."""
        return F.logsigmoid(super().forward(x))


def make_decay(name: str, d_model: int, heads: int, layer: int, depth: int) -> nn.Module | None:
    """Build the decay called "fixed", "learned" (per head), "token" or "none": ``decay(x: (..., D))`` is log λ."""
    if name == "none":
        return None
    if name == "fixed":
        return FixedDecay(heads, layer, depth)
    return HeadDecay(heads) if name == "learned" else TokenDecay(d_model, heads)


def _spread(heads: int) -> Tensor:
    """Return −log λ from 10^−0.6 to 10^−3, log-spaced."""
    return torch.logspace(-0.6, -3, heads)
