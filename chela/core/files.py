"""Files: whole writes, checksums; and code that a file names as ``module:Class``."""

from __future__ import annotations

import ast
import errno
import hashlib
import importlib.util
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from chela.core.errors import OptionError, UsageError
from chela.core.options import closest, shown

T = TypeVar("T")


def sync(path: Path) -> None:
    """Flush a file to the disk, or the names in a folder where the file system can flush folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Write ``data`` to a temporary file and move it to ``path`` in one stroke: it is whole, or the old one stays.

    The old one is kept at ``previous``, so that one torn file can never cost a run. UsageError where the disk is full
    or the folder is not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"could not write {path} ({error.strerror}); what was saved before is kept: make room or set another "
            "folder, then run again"
        ) from None


def make_folder(folder: Path, key: str) -> None:
    """Make a folder that a word names, and those above it; UsageError where that cannot be, or it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(f"{key}: expected a folder that can be written, got {folder} ({error.strerror})") from None


def sha256(path: Path) -> str:
    """Return the checksum of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- code that a file names ----


def importable(folder: Path) -> None:
    """Let modules in a folder, and in the present one, be imported."""
    for path in (os.getcwd(), str(folder.resolve())):
        if path not in sys.path:
            sys.path.insert(0, path)


def class_named(key: str, name: str, known: Mapping[str, str], base: type[T]) -> type[T]:
    """Import a class: one of the ``known`` (name to ``module:Class``), or the user's own by ``module:Class``.

    OptionError where there is none, or it is no subclass of ``base``. What a module imports in vain is its own fault.
    """
    if ":" not in name and name not in known:
        listed = f"{', '.join(known)}, or module:Class"
        raise OptionError(f"{key}: expected one of {listed}, got {shown(name)}{closest(name, known)}")
    module, _, attribute = known.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ModuleNotFoundError, ValueError) as error:
        if module and not module.startswith(str(getattr(error, "name", module))):
            raise
        raise OptionError(
            f"{key}={name}: expected a module {module} in this folder, beside the YAML file or on the Python path, "
            "there is none; go to its folder or set PYTHONPATH"
        ) from None
    except SyntaxError as error:
        raise OptionError(f"{error.filename} line {error.lineno}: expected Python, got {error.msg}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise OptionError(f"{key}: expected a subclass of {base.__name__}, {shown(name)} is {shown(found)}")
    return found


def expect_trusted(named: list[str], trust: Collection[str], where: str) -> None:
    """Refuse a file that names a ``module:Class`` whose module is not in ``trust``."""
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
