"""The memory of a training step, counted before it is taken.

Nothing is allocated: forward and backward run with fake tensors, and what is alive at once is counted.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chela.config.schema import Config, ModelConfig
from chela.models import build_model

CARDS = (24, 40, 80)
"""Sizes of GPUs in GiB; a tenth is left to the driver, to libraries and to what fragments."""


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes that one process holds during a step, in float32.

    Attributes:
        weights: Parameters and buffers.
        optimizer: Adam's two moments, and the gradients where a batch is taken in several parts.
        activations: The most that forward and backward hold beyond these: what autograd keeps, what is worked on, and
            the gradients made so far.
    """

    weights: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Return all of it."""
        return self.weights + self.optimizer + self.activations

    @property
    def fits(self) -> str:
        """Say which cards hold it.

        >>> StepMemory(2**30, 2**31, 30 * 2**30).fits, StepMemory(0, 0, 2**37).fits
        ('40 80', 'none')
        """
        return " ".join(str(card) for card in CARDS if self.total <= 0.9 * card * 2**30) or "none"


def step_memory(config: Config, task: Any) -> StepMemory:
    """Count the memory of a step of ``config`` on a part of the batch, all records as long as the task's longest.

    Blocks are alike: two counts, of one block and of two, give those of any depth. Under bf16-mixed a step holds less.
    Scratch inside an operator, such as the spectra of one block of channels in ``fft_conv``, is not seen.

    Args:
        config: The resolved configuration.
        task: As for ``build_model``.
    """
    trainer, task = config.trainer, copy.copy(task)
    pieces = trainer.sequence_parallel
    size = pieces * trainer.batch_size // (trainer.accumulate * trainer.devices * trainer.num_nodes)
    task.l_max = -(-task.l_max // pieces)  # and kernels as long, for 1/P of the channels, are as large as these
    one, two = (_counted(config, task, size, depth) for depth in (1, 2))
    more = config.model.depth - 1
    parameters, buffers, peak = (a + more * (b - a) for a, b in zip(one, two, strict=True))
    kept = parameters if trainer.accumulate > 1 else 0
    return StepMemory(parameters + buffers, 2 * parameters + kept, max(peak, parameters))


def _counted(config: Config, task: Any, size: int, depth: int) -> tuple[int, int, int]:
    """Return the bytes of parameters and buffers, and the most that forward and backward hold beyond them."""
    shorter: ModelConfig = dataclasses.replace(config.model, depth=depth)
    rows, per_position = 2 * size if task.pair else size, getattr(task, "objective", "classification") == "tokens"
    with FakeTensorMode():
        model = build_model(shorter, task, seed=0).train()
        model.backbone.checkpoint_blocks = config.trainer.checkpoint_activations
        symbols = torch.zeros(rows, task.l_max, dtype=torch.long)
        inputs = torch.empty(rows, task.l_max, task.input_dim) if task.vocab_size is None else symbols
        mask = None if task.vocab_size is None or per_position else symbols.bool()  # pixels and windows have one length
        labels = symbols if per_position else symbols[:size, 0]
        with _Held() as held:
            loss = F.cross_entropy(model(inputs, mask).flatten(0, -2), labels.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
    return _bytes(model.parameters()), _bytes(model.buffers()), held.peak


def _bytes(tensors: Any) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages made inside that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            place = storage._cdata
            if place not in known and place not in self._alive:
                self._alive[place] = storage.nbytes()
                self.held += storage.nbytes()
                weakref.finalize(storage, self._freed, place)
        self.peak = max(self.peak, self.held)
        return out

    def _freed(self, place: int) -> None:
        self.held -= self._alive.pop(place)
