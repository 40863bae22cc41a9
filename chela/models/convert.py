"""From a trained softmax network to a linear one: Hedgehog's two stages (arXiv 2402.04347, section 4.2).

::

    student = convert(teacher)
    for parameter in feature_maps(student): …      first train these alone, by distillation_loss(teacher, student, …)
    for parameter in student.parameters(): …       then all of the student, on its task
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from chela.layers.mixers import mixer_options
from chela.layers.mixers.hedgehog import HedgehogAttention, HedgehogFeatureMap
from chela.layers.mixers.softmax import SoftmaxAttention
from chela.ops.padding import zero_padding


def convert(teacher: nn.Module) -> nn.Module:
    """Return a copy of ``teacher`` whose softmax layers are Hedgehog layers with the same projections.

    Raises:
        ValueError: It has no softmax layer.
    """
    whole = nn.ModuleDict({"network": copy.deepcopy(teacher)})  # so that the network may itself be such a layer
    softmax = {name: layer for name, layer in whole.named_modules() if isinstance(layer, SoftmaxAttention)}
    if not softmax:
        raise ValueError("convert: expected a network with SoftmaxAttention layers, got one without")
    for name, layer in softmax.items():
        whole.set_submodule(name, hedgehog_from_softmax(layer))
    student: Any = whole["network"]
    if built_from := getattr(student, "built_from", None):  # so that save_pretrained says what it is now
        config, facts = built_from
        options = {name: getattr(config.mixer, name) for name in ("heads", "d_value", "rotary")}
        mixer = mixer_options("hedgehog")(**options)
        student.built_from = dataclasses.replace(config, name="hedgehog", mixer=mixer), facts
    return student  # type: ignore[no-any-return]


def hedgehog_from_softmax(teacher: SoftmaxAttention) -> HedgehogAttention:
    """Return a Hedgehog layer with the projections of ``teacher`` and untrained feature maps."""
    options = {name: getattr(teacher, name) for name in ("heads", "d_value", "rotary", "causal")}
    student = HedgehogAttention(teacher.qkv.in_features, **options).to(teacher.qkv.weight)
    student.load_state_dict(teacher.state_dict(), strict=False)  # all but the feature maps
    return student  # type: ignore[no-any-return]


def feature_maps(student: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that the first stage trains."""
    for module in student.modules():
        if isinstance(module, HedgehogFeatureMap):
            yield from module.parameters()


def distillation_loss(teacher: nn.Module, student: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average ``attention_distillation_loss`` over all layers, each on the teacher's own activations.

    Args:
        teacher: A network with softmax layers, called as ``teacher(inputs, mask)``, without gradients.
        student: What ``convert(teacher)`` returned; gradients reach its projections and feature maps.
        inputs: As the network takes them.
        mask: ``(B, L)`` bool, True = real token.
    """
    given: list[tuple[str, SoftmaxAttention, Tensor]] = []
    layers = {layer: name for name, layer in teacher.named_modules() if isinstance(layer, SoftmaxAttention)}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: given.append((layers[layer], layer, args[0])))
        for layer in layers
    ]
    try:
        with torch.no_grad():
            teacher(inputs, mask)
    finally:
        for hook in hooks:
            hook.remove()
    losses = []
    for name, layer, x in given:
        learner: Any = student.get_submodule(name)
        x = zero_padding(x, mask)  # as the layers do with what they are given
        q, k, _ = layer.split(x)
        student_q, student_k, _ = learner.features(x)
        losses.append(attention_distillation_loss(q, k, student_q, student_k, causal=layer.causal, mask=mask))
    return torch.stack(losses).mean()


def attention_distillation_loss(
    q: Tensor,
    k: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Return the cross-entropy of linear attention's weights under softmax attention's (2402.04347, equation 3).

    ``−Σ_j a_ij log b_ij``, averaged over heads and real queries i, with ``a_i = softmax_j(q_i·k_j / √Z)`` and
    ``b_ij = φ(q_i)·φ(k_j) / Σ_j φ(q_i)·φ(k_j)``. Its least value is the entropy of a. O(B·H·L²) time and memory. No
    gradient flows to the teacher.

    Args:
        q: The teacher's queries ``(B, L, H, Z)``.
        k: The teacher's keys ``(B, L, H, Z)``.
        student_q: Positive features of the student's queries ``(B, L, H, F)``.
        student_k: Positive features of the student's keys ``(B, L, H, F)``.
        causal: Whether a token attends only to itself and those before it.
        mask: ``(B, L)`` bool, True = real token.
        eps: Added to the student's weights and to their sum.

    >>> q, k = torch.randn(2, 1, 5, 1, 4).unbind()
    >>> bool(attention_distillation_loss(q, k, q.exp(), k.exp()) > 0)
    True
    """
    seen = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
    pairs = (seen[:, None, :, None] & seen[:, None, None, :]).expand(-1, q.shape[2], -1, -1)  # (B, H, L, L)
    if causal:
        pairs = pairs.tril()
    with torch.no_grad():
        scores = torch.einsum("bihz,bjhz->bhij", q, k) / math.sqrt(q.shape[-1])
        teacher = scores.masked_fill(~pairs, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~pairs, 0.0)
    weights = torch.einsum("bihf,bjhf->bhij", student_q, student_k).masked_fill(~pairs, 0.0)
    log_student = torch.log(weights + eps) - torch.log(weights.sum(-1, keepdim=True) + eps)
    per_query = -(teacher * log_student).sum(-1)  # (B, H, L), 0 at padding
    return per_query.sum() / (seen.sum() * q.shape[2]).clamp(min=1)
