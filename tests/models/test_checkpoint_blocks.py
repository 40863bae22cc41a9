"""Blocks that are computed again in the backward pass: the same numbers, to the last bit, in less memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chela.config.compose import names, resolve
from chela.models import TaskFacts, build_model

TASK = TaskFacts(num_classes=4, l_max=40, vocab_size=9)


def trained(name: str, again: bool, padded: bool) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of three steps, and all that is left: weights, buffers and the last gradients."""
    config = dataclasses.replace(resolve([f"model={name}", "preset=tiny"]).model, norm="batch", dropout=0.2)
    model = build_model(config, TASK, 0).train()
    model.backbone.checkpoint_blocks = again
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        inputs, labels = torch.randint(1, 9, (3, 40)), torch.randint(4, (3,))
        mask = torch.arange(40) < torch.tensor([[40], [29], [7]]) if padded else None
        loss = F.cross_entropy(model(inputs, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    left = dict(model.state_dict())
    left |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, left


@pytest.mark.parametrize("name", names("model"))
def test_every_system_has_the_same_losses_gradients_and_statistics(name: str) -> None:
    for padded in (False, True) if name in ("chela", "s4d") else (True,):  # without padding the norm takes another way
        losses, left = trained(name, False, padded)
        losses_again, left_again = trained(name, True, padded)
        assert losses_again == losses
        assert left_again.keys() == left.keys()
        assert [key for key in left if not torch.equal(left[key], left_again[key])] == []


def test_a_block_keeps_its_input_alone() -> None:
    kept = {}
    for again in (False, True):
        model = build_model(resolve(["preset=tiny", "model.depth=4"]).model, TASK, 0).train()
        model.backbone.checkpoint_blocks = again
        held: dict[int, int] = {}

        def keep(x: Tensor, held: dict[int, int] = held) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(torch.randint(1, 9, (16, 40)))
        kept[again] = sum(held.values())
    assert kept[True] < 0.5 * kept[False]


def test_evaluation_computes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(resolve(["preset=tiny"]).model, TASK, 0).eval()
    model.backbone.checkpoint_blocks = True
    monkeypatch.setattr("chela.models.backbone.checkpoint", None)
    with torch.no_grad():
        model(torch.randint(1, 9, (2, 40)))
