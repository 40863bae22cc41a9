"""One file per system, one signature: ``mixer(x, mask=None)``, the update that the block adds to the residual stream.

``x: (B, L, D)`` is the normed input, ``mask: (B, L)`` bool is True on real tokens, the result is ``(B, L, D)``, 0 at
padding. MEGA asks for ``stream: (B, L, D)`` too, the residual stream before the norm.

A causal mixer also goes on from a state, by ``start``, ``prefill`` and ``step``: see ``chela.layers.state``.

``in_pieces = True`` on the class says that ``forward`` mixes positions by the ops of ``chela.ops`` alone, so that a
sequence may be spread over processes (``chela.ops.sequence_parallel``).

The file ``NAME.py`` ends with ``MIXER = Class``. Its options are the keyword arguments of the constructor, but for what
the backbone hands over: ``l_max``, ``causal``, ``layer``, ``depth`` and ``dropout``.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from chela.core.files import class_named
from chela.core.options import options_of

CONTEXT = ("d_model", "l_max", "causal", "layer", "depth", "dropout")
"""What the backbone hands to every mixer that asks for it; these are no options."""


def systems() -> list[str]:
    """Name the systems of this package: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def mixer_class(name: str) -> type[nn.Module]:
    """Import and return the class of a system: a built-in one such as ``"chela"``, or ``"module:Class"`` of your own.

    Raises:
        UsageError: There is no such system, or what the name leads to is no ``nn.Module`` class.
    """
    known = {system: f"{__name__}.{system}:MIXER" for system in systems()}
    return class_named("model.mixer.name", name, known, nn.Module)


@functools.cache
def mixer_options(name: str) -> Any:
    """Return a dataclass of a system's options: ``name``, then the constructor's arguments but for ``CONTEXT``.

    Raises:
        UsageError: There is no such system, or an argument that cannot be an option.

    >>> mixer_options("linear")(heads=2)
    LinearAttentionOptions(name='linear', heads=2, d_value=None, short=0)
    """
    return options_of(name, mixer_class(name), CONTEXT)


def build_mixer(name: str, d_model: int, options: dict[str, Any], **context: Any) -> nn.Module:
    """Build a mixer of width D from its own ``options`` and what its constructor names of the ``context``."""
    cls = mixer_class(name)
    wanted = inspect.signature(cls).parameters
    return cls(d_model, **{**options, **{key: value for key, value in context.items() if key in wanted}})
