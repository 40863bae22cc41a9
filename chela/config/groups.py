"""The YAML files that a configuration is made of: ``configs/task``, ``configs/model``, ``configs/preset``, or your own.

A file of a task or a model holds sections of the configuration, and under ``presets`` what is added for one preset
(there, ``mixers`` holds what is added for one system only, ``models`` of a task's file for one row of the table, on top
of the model's own file). A file may hold ``variants``, each of which says what differs: of a model the system
``<file>_<variant>``, of a task the task of that name.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from chela.core.errors import UsageError, first_line
from chela.core.options import closest, shown

Layer = dict[str, Any]
PRESETS = ("auto", "full", "mini", "tiny")
"""Sizes of task and network that every task has; ``auto`` is full with a CUDA GPU, mini without."""


def configs_folder() -> Path:
    """Return the folder of the YAML files: in the repository, or packed into an installed wheel."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def names(group: str) -> list[str]:
    """List what can be chosen by ``group=name``, e.g. ``names("model")``."""
    return sorted(_shipped(group))


def is_file(name: str) -> bool:
    """Whether a name is the path of a YAML file of one's own."""
    return name.endswith((".yaml", ".yml"))


def label(name: str) -> str:
    """Return a short name, fit for a folder, of ``./mine.yaml``, ``module:Class`` or a name.

    >>> label("./mine.yaml"), label("my.module:MyTask"), label("listops")
    ('mine', 'MyTask', 'listops')
    """
    return Path(name).stem if is_file(name) else name.rpartition(":")[2]


def read_group(group: str, name: str) -> list[Layer]:
    """Return the layers of a chosen file, the later ones on top; UsageError where there is no such name or file."""
    shipped = _shipped(group)
    if name in shipped:
        return shipped[name]
    if not is_file(name):
        listed = ", ".join(sorted(shipped))
        raise UsageError(f"{group}: expected one of {listed} or a YAML file, got {shown(name)}{closest(name, shipped)}")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"{group}: expected a YAML file, there is none at {path}")
    return [_read(path)]


def flat(nested: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one by dotted key.

    >>> flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


@functools.cache
def _shipped(group: str) -> dict[str, list[Layer]]:
    """Return the layers of each name of this package, whose files are read once; callers change none."""
    found: dict[str, list[Layer]] = {}
    for path in (configs_folder() / group).glob("*.yaml"):
        base = _read(path)
        variants = base.pop("variants", {})
        if base or not variants:
            found[path.stem] = [base]
        prefix = f"{path.stem}_" if group == "model" else ""
        found |= {f"{prefix}{variant}": [base, layer] for variant, layer in variants.items()}
    return found


def _read(path: Path) -> Layer:
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # what is no YAML can make the reader raise anything
        raise UsageError(f"{path}: expected YAML, could not read it ({first_line(error)})") from None
    if not isinstance(found, dict | None):
        raise UsageError(f"{path}: expected sections such as model: {{…}}, got a {type(found).__name__}")
    return found or {}
