"""Whole networks: the backbone, and a head that scores each sequence or each position."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chela.layers.state import State, expect_causal
from chela.models.backbone import Backbone
from chela.ops.sequence_parallel import current

if TYPE_CHECKING:
    from chela.config.schema import ModelConfig
    from chela.models import TaskFacts


def mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean ``(B, D)`` of the real tokens of each sequence ``x: (B, L, D)``.

    A row without real tokens gives zeros. Of a piece of the sequence, the mean is over all of it.
    """
    piece = current()
    if mask is None and piece is None:
        return x.mean(1)
    weight = x.new_ones(*x.shape[:2], 1) if mask is None else mask.unsqueeze(-1).to(x.dtype)
    total, count = (x * weight).sum(1), weight.sum(1)
    if piece is not None:
        sums = piece.gather(torch.cat([total, count], dim=-1)).sum(0)
        total, count = sums[:, :-1], sums[:, -1:]
    return total / count.clamp(min=1)


class Network(nn.Module):
    """What all networks share: ``network(inputs, mask)``, mask ``(B, L)`` bool being True on real tokens, or None.

    Inputs are symbols ``(B, L)`` or features ``(B, L, F)``. ``built_from`` is the model section of a configuration, and
    what is known of the task; ``labels`` are the names of its classes, ``encoding`` its own name and options.
    """

    labels: list[str]
    encoding: dict[str, Any]

    def __init__(self, config: ModelConfig, task: TaskFacts) -> None:
        super().__init__()
        self.built_from = config, task
        self.backbone = Backbone(config, task)


class Classifier(Network):
    """The mean of each sequence, a hidden layer unless ``d_head`` is 0, then scores ``(B, classes)``.

    A task of pairs gives 2B sequences, first all the first ones. Then the head reads [a, b, a−b, a⊙b] (S4's,
    ``pair_features="nli"``) or [a, b] (MEGA's, "concat").
    """

    def __init__(self, config: ModelConfig, task: TaskFacts) -> None:
        super().__init__(config, task)
        self.pair_features = config.pair_features if task.pair else None
        width = {None: 1, "nli": 4, "concat": 2}[self.pair_features] * config.d_model
        hidden = {"hidden": nn.Linear(width, config.d_head), "silu": nn.SiLU()} if config.d_head else {}
        self.head = nn.Sequential(OrderedDict(**hidden, out=nn.Linear(config.d_head or width, task.num_classes)))

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Score each sequence, or each pair."""
        x = mean(self.backbone(inputs, mask), mask)
        if self.pair_features is not None:
            a, b = x.chunk(2)
            x = torch.cat([a, b, a - b, a * b] if self.pair_features == "nli" else [a, b], dim=-1)
        return self.head(x)  # type: ignore[no-any-return]


class TokenModel(Network):
    """One linear map at each position: to scores ``(B, L, classes)``, which mean nothing at padding.

    A causal network can go on from a state, a flat dict of tensors (see ``chela.layers.state``), beyond l_max too where
    its system can.

    >>> from chela.config.compose import resolve
    >>> from chela.models import TaskFacts, build_model
    >>> task = TaskFacts(num_classes=9, l_max=20, vocab_size=9, objective="tokens")
    >>> network = build_model(resolve(["preset=tiny", "model.causal=true"]).model, task, seed=0).eval()
    >>> scores, state = network.prefill(torch.randint(1, 9, (2, 50)))
    >>> scores.shape, network.step(scores[:, -1].argmax(-1), state)[0].shape
    (torch.Size([2, 50, 9]), torch.Size([2, 9]))
    """

    def __init__(self, config: ModelConfig, task: TaskFacts) -> None:
        if config.causal and config.norm == "batch":
            raise ValueError("norm: expected another than batch with causal=True: its statistics tell of later tokens")
        super().__init__(config, task)
        self.causal = config.causal
        self.head = nn.Linear(config.d_model, task.num_classes)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Score each position."""
        return self.head(self.backbone(inputs, mask))  # type: ignore[no-any-return]

    def start(self, batch: int) -> State:
        """Return the state before the first token; a RuntimeError if the network looks ahead."""
        expect_causal(self)
        return self.backbone.start(batch)

    def prefill(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Score the inputs that follow those of ``state``; return scores ``(B, L, classes)`` and the new state.

        They are the scores of ``forward``, and have gradients; the new state has none, as truncated back-propagation
        wants it. ``state`` is not changed; None is the start. All tokens are real. More of them than learned positions,
        or the system, can have are a ValueError.
        """
        x, state = self.backbone.advance(inputs, self.start(len(inputs)) if state is None else state)
        return self.head(x), state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Score after one token more, ``(B,)`` or ``(B, F)``; return scores ``(B, classes)`` and the new state.

        The tensors of ``state`` may be written to: clone them to branch. In eval mode long kernels are built once.
        """
        x, state = self.backbone.advance(tokens, state)
        return self.head(x), state
