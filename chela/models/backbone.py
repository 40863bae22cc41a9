"""The part that is the same for every system: embedding, blocks, norm.

Shapes: B batch, L length, D model width.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chela.core.errors import UsageError
from chela.layers.mixers import build_mixer
from chela.layers.norm import NORMS
from chela.layers.param_groups import seeded
from chela.layers.stages import feed_forward, recompute_contexts
from chela.layers.state import State, nested, part
from chela.ops.padding import zero_padding
from chela.ops.sequence_parallel import current

if TYPE_CHECKING:
    from chela.config.schema import ModelConfig
    from chela.models import TaskFacts


class Residual(nn.Module):
    """``x + dropout(layer(norm(x)))``: a layer with its norm, dropout and residual sum.

    Of ``forward(x, mask=None, stream=None)`` the layer gets those that it names. If its constructor takes ``dropout``,
    it applies that itself. Without ``config.prenorm`` the norm comes after the sum.
    """

    def __init__(self, layer: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.layer: Any = layer
        self.norm = NORMS[config.norm](config.d_model)
        self.dropout = nn.Dropout(0.0 if "dropout" in inspect.signature(type(layer)).parameters else config.dropout)
        self.prenorm = config.prenorm
        _, *others = inspect.signature(layer.forward).parameters.values()
        self.context = tuple(other.name for other in others if other.name in ("mask", "stream"))
        if any(other.default is other.empty and other.name not in self.context for other in others):
            named = ", ".join(other.name for other in others)
            raise ValueError(f"{type(layer).__name__}: expected forward(x, mask, stream) or fewer, got (x, {named})")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update ``x: (B, L, D)``."""
        y = self.norm(x, mask) if self.prenorm else x
        known = {"mask": mask, "stream": x}
        return self._sum(x, self.layer(y, **{name: known[name] for name in self.context}), mask)

    def start(self, batch: int) -> State:
        """Return the layer's state before the first token; a layer without states is a UsageError."""
        for method in ("start", "prefill", "step"):
            if not hasattr(self.layer, method):
                what = f"expected a method {method}, to go on token by token (docs/extend.md)"
                raise UsageError(f"{type(self.layer).__name__}: {what}, got none")
        return self.layer.start(batch)  # type: ignore[no-any-return]

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Update the tokens ``x: (B, L, D)`` that follow those of ``state``, or one token ``(B, D)``."""
        y = self.norm(x) if self.prenorm else x
        feed = self.layer.prefill if x.ndim == 3 else self.layer.step
        update, state = feed(y, state, **({"stream": x} if "stream" in self.context else {}))
        return self._sum(x, update), state

    def _sum(self, x: Tensor, update: Tensor, mask: Tensor | None = None) -> Tensor:
        if getattr(update, "shape", None) != x.shape:
            got = f"shape {tuple(update.shape)}" if isinstance(update, Tensor) else f"a {type(update).__name__}"
            raise UsageError(f"{type(self.layer).__name__}: expected an update of shape {tuple(x.shape)}, got {got}")
        if update.dtype is torch.float64 is not x.dtype:  # the next layer would fail, far from the cause
            raise UsageError(f"{type(self.layer).__name__}: expected an update of {x.dtype}, got {update.dtype}")
        x = x + self.dropout(update)
        return x if self.prenorm else self.norm(x, mask)


class FeedForward(nn.Module):
    """Two linear maps with SiLU between: ``(B, L, D)`` over width d_ff to ``(B, L, D)``; O(L·D·d_ff) time."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token of ``x: (B, L, D)``."""
        return feed_forward(self.down, self.up(x))


