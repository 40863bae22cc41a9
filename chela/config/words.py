"""What every command line shares: reading its words, ``--help``, ``--cfg``, one line for an error."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import itertools
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from chela.config.compose import GROUPS, PRESETS, names, resolve, to_yaml
from chela.config.schema import fields
from chela.core.errors import UsageError
from chela.core.options import BOUNDS, Field, check_options, closest, read_value, shown, split_words


def command(
    options: type | None, about: str | Callable[[], str] | None, *, others: bool = False, sections: Sequence[str] = ()
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Turn a function into ``main(argv)``, which prints ``--help``, or reads the words and calls the function.

    Args:
        options: A dataclass whose fields are declared with ``chela.core.options.option``: the function's first
            argument; None where it takes none.
        about: The command's docstring, or a function that returns it; ``--help`` begins with it.
        others: Whether the function also takes the ``key=value`` words that are none of its options; else they are
            errors.
        sections: Sections of the configuration whose keys its help lists. Unless ``others``, the function gets the
            configuration that the other words make, and ``--cfg`` prints it.
    """

    def wrapped(run: Callable[..., int]) -> Callable[..., int]:
        def answer(words: list[str], **more: Any) -> int:
            if {"--help", "-h"} & set(words):
                text = about() if callable(about) else about or ""
                sys.stdout.write(help_text(text, options, sections, words))
                return 0
            rest = [word for word in words if not (sections and word == "--cfg")]
            given: list[Any] = []
            if options is not None:
                made, rest = read_words(options, rest, others=others or bool(sections))
                given = [made]
            if others:
                given.append(rest)
            elif sections:
                given.append(resolve(rest))
                if "--cfg" in words:
                    sys.stdout.write(to_yaml(given[-1]))
                    return 0
            return run(*given, **more)

        @functools.wraps(run)
        def main(argv: Sequence[str] | None = None, **more: Any) -> int:
            return guarded(lambda: answer([*(sys.argv[1:] if argv is None else argv)], **more))

        return main

    return wrapped


def read_words(options: Any, words: Sequence[str], others: bool = True) -> tuple[Any, list[str]]:
    """Read a command's own options from its ``key=value`` words; return them and the words of other keys.

    Bare words go to the positional option. A list is ``key=a,b``, or ``key=[a,b]``. UsageError for a value that cannot
    be read, and for other keys unless there may be ``others``.
    """
    known = _by_key(options)
    bare = next((key for key, field in known.items() if field.metadata.get("positional")), "")
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    for key, value in split_words(words, bare):
        if key in known:
            given[key] = [*given.get(key, []), value] if key == bare else [value]  # the last word wins
        elif others:
            rest.append(f"{key}={value}")
        else:
            wanted = ", ".join(f"{name}=…" for name in known)
            raise UsageError(f"expected {wanted}, got {shown(f'{key}={value}')}{closest(key, known)}")
    values = {}
    for key, field in known.items():
        if key in given:
            kind, texts = str(field.type), given[key]
            if len(texts) > 1 and not kind.startswith("list["):
                raise UsageError(f"{key}: expected one value, got {' '.join(texts)}")
            values[field.name] = read_value(key, kind, texts if len(texts) > 1 else texts[0])
        elif field.default is field.default_factory is dataclasses.MISSING:
            place = "" if field.metadata.get("positional") else f"{key}=…, "
            raise UsageError(f"{key}: expected {place}{field.metadata['help']}; see --help")
    made = options(**values)
    check_options(made)
    return made, rest


def _by_key(options: Any) -> dict[str, Field]:
    """Return the fields of a dataclass of options (None has none) by their key on the command line."""
    declared = () if options is None else dataclasses.fields(options)
    return {str(field.metadata.get("key", field.name)): field for field in declared}


SECTIONS = ("run", "task", "model", "optimizer", "trainer", "data")  # of a configuration; run: keys without a dot


