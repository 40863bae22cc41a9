"""Code that a file names as ``module:Class``: where it is looked for, whether it may be run, and what marks it."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
from collections.abc import Collection
from pathlib import Path

from chela.core.errors import UsageError


def importable(folder: Path) -> None:
    """Let modules in a folder, and in the present one, be imported."""
    for path in (os.getcwd(), str(folder.resolve())):
        if path not in sys.path:
            sys.path.insert(0, path)


def expect_trusted(named: list[str], trust: Collection[str], where: str) -> None:
    """Refuse a file that names code which the user has not named.

    Raises:
        UsageError: A ``module:Class`` whose module is not in ``trust``.
    """
    modules = sorted({name.partition(":")[0] for name in named if ":" in name})
    if set(modules) - set(trust):
        raise UsageError(
            f"{where} names the module {' and '.join(modules)}, whose code would be run: if you trust it, say "
            f"trust={','.join(modules)}"
        )
    if modules:
        importable(Path.cwd())


def code_of(name: str) -> str:
    """Return a hash of the module of ``module:Class``: its code without comments and layout."""
    spec = importlib.util.find_spec(name.partition(":")[0])
    if spec is None or spec.origin is None:
        raise UsageError(f"expected a module for {name} in this folder or on the Python path, there is none")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]
