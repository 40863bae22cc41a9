"""Which parameters learn how fast, and which decay: it travels with the layers, into any optimiser."""

from __future__ import annotations

from typing import Any

from torch import nn


def mark(module: nn.Module, *names: str, **options: float) -> None:
    """Say how the parameters ``names`` of ``module`` are to be optimised, for ``param_groups`` to read.

    It is kept by the module, not on the tensors, so that it survives ``copy.deepcopy`` and pickling.

    Args:
        module: Owns the parameters.
        names: Its own parameters; none marks all of them.
        options: ``lr`` and ``weight_decay``; what is not given is the model's.
    """
    marked = {name: dict(options) for name in names or [name for name, _ in module.named_parameters(recurse=False)]}
    module.__dict__["optim_options"] = module.__dict__.get("optim_options", {}) | marked


def _marks(model: nn.Module) -> dict[nn.Parameter, dict[str, float]]:
    marks = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        options: dict[str, dict[str, float]] = module.__dict__.get("optim_options", {})
        marks.update({own[name]: options[name] for name in own.keys() & options.keys()})
    return marks


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, *, kernel_lr: float | None = None
) -> list[dict[str, Any]]:
    """Split the parameters of ``model`` for AdamW.

    Matrices decay; vectors (norms, biases, per-channel scales and shifts) do not. What a layer marks (see ``mark``) is
    as it asks: a long kernel, for one, needs a smaller, fixed rate and no decay (arXiv 2210.09298, section 4).

    Args:
        model: Any module, e.g. your own that holds a ``ChelaLayer``.
        lr: Learning rate of everything not marked.
        weight_decay: Decay of the matrices.
        kernel_lr: In place of the rate that marked parameters ask for.

    Returns:
        Groups for ``torch.optim.AdamW``, each with its ``name``; every parameter that needs a gradient is in one.

    >>> import torch
    >>> groups = param_groups(torch.nn.Linear(2, 3), lr=1e-3, weight_decay=0.1)
    >>> [(g["name"], len(g["params"]), g["weight_decay"]) for g in groups]
    [('decay', 1, 0.1), ('no_decay', 1, 0.0)]
    """
    groups: dict[str, dict[str, Any]] = {}
    marks = _marks(model)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        marked = marks.get(parameter)
        if marked is not None:
            rate, decay = marked.get("lr", lr), marked.get("weight_decay", weight_decay)
            rate = kernel_lr if "lr" in marked and kernel_lr is not None else rate
            name = f"marked(lr={rate:g}, weight_decay={decay:g})"
        elif parameter.ndim < 2:
            name, rate, decay = "no_decay", lr, 0.0
        else:
            name, rate, decay = "decay", lr, weight_decay
        groups.setdefault(name, {"name": name, "params": [], "lr": rate, "weight_decay": decay})["params"].append(
            parameter
        )
    return list(groups.values())