class Block(nn.Module):
    """A mixer over positions, then a feed-forward layer unless its width is 0: ``(B, L, D)`` to ``(B, L, D)``."""

    def __init__(self, mixer: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.mixer = Residual(mixer, config)
        self.feed_forward = Residual(FeedForward(config.d_model, config.d_ff), config) if config.d_ff else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update ``x: (B, L, D)``."""
        x = self.mixer(x, mask)
        return x if self.feed_forward is None else self.feed_forward(x, mask)  # type: ignore[no-any-return]

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Update the tokens ``x: (B, L, D)`` that follow those of the mixer's ``state``, or one token ``(B, D)``."""
        x, state = self.mixer.advance(x, state)
        return x if self.feed_forward is None else self.feed_forward(x), state


class Backbone(nn.Module):
    """Embedding and blocks: symbols ``(B, L)`` or features ``(B, L, F)`` to ``(B, L, D)``, zero at padding.

    Each mixer is built from a seed of its own, made of torch's and of its place.
    """

    def __init__(self, config: ModelConfig, task: TaskFacts) -> None:
        super().__init__()
        self.l_max, d_model = task.l_max, config.d_model
        self.checkpoint_blocks = False  # set it: the backward pass recomputes each block from its input
        symbols = task.vocab_size
        self.embedding = nn.Linear(task.input_dim, d_model) if symbols is None else Embedding(symbols, d_model)
        self.positions = Embedding(task.l_max, d_model) if config.positions == "learned" else None
        options = dataclasses.asdict(config.mixer)
        name = options.pop("name")
        context = {"l_max": task.l_max, "causal": config.causal, "depth": config.depth, "dropout": config.dropout}
        self.blocks: Any = nn.ModuleList()
        for layer in range(config.depth):
            with seeded(torch.initial_seed(), f"blocks.{layer}.mixer"):
                mixer = build_mixer(name, d_model, options, layer=layer, **context)
            self.blocks.append(Block(mixer, config))
        if config.causal and ":" in name and task.l_max > 1:  # ours have tests
            self._expect_no_look_ahead(min(task.l_max, 1024), d_model)
        self.norm = NORMS[config.norm](d_model) if config.prenorm else None

    @torch.no_grad()
    def _expect_no_look_ahead(self, length: int, d_model: int) -> None:
        """Check a user's causal system: a change of the last token must not change what it gives the others."""
        own = self.blocks[0].get_submodule("mixer").eval()
        x = torch.randn(1, length, d_model, generator=torch.Generator().manual_seed(0)).to(self.embedding.weight)
        before, after = (own(torch.cat([x[:, :-1], last], dim=1))[:, :-1] for last in (x[:, -1:], -x[:, -1:]))
        own.train()
        known = type(before) is Tensor and not before.is_meta  # else only shapes are asked for
        if known and not torch.allclose(before, after, rtol=1e-3, atol=1e-4):
            raise UsageError(
                f"{type(own.layer).__name__}: expected a layer that looks back only, as model.causal=true wants, got "
                "one whose output changes with a later token"
            )

    def mixers(self) -> list[nn.Module]:
        """Return the mixer of each block."""
        return [block.mixer.layer for block in self.blocks]

    def ends(self) -> str:
        """Name what cannot go beyond ``l_max``, even token by token: learned positions, or a system; else empty."""
        if self.positions is not None:
            return "learned positions"
        return next((type(mixer).__name__ for mixer in self.mixers() if getattr(mixer, "ends", False)), "")

    def expect_sequence_parallel(self) -> None:
        """Refuse a system that mixes positions by more than the ops: only these work on pieces of a sequence."""
        for mixer in self.mixers():
            if not getattr(mixer, "in_pieces", False):
                raise UsageError(
                    "trainer.sequence_parallel: expected a system that can spread a sequence over processes (chela, "
                    f"hedgehog, lightning, linear, lion, s4d), {type(mixer).__name__} cannot; set it to 1"
                )

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode ``inputs`` of up to ``l_max`` positions; ``mask: (B, L)`` bool, True = real token."""
        piece = current()
        if piece is not None:
            self.expect_sequence_parallel()
        length = inputs.shape[1] if piece is None else piece.length
        if length > self.l_max:
            states = all(hasattr(mixer, "prefill") and getattr(mixer, "causal", True) for mixer in self.mixers())
            more = " or give the rest to prefill" if states and not self.ends() else ""
            raise ValueError(
                f"expected at most l_max={self.l_max} tokens, got {length}; build with a larger l_max{more}"
            )
        if inputs.is_floating_point():
            inputs = zero_padding(inputs, mask)  # NaN there would reach the gradient of the embedding
        x: Tensor = self.embedding(inputs)
        if self.positions is not None:
            start = 0 if piece is None else piece.start
            x = x + self.positions.weight[start : start + x.shape[1]]
        x = zero_padding(x, mask)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False, context_fn=recompute_contexts)
            else:
                x = block(x, mask)
        if self.norm is not None:
            x = self.norm(x, mask)
        return zero_padding(x, mask)

    def start(self, batch: int) -> State:
        """Return the state before the first token: ``position``, and ``blocks.0.…`` of each mixer."""
        state = {"position": torch.zeros(batch, dtype=torch.int64)}
        for i, block in enumerate(self.blocks):
            state |= nested(f"blocks.{i}", block.mixer.start(batch))
        return state

    def advance(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode the inputs that follow those of ``state``: ``(B, L)`` or ``(B, L, F)``, one token without the L."""
        x: Tensor = self.embedding(inputs)
        new = 1 if x.ndim == 2 else x.shape[1]
        if self.positions is not None:
            start = int(state["position"][0])
            if start + new > self.l_max:
                raise ValueError(
                    f"expected at most l_max={self.l_max} tokens, got {start + new}: learned positions end there; "
                    "build with a larger l_max, or with model.positions=none"
                )
            x = x + self.positions.weight[start : start + new].view(x.shape[1:])
        after = {"position": state["position"] + new}
        for i, block in enumerate(self.blocks):
            x, end = block.advance(x, part(f"blocks.{i}", state))
            after |= nested(f"blocks.{i}", end)
        return x if self.norm is None else self.norm(x), after


class Embedding(nn.Embedding):
    """A table of vectors ~ N(0, 1 / D), MEGA's (arXiv 2209.10655), so that a token starts with length about 1."""

    def reset_parameters(self) -> None:
        """Draw the table."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
