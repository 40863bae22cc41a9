"""Whole networks: a backbone of blocks and a head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from chela.schema import ModelConfig


def build_model(config: ModelConfig, task: Any, seed: int) -> nn.Module:
    """Build and initialise the network that ``config`` describes for a task.

    Args:
        config: The resolved model section.
        task: What of a task a network must know: ``num_classes``, ``l_max``, ``vocab_size`` (None for continuous
            input), ``input_dim`` and ``pair``.
        seed: Initial values follow from it and from each module's path.
    """
    import dataclasses

    from chela.layers.initialise import initialise
    from chela.models.backbone import Backbone
    from chela.models.heads import Classifier, PairClassifier

    options = dataclasses.asdict(config.mixer)
    backbone = Backbone(
        options.pop("name"),
        options,
        d_model=config.d_model,
        depth=config.depth,
        d_ff=config.d_ff,
        l_max=task.l_max,
        vocab_size=task.vocab_size,
        input_dim=task.input_dim,
        dropout=config.dropout,
        norm=config.norm,
        prenorm=config.prenorm,
        positions=config.positions,
        causal=config.causal,
    )
    if task.pair:
        model: nn.Module = PairClassifier(
            backbone, config.d_model, config.d_head, task.num_classes, config.pair_features
        )
    else:
        model = Classifier(backbone, config.d_model, config.d_head, task.num_classes)
    initialise(model, seed)
    return model
