"""CHELA: short-long convolutions and hardware-efficient linear attention.

The reuse door: everything here needs torch and einops only, and nothing is imported before it is asked for (PEP 562),
so that the command line can answer ``--help`` without paying for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_WHERE = {
    "linear_attention": "chela.ops.linear_attention",
    "linear_attention_step": "chela.ops.linear_attention",
    "LinearAttentionState": "chela.ops.linear_attention",
    "fft_conv": "chela.ops.fft_conv",
    "short_conv": "chela.ops.short_conv",
    "ChelaLayer": "chela.layers.mixers.chela",
    "ShortLongConv": "chela.layers.short_long_conv",
    "param_groups": "chela.layers.param_groups",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'chela' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
