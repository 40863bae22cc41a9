"""Parameters: where they start, and which learning rate and weight decay a layer asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def mark(module: nn.Module, *names: str, **options: float) -> None:
    """Set ``lr`` and ``weight_decay`` of a module's own parameters, or of some by name, for ``param_groups`` to read.

    The module keeps them, not the tensors, so that they survive ``copy.deepcopy`` and pickling.
    """
    marked = {name: dict(options) for name in names or [name for name, _ in module.named_parameters(recurse=False)]}
    module.__dict__["optim_options"] = module.__dict__.get("optim_options", {}) | marked


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    *,
    kernel_lr: float | None = None,
    kernel_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Split the parameters of ``model`` for AdamW.

    Matrices decay; vectors (norms, biases, per-channel scales and shifts) do not. A layer can ask for something else
    with ``mark``: a long kernel needs a smaller, fixed rate (arXiv 2210.09298, section 4).

    Args:
        model: Any module, e.g. your own that holds a ``ChelaLayer``.
        lr: Learning rate of everything not marked.
        weight_decay: Decay of the matrices; AdamW's own without it.
        kernel_lr: Replaces the rates that marked parameters ask for.
        kernel_weight_decay: Decay of those with a rate of their own, unless they ask for another; as the rest if None.

    Returns:
        Named groups for ``torch.optim.AdamW``; every parameter that needs a gradient is in one of them.

    >>> groups = param_groups(torch.nn.Linear(2, 3), lr=1e-3, weight_decay=0.1)
    >>> [(g["name"], len(g["params"]), g["weight_decay"]) for g in groups]
    [('decay', 1, 0.1), ('no_decay', 1, 0.0)]
    """
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    marks: dict[nn.Parameter, dict[str, float]] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        options = module.__dict__.get("optim_options", {})
        marks.update({own[name]: options[name] for name in own.keys() & options.keys()})
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        rate, decay = lr, weight_decay
        if parameter in marks:
            marked = marks[parameter]
            if "lr" in marked:
                rate = marked["lr"] if kernel_lr is None else kernel_lr
                decay = weight_decay if kernel_weight_decay is None else kernel_weight_decay
            decay = marked.get("weight_decay", decay)
            name = f"marked(lr={rate:g}, weight_decay={decay:g})"
        elif parameter.ndim < 2:
            name, decay = "no_decay", 0.0
        else:
            name = "decay"
        made = {"name": name, "params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault((name, rate, decay), made)["params"].append(parameter)
    return list(groups.values())


def initialise(model: nn.Module, seed: int, kept: Iterable[nn.Module] = ()) -> None:
    """Draw every parameter of ``model`` anew by ``reset_parameters``, but for those of the modules ``kept``.

    A module's values depend on the seed and on its path in the model alone, not on what was built before it, so that
    two models with different mixers start with the same embedding, feed-forward layers and head.

    Raises:
        TypeError: A module holds parameters but has no ``reset_parameters``.
    """
    spared = {part for whole in kept for part in whole.modules()}
    for path, module in reversed(list(model.named_modules())):  # a module may look at the values of its parts
        listed = isinstance(module, nn.ParameterList | nn.ParameterDict)  # their owner draws them
        if listed or module in spared or not any(True for _ in module.parameters(recurse=False)):
            continue
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise TypeError(
                f"{path or 'the model'}: expected reset_parameters() on {type(module).__name__}, which has parameters"
            )
        with seeded(seed, path):
            reset()


@contextmanager
def seeded(seed: int, path: str) -> Iterator[None]:
    """Draw from a generator that depends on (seed, path) alone, and leave the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:7], "big"))
        yield
