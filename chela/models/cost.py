"""What a network costs before it is run: parameters, floating-point operations, state, and the memory of a step.

Nothing is allocated: networks are built and run with fake tensors, which have a shape and no values.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from chela.config.schema import Config, ModelConfig
from chela.models import build_model


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one network on one task."""

    parameters: int
    mixer_parameters: int  # of the mixers alone, which is where systems differ
    # Forward, at the task's longest sequence: matrix products, attention, convolutions, FFTs (2.5·n·log2 n a real
    # transform); element-wise work is not counted.
    flops_per_token: float
    state_size: int | None  # numbers that all layers' states have after the longest sequence; None: not known


def cost(config: ModelConfig, task: Any) -> Cost:
    """Work out the cost of the network that ``config`` describes; ``task`` as for ``build_model``."""
    rows = 2 if task.pair else 1
    with FakeTensorMode():
        model = build_model(config, task, seed=0).eval()
        with FlopCounterMode(display=False) as counter:
            model(*_inputs(task, rows))
    mixers: list[Any] = model.backbone.mixers()
    remembered = [mixer.state_size(task.l_max) for mixer in mixers if hasattr(mixer, "state_size")]
    return Cost(
        parameters=_count(model),
        mixer_parameters=sum(map(_count, mixers)),
        flops_per_token=counter.get_total_flops() / (rows * task.l_max),
        state_size=sum(remembered) if remembered else None,
    )


def step_memory(config: Config, task: Any) -> tuple[int, int]:
    """Count the bytes that a process holds in a step on a part of the batch, all records as long as the longest.

    Blocks are alike: two counts, of one block and of two, give those of any depth. Under bf16-mixed a step holds less.
    Scratch inside an operator, such as the spectra of one block of channels in ``fft_conv``, is not seen.

    Returns:
        Those of weights, buffers and Adam's moments, in float32, and of the gradients where a batch is taken in several
        parts; and the most that forward and backward hold beyond these, gradients included.
    """
    trainer, task = config.trainer, copy.copy(task)
    shards = trainer.sequence_parallel
    size = shards * trainer.batch_size // (trainer.accumulate * trainer.devices * trainer.num_nodes)
    task.l_max = -(-task.l_max // shards)  # and kernels as long, for 1/P of the channels, are as large as these
    one, two = (_counted(config, task, size, depth) for depth in (1, 2))
    more = config.model.depth - 1
    parameters, buffers, peak = (a + more * (b - a) for a, b in zip(one, two, strict=True))
    copies = 4 if trainer.accumulate > 1 else 3
    return copies * parameters + buffers, max(peak, parameters)


def _counted(config: Config, task: Any, size: int, depth: int) -> tuple[int, int, int]:
    """Return the bytes of parameters and buffers, and the most that forward and backward hold beyond them."""
    with FakeTensorMode():
        model = build_model(dataclasses.replace(config.model, depth=depth), task, seed=0).train()
        model.backbone.checkpoint_blocks = config.trainer.checkpoint_activations
        inputs, mask = _inputs(task, 2 * size if task.pair else size)
        tokens = getattr(task, "objective", "classification") == "tokens"
        padded = task.vocab_size is not None and not tokens  # pixels, and windows of a text, have one length
        labels = torch.zeros(size, task.l_max if tokens else 1, dtype=torch.long).flatten()
        with _Alive() as alive:  # type: ignore[no-untyped-call]
            loss = F.cross_entropy(model(inputs, mask if padded else None).flatten(0, -2), labels)
            loss.backward()  # type: ignore[no-untyped-call]
    return _bytes(model.parameters()), _bytes(model.buffers()), alive.peak


def _inputs(task: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Return inputs of the longest sequence, and a mask."""
    symbols = torch.zeros(rows, task.l_max, dtype=torch.long)
    return torch.empty(rows, task.l_max, task.input_dim) if task.vocab_size is None else symbols, symbols.bool()


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages made inside that are alive, and their peak."""

    bytes = peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _storages((args, kwargs)).keys()
        out = func(*args, **(kwargs or {}))
        for place, storage in _storages(out).items():
            if place not in given:
                self._grow(storage.nbytes())
                weakref.finalize(storage, self._grow, -storage.nbytes())
        return out

    def _grow(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _storages(tree: Any) -> dict[int, UntypedStorage]:
    storages = (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor))
    return {storage._cdata: storage for storage in storages}
