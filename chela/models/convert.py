"""From a trained softmax network to a linear one: Hedgehog's two stages (arXiv 2402.04347, section 4.2).

::

    student = convert(teacher)
    for parameter in feature_maps(student): …            first: these alone, by distillation_loss(teacher, student, …)
    then all of the student, on its task
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from chela.layers.distill import attention_distillation_loss, hedgehog_from_softmax
from chela.layers.mixers.hedgehog import HedgehogAttention
from chela.layers.mixers.softmax import SoftmaxAttention
from chela.layers.padding import zero_padding
from chela.schema import HedgehogConfig


def convert(teacher: nn.Module) -> nn.Module:
    """Return a copy of ``teacher`` with a Hedgehog layer of the same projections in the place of every softmax layer.

    Raises:
        ValueError: There is no softmax layer in it.
    """
    student: Any = copy.deepcopy(teacher)
    places = [name for name, module in student.named_modules() if isinstance(module, SoftmaxAttention)]
    if not places:
        raise ValueError("convert: expected a network with SoftmaxAttention layers, there is none in it")
    for name in places:
        owner, _, attribute = name.rpartition(".")
        layer = student.get_submodule(name)
        assert isinstance(layer, SoftmaxAttention)
        if not name:  # the network is that layer
            return hedgehog_from_softmax(layer)
        setattr(student.get_submodule(owner), attribute, hedgehog_from_softmax(layer))
    built_from = getattr(student, "built_from", None)
    if built_from is not None:  # so that save_pretrained says what it is now
        config, facts = built_from
        mixer = HedgehogConfig(heads=config.mixer.heads, d_value=config.mixer.d_value, rotary=config.mixer.rotary)
        student.built_from = dataclasses.replace(config, name="hedgehog", mixer=mixer), facts
    converted: nn.Module = student
    return converted


def feature_maps(student: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that the first stage trains."""
    for module in student.modules():
        if isinstance(module, HedgehogAttention):
            yield from module.query_map.parameters()
            yield from module.key_map.parameters()


def distillation_loss(teacher: nn.Module, student: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average ``attention_distillation_loss`` over all layers, each on the teacher's own activations.

    Args:
        teacher: A network with softmax layers, called as ``teacher(inputs, mask)``, without gradients.
        student: What ``convert(teacher)`` returned.
        inputs: As the network takes them.
        mask: ``(B, L)`` bool, True = real token.

    Returns:
        A scalar; gradients reach the student's projections and feature maps.
    """
    losses = []
    for name, layer, x in _heard(teacher, inputs, mask):
        learner = student.get_submodule(name)
        assert isinstance(learner, HedgehogAttention), name
        x = zero_padding(x, mask)  # as the layers do with what they are given
        with torch.no_grad():
            q, k, _ = layer.queries_keys_values(x)
        student_q, student_k, _ = learner.features(x)
        losses.append(attention_distillation_loss(q, k, student_q, student_k, causal=layer.causal, mask=mask))
    return torch.stack(losses).mean()


@torch.no_grad()
def _heard(teacher: nn.Module, inputs: Tensor, mask: Tensor | None) -> list[tuple[str, SoftmaxAttention, Tensor]]:
    """Run the teacher; return the name of each softmax layer, the layer, and what it was given."""
    heard: list[tuple[str, SoftmaxAttention, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: heard.append((name, layer, args[0])))
        for name, layer in teacher.named_modules()
        if isinstance(layer, SoftmaxAttention)
    ]
    try:
        teacher(inputs, mask)
    finally:
        for hook in hooks:
            hook.remove()
    return heard
