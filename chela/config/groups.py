"""The YAML files that a configuration is made of: ``configs/task``, ``configs/model``, ``configs/preset``, or your own.

A file of a task or a model holds sections of the configuration, and under ``presets`` what is added for one preset
(there, ``mixers`` holds what is added for one system only, ``models`` of a task's file for one row of the table, on top
of the model's own file). A file may hold ``variants``, each of which says what differs: of a model the system
``<file>_<variant>``, of a task the task of that name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from chela.core.errors import UsageError
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
    return sorted(name for path in (configs_folder() / group).glob("*.yaml") for name in _shipped(path))


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
    """Return the layers of a chosen file, the later ones on top.

    Raises:
        UsageError: There is no such name or file, or the file is no mapping of sections.
    """
    if is_file(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"{group}: expected a YAML file, there is none at {path}")
        return [_read(path)]
    for path in (configs_folder() / group).glob("*.yaml"):
        if name in _shipped(path):
            return _shipped(path)[name]
    listed = names(group)
    raise UsageError(
        f"{group}: expected one of {', '.join(listed)} or a YAML file, got {shown(name)}{closest(name, listed)}"
    )


def sections(layer: Layer, preset: str, mixer: str) -> Iterator[Layer]:
    """Split a layer into what always holds, what holds for the preset, and what does so for one system only."""
    special = layer.get("presets", {}).get(preset, {})
    yield {key: value for key, value in layer.items() if key != "presets"}
    yield {key: value for key, value in special.items() if key not in ("mixers", "models")}
    yield {"model": {"mixer": special.get("mixers", {}).get(mixer, {})}}


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
def _shipped(path: Path) -> dict[str, list[Layer]]:
    """Return the layers of each name in a file of this package, which is read once; callers change none."""
    base = _read(path)
    variants = base.pop("variants", {})
    named = {path.stem: [base]} if base or not variants else {}
    prefix = f"{path.stem}_" if path.parent.name == "model" else ""
    return named | {f"{prefix}{variant}": [base, layer] for variant, layer in variants.items()}


def _read(path: Path) -> Layer:
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # what is no YAML can make the reader raise anything
        raise UsageError(f"{path}: expected YAML, could not read it ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(found, dict) and found is not None:
        raise UsageError(f"{path}: expected sections such as model: {{…}}, got a {type(found).__name__}")
    presets = (found or {}).get("presets", {})
    nested = list(presets.values()) if isinstance(presets, dict) else [presets]
    for given in nested:  # which grows by what must be sections in it
        if not isinstance(given, dict):
            raise UsageError(f"{path}: expected presets: {{mini: {{trainer: …}}}}, got {shown(given)} for a preset")
        nested += [given[key] for key in ("mixers", "models") if key in given]
        nested += given["models"].values() if isinstance(given.get("models"), dict) else ()
    return found or {}
