"""What a system can be told: the keyword arguments of its constructor, read from the source without running it.

``--help`` and a mistyped key thus answer without torch, and a stranger's module is not run before it is asked to work.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

from chela.core.errors import UsageError
from chela.core.options import closest, option

CONTEXT = ("self", "d_model", "l_max", "causal", "layer", "depth", "dropout")
"""What the backbone hands to every mixer that asks for it; these are no options."""

MIXERS = Path(__file__).parent / "layers" / "mixers"
LIMITS = {"choices", "ge", "gt", "le", "lt", "odd", "neutral"}
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}


def systems() -> list[str]:
    """Name the systems of this package: the files of ``chela/layers/mixers``."""
    return sorted(path.stem for path in MIXERS.glob("[!_]*.py"))


@functools.cache
def mixer_options(name: str) -> type:
    """Return a dataclass of a system's options: ``name``, then the constructor's keyword-only arguments.

    Types, limits and choices come from the annotations (``int``, ``Literal["a", "b"]``,
    ``Annotated[int, {"ge": 1}]``), meanings from the ``Args:`` of the docstring.

    Args:
        name: A file of ``chela/layers/mixers``, or ``"module:Class"`` for one of your own.

    Raises:
        UsageError: There is no such system, or an argument that cannot be an option.

    >>> [field.name for field in dataclasses.fields(mixer_options("linear"))]
    ['name', 'heads', 'd_value']
    """
    path, class_name = find_mixer(name)
    arguments, meanings = _constructor(path, class_name)
    fields = [("name", str, option(name, "the system"))]
    for argument, default in arguments:
        if argument.arg not in CONTEXT:
            fields.append(_field(name, argument, default, meanings.get(argument.arg, "")))
    return dataclasses.make_dataclass(f"{class_name}Options", fields)


def of_today(options: dict[str, Any]) -> dict[str, Any]:
    """Return a system's options as they are called today, from those that an older version wrote down.

    >>> of_today({"name": "chela", "attention": "decay", "heads": 4})
    {'name': 'chela', 'attention': 'select', 'heads': 4, 'decay': 'learned'}
    """
    if options.get("name") == "chela" and "d_pool" in options:
        share = options["d_pool"]
        options = {key: value for key, value in options.items() if key != "d_pool"}
        if share is not None:
            options["pooled"] = share / options["d_value"]
    if options.get("name") != "chela" or "decay" in options or "attention" not in options:
        return options
    old = options["attention"]
    attention, decay = "none" if old == "none" else "select", "learned" if old == "decay" else "none"
    return {**options, "attention": attention, "decay": decay}


def find_mixer(name: str) -> tuple[Path, str]:
    """Return the file and the class of a system, without importing it.

    Raises:
        UsageError: There is no such system.
    """
    module, colon, class_name = name.partition(":")
    if colon:
        return _source(module, f"model.mixer.name={name}"), class_name
    if name not in systems():
        raise UsageError(
            f"model.mixer.name: expected one of {', '.join(systems())} or module:Class, got {name!r}"
            f"{closest(name, systems())}"
        )
    path = MIXERS / f"{name}.py"
    for node in _parsed(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MIXER":
            return path, ast.unparse(node.value)
    raise UsageError(f"{path}: expected MIXER = Class at its end, which says what model.mixer.name={name} builds")


def _source(module: str, why: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise UsageError(
            f"{why}: expected a module {module} in this folder, beside the YAML file or on the Python path, "
            "there is none; go to its folder or set PYTHONPATH"
        )
    return Path(spec.origin)


@functools.cache
def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), path)
    except SyntaxError as error:
        raise UsageError(f"{path} line {error.lineno}: expected Python, got {error.msg}") from None


Arguments = list[tuple[ast.arg, ast.expr | None]]


def _constructor(path: Path, class_name: str) -> tuple[Arguments, dict[str, str]]:
    """Return a class's keyword-only arguments with their defaults, and meanings; of its base where it has none."""
    body = _parsed(path).body
    cls = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if cls is None:
        raise UsageError(f"expected a class {class_name} in {path}, there is none")
    meanings = _meanings(ast.get_docstring(cls) or "")
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            if node.args.kwarg is not None:
                raise UsageError(
                    f"{path}: expected named arguments in {class_name}.__init__, got **{node.args.kwarg.arg}"
                )
            given = {argument.arg for argument in node.args.args}
            first = [argument.arg for argument in node.args.args if argument.arg not in CONTEXT]
            if first or not given:
                raise UsageError(
                    f"{path}: expected {class_name}.__init__(self, d_model, *, …), got {first} before the *"
                )
            return list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)), meanings
    for base in map(ast.unparse, cls.bases):
        if (found := _base(path, body, base)) is not None:
            arguments, inherited = _constructor(*found)
            return arguments, inherited | meanings
    return [], meanings


def _base(path: Path, body: list[ast.stmt], name: str) -> tuple[Path, str] | None:
    """Find the source of a base class: in the same file, or where it is imported from; None for a library's."""
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, name
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] != "torch":
            for imported in node.names:
                if (imported.asname or imported.name) == name:
                    return _source(node.module, str(path)), imported.name
    return None


def _meanings(docstring: str) -> dict[str, str]:
    """Return what the ``Args:`` of a docstring say of each argument, on one line each."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    found = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section.group(1) if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _field(owner: str, argument: ast.arg, default: ast.expr | None, meaning: str) -> tuple[str, Any, Any]:
    where = f"{owner}: the argument {argument.arg} of its constructor"
    if argument.arg == "name":
        raise UsageError(f"{where}: expected another word, model.mixer.name says which system it is")
    if argument.annotation is None:
        raise UsageError(f"{where}: expected an annotation such as int, got none")
    if default is None:
        raise UsageError(f"{where}: expected a default, got none; every option has one")
    try:
        kind, limits = _kind(argument.annotation)
        value = ast.literal_eval(default)
        if not isinstance(value, kind) and not (isinstance(value, int) and float in (kind, *get_args(kind))):
            raise TypeError(f"{value!r} is no {kind}")
        if unknown := limits.keys() - LIMITS:
            raise KeyError(f"limits {unknown}")
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{where}: expected int, float, bool, str, Literal[…] or one of these | None, with limits "
            f'Annotated[int, {{"ge": 1}}] ({", ".join(sorted(LIMITS))}), and a plain default of that type, got '
            f"{ast.unparse(argument.annotation)} = {ast.unparse(default)}"
        ) from None
    return argument.arg, kind, option(value, meaning, **limits)


def _kind(node: ast.expr) -> tuple[Any, dict[str, Any]]:
    """Read an annotation as a type that omegaconf knows, and limits."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Annotated"):
        inner, limits = node.slice.elts[:2]  # type: ignore[attr-defined]
        kind, choices = _kind(inner)
        return kind, choices | ast.literal_eval(limits)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
        choices = ast.literal_eval(node.slice)
        return str, {"choices": choices if isinstance(choices, tuple) else (choices,)}
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Optional"):
        kind, limits = _kind(node.slice)
        return kind | None, limits
    if isinstance(node, ast.BinOp):  # X | None
        kind, limits = _kind(node.left)
        ast.literal_eval(node.right)
        return kind | None, limits
    return _TYPES[ast.unparse(node)], {}


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
    tree = _parsed(_source(name.partition(":")[0], name))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]
