"""The linear transformer (arXiv 2006.16236), and what other systems of linear attention inherit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from chela.layers.attention import MultiHead, elu_plus_one
from chela.layers.expect import expect_causal
from chela.layers.padding import zero_padding
from chela.ops.linear_attention import LinearAttentionState, linear_attention, linear_attention_step
from chela.ops.precision import accumulation_dtype


class LinearAttention(MultiHead):
    """Linear attention with elu + 1 features, normalised (arXiv 2006.16236, section 3.2).

    Per head, with φ(x) = elu(x) + 1::

        o_i = Σ_j (φ(q_i)·φ(k_j)) v_j / Σ_j φ(q_i)·φ(k_j)

    O(L·V·(D + Z)) time, O(L·V) memory; see ``MultiHead`` for the arguments and letters. A system that inherits from it
    has other ``features``, other ``edges``, or no ``normalize``.

    >>> import torch
    >>> LinearAttention(16)(torch.randn(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    feature_map: Callable[[Tensor], Tensor] = staticmethod(elu_plus_one)
    features_per_width = 1
    normalize = True

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x: (..., D)`` to φ(q), φ(k) and v, each ``(..., H, ·)``."""
        q, k, v = self.split(x)
        return self.feature_map(q), self.feature_map(k), v

    def edges(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return log λ of the edges t−1 → t and t → t−1, each ``(H,)`` or ``(B, L, H)``; None is no decay."""
        return None, None

    def forward(self, x: Tensor, mask: Tensor | None = None, stream: Tensor | None = None) -> Tensor:
        """Mix ``x: (B, L, D)`` over the tokens that are True in ``mask: (B, L)``; ``stream`` is not needed."""
        x = zero_padding(x, mask)
        q, k, v = self.features(x)
        forth, back = self.edges(x, mask)
        decays: dict[str, Any] = {"log_decay": forth, "log_decay_back": None if self.causal else back}
        o = linear_attention(q, k, v, causal=self.causal, mask=mask, normalize=self.normalize, **decays)
        return self.merge(self.attended(o), x, mask)

    def start(self, batch: int) -> Any:
        """Return the state before the first token, for ``step``.

        Raises:
            RuntimeError: The layer looks ahead, or turns by position, which a single token does not have.
        """
        expect_causal(self)
        if self.rotary:
            raise RuntimeError(f"{type(self).__name__}.step: expected rotary=False, since a step knows no position")
        like, width = self.out.weight, self.head_width
        sizes = batch, self.heads, self.features_per_width * width, width
        return LinearAttentionState.zeros(*sizes, device=like.device, dtype=accumulation_dtype(like.dtype))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Feed one token ``x: (B, D)``; return its output ``(B, D)`` and the new state."""
        edge, _ = self.edges(x, None)
        o, state = linear_attention_step(*self.features(x), state, log_decay=edge, normalize=self.normalize)
        return self.merge(o, x, None), state

    def state_size(self, length: int) -> int:
        """Count the numbers that ``step`` remembers of ``length`` tokens: the sums S and z."""
        return self.features_per_width * self.d_value * (self.head_width + 1)


MIXER = LinearAttention