def help_text(about: str, options: Any, sections: Sequence[str] = (), words: Sequence[str] = ()) -> str:
    """Return the help of a command, as wide as the terminal: docstring, own options, and the keys of these sections.

    ``words`` choose the task, model and preset whose keys are listed; a section's name lists that section alone.
    """
    own = _by_key(options)
    alone = [word for word in words if sections and "=" not in word and not word.startswith("-")]
    lines: list[str] = []
    for word in alone:
        if word not in sections:
            raise UsageError(f"expected --help of {', '.join(sections)}, got {shown(word)}{closest(word, sections)}")
    if not alone:
        for paragraph in about.strip().split("\n\n"):  # join its lines unless they are set in columns
            lines += [*(paragraph.split("\n") if "  " in paragraph else [paragraph.replace("\n", " ")]), ""]
        lines.append("Words are key=value:")
        for key, field in own.items():
            default = field.default_factory() if callable(field.default_factory) else field.default
            lines.append(_line(key, "…" if default is dataclasses.MISSING else plain(default), field))
    if sections:
        config = resolve([word for word in words if "=" in word and word.partition("=")[0] not in own])
        if not alone:
            lines += [f"    {group}=  {', '.join(names(group))}" for group in GROUPS if group in sections]
            lines.append(f"    preset=  {', '.join(PRESETS)}; of some tasks also lite, hard, nano")
            lines += ["    --cfg  print the configuration and stop", "    --help SECTION  only the keys of a section"]
        keys = [leaf for leaf in fields(config) if not leaf[0].endswith(".name")]  # set by the choice of the group
        for name, leaves in itertools.groupby(keys, key=lambda leaf: leaf[0].rpartition(".")[0] or "run"):
            if name.partition(".")[0] in (alone or sections):
                lines += ["", f"{name}, for task={config.task.name} model={config.model.name} preset={config.preset}:"]
                lines += [_line(key, f"{plain(value)}  ({field.type})", field) for key, value, field in leaves]
    width, text = shutil.get_terminal_size().columns, ""
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        folded = textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        text += f"{folded}\n"
    return text


def _line(key: str, value: str, field: Field) -> str:
    """Return the line of an option in the help: with its meaning, choices and bounds."""
    limits = field.metadata
    choices = ", ".join(map(str, limits.get("choices", ())))
    bounds = ", ".join(f"{sign} {limits[name]:g}" for name, (_, _, sign) in BOUNDS.items() if name in limits)
    meaning = str(limits.get("help", "")) + "".join(f" [{limit}]" for limit in (choices, bounds) if limit)
    return f"    {key}={value}  {meaning}".rstrip()


def plain(value: Any) -> str:
    """Write a value as it stands in a ``key=value`` word."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


# Errors of disk, quota, path or memory, which are no fault of the program. C++ gives a text alone.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISKS = (*_FULL, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOLCK)
_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EMFILE)
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")


def guarded(command: Callable[[], int]) -> int:
    """Call ``command``; print an error that a person can mend as one line on stderr, and return its exit status.

    Everything else is a fault of the program and keeps its traceback.

    GOMP_SPINCOUNT says how long a waiting thread spins before it gives up its core; libgomp reads it when torch is
    loaded. The default is longer than the scheduler's slice, so that two programs on the same cores come to a halt.
    This count, some tenths of a millisecond, just outlasts the gap between two operators (docs/runs.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end a run
    status = UsageError.status
    try:
        return command()
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        return 0
    except KeyboardInterrupt:
        message, status = "stopped by Ctrl-C, nothing was saved", 128 + signal.SIGINT
    except UsageError as error:
        message, status = str(error), error.status
    except Exception as error:
        problem, number = str(error), getattr(error, "errno", None)
        if isinstance(error, OSError):
            problem = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        if number in (*_DISKS, *_PATHS) or any(os.strerror(full) in problem for full in _FULL):
            message = f"expected a disk and folders that can be used, got: {problem[:300]}; mend it, then resume"
        elif isinstance(error, MemoryError) or any(text in problem for text in _NO_MEMORY):
            message = (
                f"expected a run that fits into memory, got: {problem[:200] or 'out of memory'}; raise "
                "trainer.accumulate (the same batch, in more parts), or lower trainer.batch_size, "
                "trainer.eval_batch_size, or the sizes of model or task"
            )
        else:
            raise
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return status
