"""In which context a text is scored: every symbol of a split once, from as much of what stands before it as is said."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from chela.core.errors import UsageError
from chela.models.generate import generate
from chela.models.heads import TokenModel
from lra.batches import Batch
from lra.datamodule import LRADataModule
from lra.texts import in_words

SAMPLE = 400  # symbols


@dataclass(frozen=True)
class Reading:
    """How a text is read.

    Attributes:
        context: "window": in windows, each alone; "stride": in windows that overlap, where a symbol counts in the first
            that has it; "stream": from the first symbol to the last, the network's state carried on.
        window: Symbols of a window, or of a piece of the stream; 0 is that of training.
        stride: Symbols from one window to the next; 0 is half a window.
    """

    context: str = "window"
    window: int = 0
    stride: int = 0

    def of(self, task: Any) -> tuple[int, int]:
        """Return window and stride on a task.

        Raises:
            UsageError: They do not fit together.
        """
        if not task.in_order:
            raise UsageError(f"eval.context: expected a run on a text, {task.name} is none; leave eval.… out")
        if self.stride and self.context != "stride":
            raise UsageError(f"eval.stride: expected eval.context=stride with it, got {self.context}")
        window = self.window or task.l_max
        stride = (self.stride or max(1, window // 2)) if self.context == "stride" else window
        if stride > window:
            raise UsageError(f"eval.stride: expected at most eval.window={window}, got {stride}")
        return window, stride

    def in_words(self, task: Any) -> str:
        """Say what a symbol is predicted from."""
        window, stride = self.of(task)
        if self.context == "stream":
            return f"one stream, all symbols before, read in pieces of {window:,}"
        return in_words(window, stride)


AS_IN_TRAINING = Reading()


def batches(data: LRADataModule, model: nn.Module, split: str, reading: Reading) -> Iterator[Batch]:
    """Yield the batches of a split read in this way.

    Raises:
        UsageError: The task is no text, or the network cannot read it so.
    """
    task: Any = data.task
    window, stride = reading.of(task)
    records = task.pieces(split, window, stride)
    if reading.context == "stream":
        expect_bounded(model, task.l_max, "eval.context=stream")
        return iter(data.in_order(records))
    if window <= task.l_max:
        return iter(data.evaluation(records))
    expect_prefill(model, f"eval.window={window}")
    data.eval_batch_size = max(1, data.eval_batch_size * task.l_max // window)
    return ({**batch, "beyond": True} for batch in data.evaluation(records))


def of_text(task: Any, split: str, reading: Reading, values: dict[str, float]) -> dict[str, Any]:
    """Return what is told of a text beside the columns; nothing for another task."""
    if not task.in_order:
        return {}
    told: dict[str, Any] = {"perplexity": math.exp(values["loss"]), "context": reading.in_words(task)}
    if words := task.words(split):
        nats = values["loss"] * values["count"]
        told |= {"words": words, "word_perplexity": math.exp(min(nats / words, 700.0))}
    return told


def sample(model: nn.Module, task: Any) -> str:
    """Return a text that the network writes; empty where it is no model of text, or has no states."""
    if not getattr(task, "alphabet", "") or not isinstance(model, TokenModel):
        return ""
    symbols = min(SAMPLE, task.l_max) if model.backbone.ends() else SAMPLE
    with contextlib.suppress(UsageError):  # a system of somebody's own without states
        return str(generate(model.eval(), task.before.decode(), symbols, temperature=0.8))[1:]
    return ""


def expect_prefill(model: nn.Module, key: str) -> None:
    """Expect a network that reads on from a state, for longer than it was built for.

    Raises:
        UsageError: It does not.
    """
    if not hasattr(model, "prefill"):
        raise UsageError(f"{key}: expected a network with prefill(inputs, state), {type(model).__name__} has none")
    ends = getattr(getattr(model, "backbone", None), "ends", str)()
    if ends == "learned positions":
        raise UsageError(f"{key}: expected model.positions=none, got learned ones, which end at the training window")
    if ends:
        raise UsageError(f"{key}: expected a system that reads on after the training window, {ends} ends there")


def expect_bounded(model: nn.Module, l_max: int, key: str) -> None:
    """Expect a network whose state does not grow with what it has read.

    Raises:
        UsageError: It does, or it cannot be told.
    """
    expect_prefill(model, key)
    for mixer in model.get_submodule("backbone").mixers():  # type: ignore[operator]
        size = getattr(mixer, "state_size", None)
        if size is None or size(4 * l_max) != size(8 * l_max):
            raise UsageError(
                f"{key}: expected a system whose state does not grow with the text, that of {type(mixer).__name__} "
                f"{'is of unknown size' if size is None else 'does'}"
            )
