"""Which implementations of an op run here, which cannot, and why.

Every op registers its backends by name. ``backend="auto"`` takes the first one that is meant for the device; where that
one cannot run, it says so once and takes the next.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def _always_usable(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: What the user writes in ``backend=``.
        run: The implementation; every backend of an op has the same signature.
        auto_on: Device types for which ``auto`` prefers this backend; ``("*",)`` means any.
        why_not: Gives the reason why it cannot run on a device, or None when it can.
    """

    name: str
    run: Callable[..., Any]
    auto_on: tuple[str, ...] = ()
    why_not: Callable[[torch.device], str | None] = _always_usable


_REGISTRY: dict[str, dict[str, Backend]] = {}


def register(op: str, backend: Backend) -> None:
    """Add a backend to an op; the order of registration is the order in which ``auto`` tries them."""
    _REGISTRY.setdefault(op, {})[backend.name] = backend


def backends(device: torch.device | str = "cpu") -> dict[str, dict[str, str | None]]:
    """List the backends of every op, each with None when it can run on ``device`` and else with the reason.

    >>> from chela.ops import backends
    >>> backends()["linear_attention"]["reference"] is None
    True
    """
    device = torch.device(device)
    return {op: {b.name: b.why_not(device) for b in named.values()} for op, named in _REGISTRY.items()}


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def choose(op: str, name: str, device: torch.device) -> Backend:
    """Return the backend of ``op`` called ``name`` (or the best for ``device`` when it is "auto").

    Raises:
        ValueError: An unknown name, or one that cannot run on ``device``.
    """
    named = _REGISTRY[op]
    if name == "auto":
        for backend in named.values():
            if not {"*", device.type} & set(backend.auto_on):
                continue
            reason = backend.why_not(device)
            if reason is None:
                return backend
            _warn_once(f"{op}: backend {backend.name!r} cannot run on {device.type} ({reason}); trying the next one")
        raise ValueError(f"{op}: no backend can run on {device.type}; see chela.ops.backends({device.type!r})")
    if name not in named:
        raise ValueError(f"{op}: expected backend 'auto' or one of {sorted(named)}, got {name!r}")
    reason = named[name].why_not(device)
    if reason is not None:
        usable = sorted(b.name for b in named.values() if b.why_not(device) is None)
        raise ValueError(f"{op}: backend {name!r} cannot run on {device.type}: {reason}; use 'auto' or one of {usable}")
    return named[name]
