"""What all ops share: which implementations run here, and the dtype of sums.

Every op registers its backends by name. ``backend="auto"`` takes the first one that is meant for the device and can do
what is asked.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot trace the question


class Problem(NamedTuple):
    """What a backend must know to say whether it can run."""

    device: torch.device
    dtype: torch.dtype | None = None  # of the inputs; None when only the device is in question
    widths: tuple[int, ...] = ()  # of the last axes of the inputs


@dataclass(frozen=True)
class Backend:
    """One implementation of an op, called ``name`` in ``backend=``."""

    name: str
    run: Callable[..., Any]  # every backend of an op has the same signature
    auto_on: tuple[str, ...] = ()  # device types for which "auto" considers it; "*" means any
    why_not: Callable[[Problem], str | None] = lambda problem: None  # the reason why it cannot run a problem


_REGISTRY: dict[str, dict[str, Backend]] = {}


def register(op: str, *backends: Backend) -> None:
    """Add backends to an op; ``auto`` tries them in this order."""
    _REGISTRY.setdefault(op, {}).update({backend.name: backend for backend in backends})


def backends(device: torch.device | str = "cpu") -> dict[str, dict[str, str | None]]:
    """List the backends of every op, each with None when it can run on ``device`` and else with the reason.

    >>> from chela.ops import backends
    >>> backends()["linear_attention"]["reference"] is None
    True
    """
    problem = Problem(torch.device(device))
    return {op: {b.name: b.why_not(problem) for b in named.values()} for op, named in _REGISTRY.items()}


_warn_once = functools.cache(warnings.warn)


def choose(op: str, name: str, problem: Problem) -> Backend:
    """Return the backend of ``op`` called ``name``, or the best for ``problem`` when it is "auto".

    "auto" warns once where it passes over a backend because of the machine, but not because of the backend's own
    limits, such as a width.

    Raises:
        ValueError: An unknown name, or a backend that cannot run the problem.
    """
    named, kind = _REGISTRY[op], problem.device.type
    if name == "auto":
        for backend in named.values():
            if not {"*", kind} & set(backend.auto_on):
                continue
            if backend.why_not(problem) is None:
                return backend
            reason = backend.why_not(Problem(problem.device))
            if reason is not None:
                message = f"{op}: backend {backend.name!r} cannot run on {kind} ({reason}); trying the next one"
                _warn_once(message, RuntimeWarning, stacklevel=3)
        raise ValueError(f"{op}: no backend can run on {kind}; see chela.ops.backends({kind!r})")
    if name not in named:
        raise ValueError(f"{op}: expected backend 'auto' or one of {sorted(named)}, got {name!r}")
    reason = named[name].why_not(problem)
    if reason is not None:
        usable = sorted(b.name for b in named.values() if b.why_not(problem) is None)
        raise ValueError(f"{op}: backend {name!r} cannot run on {kind}: {reason}; use 'auto' or one of {usable}")
    return named[name]


def why_no_triton(problem: Problem) -> str | None:
    """Return why Triton kernels cannot run on the problem's device, or None."""
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton, Linux only)"
    if problem.device.type != "cuda" and not interpreted():
        return (
            f"Triton kernels need a CUDA device, got {problem.device.type}; "
            "TRITON_INTERPRET=1 in the environment interprets them anywhere, slowly"
        )
    return None


def interpreted() -> bool:
    """Return whether Triton was asked to interpret its kernels, which needs no GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_tensors(op: str, tensors: dict[str, tuple[Tensor | None, str]]) -> None:
    """Refuse tensors whose shapes or devices do not fit together, or whose dtype is no real floating one.

    Args:
        op: Whose they are.
        tensors: By name, each tensor and its axes, as in ``"B L H D"``, or several choices, ``"H | B L H"``. A letter
            is one size everywhere: that of the first tensor that has it.
    """
    sizes: dict[str, int] = {}
    device = next(x.device for x, _ in tensors.values() if x is not None)
    for name, (x, choices) in tensors.items():
        if x is None:
            continue
        shapes = [choice.split() for choice in choices.split(" | ")]
        shape = next((axes for axes in shapes if len(axes) == x.ndim), [])
        if not shape or any(sizes.get(axis, size) != size for axis, size in zip(shape, x.shape, strict=True)):
            known = (", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes) for axes in shapes)
            expected = " or ".join(f"({axes})" for axes in known)
            raise ValueError(f"{op}: expected {name} of shape {expected}, got {tuple(x.shape)}")
        sizes.update(zip(shape, x.shape, strict=True))
        if not x.is_floating_point():
            raise ValueError(f"{op}: expected a real floating dtype for {name}, got {x.dtype}; cast it first")
        if x.device != device:
            raise ValueError(f"{op}: {name} is on {x.device}, other tensors on {device}; move them to one device")


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that holds sums over inputs of these dtypes: at least float32; float64 stays float64.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float32, torch.float64)
    (torch.float32, torch.float64)
    """
    return functools.reduce(torch.promote_types, dtypes, torch.float32)
