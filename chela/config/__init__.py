"""Re-exports, until every room imports from where these are."""

from typing import Any

_WHERE = {
    "chela.config.compose": ("resolve", "load", "to_yaml", "run_folder", "check"),
    "chela.config.words": ("duration",),
    "chela.config.checks": ("seconds",),
    "chela.core.errors": ("first_line",),
    "chela.core.options": ("kind_of",),
    "chela.results": ("to_the_letter",),
}


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(name)
