"""Whole networks: a backbone of blocks and a head."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from chela.core.options import option

if TYPE_CHECKING:
    from chela.config.schema import ModelConfig
    from chela.models.heads import Network


@dataclasses.dataclass(frozen=True)
class TaskFacts:
    """What a network must know of its task.

    Attributes:
        num_classes: Classes, or symbols to predict.
        l_max: Longest sequence.
        vocab_size: Symbols, padding 0 included; None for continuous input.
        input_dim: Features at each position of continuous input.
        pair: Whether an example is two sequences.
        objective: "classification" (a label for each sequence) or "tokens" (a label for each position).
        alphabet: For text, the characters that the ids 1, 2, … stand for; one stands for the byte of its number.
    """

    num_classes: int
    l_max: int
    vocab_size: int | None
    input_dim: int = 1
    pair: bool = False
    objective: str = option("classification", "what is predicted", neutral="classification")
    alphabet: str = option("", "the characters of ids 1, 2, …", neutral="")


def build_model(config: ModelConfig, task: Any, seed: int) -> Network:
    """Build and initialise the network that ``config`` describes for a task.

    Args:
        config: The resolved model section.
        task: ``TaskFacts``, or anything that has these attributes; those with a default may be absent.
        seed: Initial values follow from it and from each module's path.

    Raises:
        UsageError: Options that do not fit together, such as a width that the heads do not divide.
    """
    from chela.core.errors import UsageError
    from chela.core.options import check_options
    from chela.layers.param_groups import initialise, seeded
    from chela.models.heads import Classifier, TokenModel

    known = (field.name for field in dataclasses.fields(TaskFacts) if hasattr(task, field.name))
    facts = TaskFacts(**{name: getattr(task, name) for name in known})
    head = {"classification": Classifier, "tokens": TokenModel}.get(facts.objective)
    if head is None or (facts.pair and facts.objective == "tokens"):
        what = f"{facts.objective!r}{' for pairs' if facts.pair else ''}"
        raise UsageError(f"task: expected the objective classification, or tokens for single sequences, got {what}")
    try:
        check_options(config)
        with seeded(seed, "build"):
            model = head(config, facts)
    except ValueError as error:
        raise UsageError(f"model: {error}") from None
    model.labels, model.encoding = [*getattr(task, "classes", ())], dict(getattr(task, "encoding", {}))
    own = ":" in config.mixer.name  # a class from elsewhere stays as its constructor made it
    initialise(model, seed, kept=model.backbone.mixers() if own else ())
    return model
