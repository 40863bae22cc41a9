"""Presets: how large a task and a network are. ``full`` where there is a CUDA GPU, ``mini`` where there is none."""

from __future__ import annotations

import ctypes
import sys

from chela.core.errors import UsageError
from chela.core.options import closest, shown
from chela.groups import Layer

PRESETS = ("auto", "full", "mini", "tiny")


def resolve_preset(asked: str, accelerator: str = "auto", task_layers: list[Layer] | None = None) -> tuple[str, str]:
    """Return the preset and, in a few words, why it is this one; a task's file may list presets of its own."""
    known = list(dict.fromkeys([*PRESETS, *(name for layer in task_layers or [] for name in layer.get("presets", {}))]))
    if asked not in known:
        raise UsageError(f"preset: expected one of {', '.join(known)}, got {shown(asked)}{closest(asked, known)}")
    if asked != "auto":
        return asked, "asked for"
    if accelerator == "cpu":
        return "mini", "trainer.accelerator=cpu"
    if cuda_devices() > 0:
        return "full", "a CUDA GPU is here"
    return "mini", "no CUDA GPU is here"


def cuda_devices() -> int:
    """Count the CUDA devices by asking the driver: importing torch for it would take 1.5 s."""
    import importlib.metadata  # here: slow, and needed only where no preset is asked for

    if importlib.metadata.version("torch").endswith("+cpu") or sys.platform != "linux":
        return 0
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
