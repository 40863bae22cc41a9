"""How many operators a step of training takes: each costs some microseconds, whatever it computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from chela.config.compose import resolve
from chela.models import TaskFacts, build_model
from chela.training.step import build_optimizer

BATCH, LENGTH = 64, 96
# These compute nothing: they name memory, or hand on to other operators.
NOT_COUNTED = """
    alias as_strided chunk contiguous detach detach_ dropout empty empty_like empty_strided expand expand_as flatten
    is_nonzero item lift_fresh mT narrow new_empty new_empty_strided numpy_T permute promote_types reshape resolve_conj
    resolve_neg result_type select slice split split_with_sizes squeeze t to transpose unbind unflatten unfold unsqueeze
    view view_as _local_scalar_dense _unsafe_view
"""


def operators_of_a_step(*words: str) -> int:
    """Count forward, backward, clipping and optimiser, those inside our own operators too; no operator of another."""
    config = resolve(["task=listops", "preset=mini", *words])
    model = build_model(config.model, TaskFacts(num_classes=10, l_max=400, vocab_size=16), seed=0)
    optimizer = build_optimizer(model, config.optimizer)
    torch.manual_seed(0)
    lengths = torch.randint(LENGTH // 2, LENGTH, (BATCH, 1)).index_fill(0, torch.tensor(0), LENGTH)
    mask = torch.arange(LENGTH) < lengths
    inputs, labels = torch.randint(1, 16, (BATCH, LENGTH)) * mask, torch.randint(10, (BATCH,))
    step(model, optimizer, inputs, mask, labels)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(model, optimizer, inputs, mask.clone(), labels)
    return sum(counts(event) and not any(counts(outer) for outer in callers(event)) for event in profiled.events())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, mask: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(inputs, mask), labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def callers(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def counts(event: Any) -> bool:
    space, _, name = event.name.partition("::")
    return space == "aten" and name not in NOT_COUNTED.split()


def test_a_step_of_the_main_job() -> None:
    """It took 1,572 by this count while each stage was left to autograd; a step of softmax attention takes 380."""
    assert operators_of_a_step("model.mixer.qk=short", "model.mixer.gate=highway") <= 800
