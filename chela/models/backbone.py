"""The part that is the same for every system: embedding, blocks, pooling.

Shapes: B batch, L length, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chela.layers.feed_forward import FeedForward
from chela.layers.mixers import build_mixer
from chela.layers.norm import make_norm
from chela.layers.padding import zero_padding


class Residual(nn.Module):
    """A layer with its norm, dropout and residual sum.

    ``x + h``, or ``x + g ⊙ (h − x)`` when the layer returns a highway gate g beside its update h.

    Args:
        layer: Called as ``layer(x, mask)`` on the normed input when it is a mixer, as ``layer(x)`` otherwise.
        d_model: Width D.
        norm: Name of the norm.
        prenorm: Norm before the layer; else after the sum.
        dropout: On the update.
    """

    def __init__(self, layer: nn.Module, d_model: int, *, norm: str, prenorm: bool, dropout: float) -> None:
        super().__init__()
        self.layer = layer
        self.norm = make_norm(norm, d_model)
        self.dropout = nn.Dropout(dropout)
        self.prenorm = prenorm
        self.takes_mask = not isinstance(layer, FeedForward)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update ``x: (B, L, D)``."""
        y = self.norm(x, mask) if self.prenorm else x
        update = self.layer(y, mask) if self.takes_mask else self.layer(y)
        h, gate = update if isinstance(update, tuple) else (update, None)
        h = self.dropout(h)
        x = x + h if gate is None else torch.lerp(x, h.to(x.dtype), gate.to(x.dtype))  # autocast rounds both
        return x if self.prenorm else self.norm(x, mask)


class Block(nn.Module):
    """A mixer over positions, then a feed-forward layer over channels: ``(B, L, D)`` to ``(B, L, D)``."""

    def __init__(self, mixer: nn.Module, d_model: int, d_ff: int, *, norm: str, prenorm: bool, dropout: float) -> None:
        super().__init__()
        self.mixer = Residual(mixer, d_model, norm=norm, prenorm=prenorm, dropout=dropout)
        self.feed_forward = Residual(FeedForward(d_model, d_ff), d_model, norm=norm, prenorm=prenorm, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update ``x: (B, L, D)``."""
        out: Tensor = self.feed_forward(self.mixer(x, mask), mask)
        return out


class Backbone(nn.Module):
    """Embedding and blocks: symbols ``(B, L)`` or features ``(B, L, F)`` to ``(B, L, D)``, zero at padding.

    Args:
        mixer: Name of the system.
        options: The mixer's own keyword arguments.
        d_model: Width D.
        depth: Blocks.
        d_ff: Hidden width of the feed-forward layers.
        l_max: Longest sequence.
        vocab_size: Symbols; None for continuous input.
        input_dim: Features F of continuous input.
        dropout: On every update.
        norm: Name of the norm.
        prenorm: Norm before each layer, and once at the end; else after each residual sum.
        positions: "none" or "learned", added to the embedding.
        causal: No position sees a later one.
    """

    def __init__(
        self,
        mixer: str,
        options: dict[str, Any],
        *,
        d_model: int,
        depth: int,
        d_ff: int,
        l_max: int,
        vocab_size: int | None,
        input_dim: int = 1,
        dropout: float = 0.0,
        norm: str = "layer",
        prenorm: bool = True,
        positions: str = "none",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.l_max = l_max
        self.embedding = nn.Linear(input_dim, d_model) if vocab_size is None else Embedding(vocab_size, d_model)
        self.positions = Embedding(l_max, d_model) if positions == "learned" else None
        self.blocks = nn.ModuleList(
            Block(
                build_mixer(mixer, d_model, options, l_max=l_max, causal=causal, layer=layer, depth=depth),
                d_model,
                d_ff,
                norm=norm,
                prenorm=prenorm,
                dropout=dropout,
            )
            for layer in range(depth)
        )
        self.norm = make_norm(norm, d_model) if prenorm else None

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode ``inputs``; ``mask: (B, L)`` bool, True = real token.

        Raises:
            ValueError: A sequence longer than ``l_max``.
        """
        if inputs.shape[1] > self.l_max:
            raise ValueError(
                f"expected at most l_max={self.l_max} tokens, got {inputs.shape[1]}; build with a larger l_max"
            )
        if inputs.is_floating_point():
            inputs = zero_padding(inputs, mask)  # or NaN there would be in the embedding's gradient
        x: Tensor = self.embedding(inputs)
        if self.positions is not None:
            x = x + self.positions.weight[: x.shape[1]]
        x = zero_padding(x, mask)
        for block in self.blocks:
            x = block(x, mask)
        if self.norm is not None:
            x = self.norm(x, mask)
        return zero_padding(x, mask)


class Embedding(nn.Embedding):
    """A table of vectors ~ N(0, 1 / D), MEGA's (arXiv 2209.10655), so that a token starts with length about 1."""

    def reset_parameters(self) -> None:
        """Draw the table."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
