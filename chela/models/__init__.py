"""Whole networks: a backbone of blocks and a head."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from chela.schema import ModelConfig


@dataclasses.dataclass(frozen=True)
class TaskFacts:
    """What a network must know of its task.

    Attributes:
        num_classes: Classes.
        l_max: Longest sequence.
        vocab_size: Symbols, padding 0 included; None for continuous input.
        input_dim: Features at each position of continuous input.
        pair: Whether an example is two sequences.
    """

    num_classes: int
    l_max: int
    vocab_size: int | None
    input_dim: int = 1
    pair: bool = False


def build_model(config: ModelConfig, task: Any, seed: int) -> nn.Module:
    """Build and initialise the network that ``config`` describes for a task.

    Args:
        config: The resolved model section.
        task: ``TaskFacts``, or anything that has these attributes.
        seed: Initial values follow from it and from each module's path.

    Raises:
        UsageError: Options that do not fit together, such as a width that the heads do not divide.

    Returns:
        The network; its attribute ``built_from`` is ``(config, facts)``, which ``save_pretrained`` writes down.
    """
    from chela.errors import UsageError
    from chela.layers.initialise import initialise
    from chela.models.backbone import Backbone
    from chela.models.heads import Classifier, PairClassifier

    facts = TaskFacts(**{field.name: getattr(task, field.name) for field in dataclasses.fields(TaskFacts)})
    options = dataclasses.asdict(config.mixer)
    try:
        backbone = Backbone(
            options.pop("name"),
            options,
            d_model=config.d_model,
            depth=config.depth,
            d_ff=config.d_ff,
            l_max=facts.l_max,
            vocab_size=facts.vocab_size,
            input_dim=facts.input_dim,
            dropout=config.dropout,
            norm=config.norm,
            prenorm=config.prenorm,
            positions=config.positions,
            causal=config.causal,
        )
    except ValueError as error:
        raise UsageError(f"model: {error}") from None
    if facts.pair:
        model: Classifier | PairClassifier = PairClassifier(
            backbone, config.d_model, config.d_head, facts.num_classes, config.pair_features
        )
    else:
        model = Classifier(backbone, config.d_model, config.d_head, facts.num_classes)
    initialise(model, seed)
    model.built_from = config, facts
    return model
