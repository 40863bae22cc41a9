"""Look into a trained model: the kernels it learned, and how far it sees. Needs the run's checkpoint, and torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chela.errors import UsageError
from chela.evaluate import RunWords
from chela.layers.long_kernel import LongKernel
from chela.predict import load_run
from experiments.runs import Run

MOST_TOKENS = 2048  # of the random sequences on which the receptive field is measured
SEQUENCES = 4


class Kernel(NamedTuple):
    """The long kernel of one layer."""

    name: str
    forward: NDArray[np.float64]  # (C, L), lags from 0 on, towards earlier tokens
    back: NDArray[np.float64] | None  # (C, L − 1), lags from 1 on, towards later tokens; None when causal


def has_weights(run: Run) -> bool:
    """Return whether the run's best weights lie in its folder."""
    return (run.path / "checkpoints" / "best.ckpt").is_file()


def trained_model(run: Run) -> nn.Module:
    """Build the run's model with its best weights, in eval mode; the run's folder is all that is read.

    UsageError where the folder does not tell the network's shape, or its weights are not this network's.
    """
    if run.config.get("task.encoding") == "s4":  # the records may be elsewhere, and making them is no report's work
        raise UsageError("expected a task whose vocabulary is fixed, this run's comes from its data")
    return load_run(RunWords(run=str(run.path)))[0].double()


@torch.no_grad()
def long_kernels(model: nn.Module) -> list[Kernel]:
    """Return every layer's long kernel at its full length, as it was trained (branches and skip are not in it)."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LongKernel):
            forward, back = module(module.l_max)
            block = next((part for part in name.split(".") if part.isdecimal()), name)
            found.append(Kernel(f"layer {block}", forward.numpy(), None if back is None else back.numpy()))
    return found


def receptive_field(model: nn.Module, seed: int = 0) -> NDArray[np.float64]:
    """Measure how the middle position's output depends on each position's embedded input.

    The gradient of a random projection of the last block's output at the middle position is taken with respect to the
    embeddings; its norm per position is averaged (root of the mean square) over random sequences of the task's
    symbols or of standard normal values. The result is ``(L,)``, the middle position at L // 2.
    """
    backbone = model.get_submodule("backbone")
    generator = torch.Generator().manual_seed(seed)
    length = min(int(backbone.l_max), MOST_TOKENS)  # type: ignore[arg-type]
    embedding = backbone.get_submodule("embedding")
    if isinstance(embedding, nn.Embedding):
        inputs = torch.randint(1, embedding.num_embeddings, (SEQUENCES, length), generator=generator)
    else:
        size = (SEQUENCES, length, int(embedding.in_features))  # type: ignore[arg-type]
        inputs = torch.randn(size, generator=generator, dtype=torch.float64)
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    with embedding.register_forward_hook(keep):
        middle = backbone(inputs)[:, length // 2]
    direction = torch.randn(middle.shape, generator=generator, dtype=middle.dtype)
    (gradient,) = torch.autograd.grad((middle * direction).sum(), kept)
    strength: NDArray[np.float64] = gradient.square().sum(-1).mean(0).sqrt().numpy()
    return strength
