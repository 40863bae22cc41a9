"""Initial values as a function of (seed, module path): two systems agree in all that they share."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter of ``model`` anew, each module from its own generator.

    A module's values depend on the seed and on its path in the model alone, not on what was built before it, so that
    two models with different mixers start with the same embedding, feed-forward layers and head.

    Raises:
        TypeError: A module holds parameters but has no ``reset_parameters``.
    """
    for path, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise TypeError(
                f"{path or 'the model'}: expected reset_parameters() on {type(module).__name__}, which has parameters"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed_of(seed, path))
            reset()


def _seed_of(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:7], "big")
