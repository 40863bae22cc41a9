"""One file per system, one signature: ``mixer(x: (B, L, D), mask: (B, L) | None)`` on the normed input.

A mixer returns the update ``h: (B, L, D)``, or ``(h, g)`` when it has a highway gate; the block adds it.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch import nn

_WHERE = {
    "chela": "chela.layers.mixers.chela:ChelaLayer",
    "hedgehog": "chela.layers.mixers.hedgehog:HedgehogAttention",
    "lightning": "chela.layers.mixers.lightning:LightningAttention",
    "linear": "chela.layers.mixers.linear:LinearAttention",
    "lion": "chela.layers.mixers.lion:LION",
    "mega": "chela.layers.mixers.mega:MEGA",
    "s4d": "chela.layers.mixers.s4d:S4D",
    "softmax": "chela.layers.mixers.softmax:SoftmaxAttention",
}


def mixer_class(name: str) -> type[nn.Module]:
    """Return the class of the system called ``name``."""
    if name not in _WHERE:
        raise ValueError(f"mixer: expected one of {sorted(_WHERE)}, got {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    found: type[nn.Module] = getattr(importlib.import_module(module), attribute)
    return found


def build_mixer(name: str, d_model: int, options: dict[str, Any], **context: Any) -> nn.Module:
    """Build a mixer from its own ``options`` and what its constructor asks of the ``context``.

    Args:
        name: A system, e.g. ``"chela"``.
        d_model: Width D.
        options: The system's own keyword arguments.
        context: What the backbone knows: ``l_max``, ``causal``, ``layer`` (index), ``depth``. A constructor that
            does not name one of these does not get it.
    """
    cls = mixer_class(name)
    wanted = inspect.signature(cls).parameters
    return cls(d_model, **options, **{key: value for key, value in context.items() if key in wanted})
