"""What every command line shares: reading its words, ``--help``, ``--cfg``, one line for an error."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, TypeVar

from chela.config.compose import GROUPS, resolve, to_yaml
from chela.config.groups import PRESETS, names
from chela.config.schema import fields
from chela.core.errors import UsageError
from chela.core.options import BOUNDS, Field, check_options, closest, kind_of, read_value, shown, spelled

T = TypeVar("T")
HELP = ("--help", "-h")


def command(
    options: type | None, about: str | Callable[[], str] | None, *, others: bool = False, sections: Sequence[str] = ()
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make ``main(argv)`` of a function: it answers ``--help``, or reads the words and runs.

    Args:
        options: A dataclass whose fields are declared with ``chela.core.options.option``: the function's first
            argument; None where it takes none.
        about: The command's docstring, or what makes it; the first lines of its help.
        others: Whether the function also takes the ``key=value`` words that are not among them; else one is an error.
        sections: Its help lists the keys of these sections of the configuration. Unless it takes those words, it gets
            the configuration that they make, which ``--cfg`` prints.
    """

    def wrapped(run: Callable[..., int]) -> Callable[..., int]:
        def answer(words: list[str], **more: Any) -> int:
            if set(HELP) & set(words):
                text = about() if callable(about) else about or ""
                sys.stdout.write(help_text(text, options, sections, words))
                return 0
            given: list[Any] = []
            rest = [word for word in words if not (sections and word == "--cfg")]
            if options is not None:
                made, rest = read_words(options, rest)  # type: ignore[var-annotated]
                given.append(made)
            if rest and not (others or sections):
                known = [_key(field) for field in dataclasses.fields(options)]  # type: ignore[arg-type]
                near = closest(rest[0].partition("=")[0], known)
                raise UsageError(f"expected {', '.join(f'{name}=…' for name in known)}, got {shown(rest[0])}{near}")
            if sections and not others:
                given.append(resolve(rest))
                if "--cfg" in words:
                    sys.stdout.write(to_yaml(given[-1]))
                    return 0
            return run(*given, *([rest] if others else []), **more)

        @functools.wraps(run)
        def main(argv: Sequence[str] | None = None, **more: Any) -> int:
            return guarded(lambda: answer([*(sys.argv[1:] if argv is None else argv)], **more))

        return main

    return wrapped


def read_words(options: type[T], words: Sequence[str]) -> tuple[T, list[str]]:
    """Read a command's own options from its ``key=value`` words; return them and the words of other keys.

    A bare word goes to the positional option. A list is ``key=a,b``, or ``key=[a,b]``.
    """
    known: dict[str, Field] = {_key(field): field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    bare = next((key for key, field in known.items() if field.metadata.get("positional")), None)
    given: dict[str, Any] = {}
    rest: list[str] = []
    places: list[str] = []
    for word, after in itertools.pairwise([*words, ""]):
        key, equals, value = word.partition("=")
        if word.startswith("-") or not (equals or bare):
            raise UsageError(f"expected key=value, got {shown(word)}{spelled(word, after)}; see --help")
        if not equals:
            places.append(word)
        elif key in known:
            given[key] = value
        else:
            rest.append(word)
    if bare and places:
        several = kind_of(known[bare]).startswith("list[")
        if len(places) > 1 and not several:
            raise UsageError(f"{bare}: expected one value, got {' '.join(places)}")
        given.setdefault(bare, places if several else places[0])
    values = {}
    try:
        for key, field in known.items():
            if key in given:
                values[field.name] = read_value(key, kind_of(field), given[key])
            elif field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{key}: expected {key}=…, {field.metadata['help']}; see --help")
        made = options(**values)
        check_options(made)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return made, rest


def _key(field: Field) -> str:
    return str(field.metadata.get("key", field.name))


@contextlib.contextmanager
def opened(name: str) -> Iterator[IO[bytes]]:
    """Open the file of the word ``input``, or standard input for ``-``; UsageError where it cannot be read."""
    try:
        given = contextlib.nullcontext(sys.stdin.buffer)  # not ours to close
        file = given if name == "-" else open(os.path.expanduser(name), "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"input: expected a file to read, got {name} ({error.strerror})") from None
    with file as opened_file:
        yield opened_file


SECTIONS = ("run", "task", "model", "optimizer", "trainer", "data")  # of a configuration; run: keys without a dot


def help_text(about: str, options: Any, sections: Sequence[str] = (), words: Sequence[str] = ()) -> str:
    """Return the help of a command, as wide as the terminal: docstring, own options, and the keys of these sections.

    ``words`` choose the groups whose keys are listed; a section among them is listed alone.
    """
    own = {_key(field): field for field in (dataclasses.fields(options) if options is not None else ())}
    alone = [word for word in words if sections and "=" not in word and not word.startswith("-")]
    lines = [] if alone else [*_paragraphs(about), "Words are key=value:"]
    for word in alone:
        if word not in sections:
            raise UsageError(f"expected --help of {', '.join(sections)}, got {shown(word)}{closest(word, sections)}")
    for key, field in own.items() if not alone else ():
        default = field.default_factory() if callable(field.default_factory) else field.default
        lines.append(_line(key, "…" if default is dataclasses.MISSING else plain(default), field))
    if sections:
        config = resolve([word for word in words if "=" in word and word.partition("=")[0] not in own])
        if not alone:
            lines += [f"    {group}=  {', '.join(names(group))}" for group in GROUPS if group in sections]
            lines.append(f"    preset=  {', '.join(PRESETS)}; of some tasks also lite, hard, nano")
            lines += ["    --cfg  print the configuration and stop", "    --help SECTION  only the keys of a section"]
        keys = [leaf for leaf in fields(config) if not leaf[0].endswith(".name")]  # which the group chooses
        for name, leaves in itertools.groupby(keys, key=lambda leaf: leaf[0].rpartition(".")[0] or "run"):
            if name.partition(".")[0] in (alone or sections):
                lines += ["", f"{name}, for task={config.task.name} model={config.model.name} preset={config.preset}:"]
                lines += [_line(key, f"{plain(value)}  ({kind_of(field)})", field) for key, value, field in leaves]
    width = shutil.get_terminal_size().columns
    return "".join(f"{_folded(line, width)}\n" for line in lines)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the lines of a docstring, a paragraph as one, unless things stand in columns there."""
    for paragraph in text.strip().split("\n\n"):
        yield from paragraph.split("\n") if re.search(r"\S  |^ ", paragraph, re.M) else [paragraph.replace("\n", " ")]
        yield ""


def _folded(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _line(key: str, value: str, field: Field) -> str:
    """Return the line of an option in the help: with its meaning, choices and bounds."""
    limits = field.metadata
    choices = ", ".join(map(str, limits.get("choices", ())))
    bounds = ", ".join(f"{sign} {limits[name]:g}" for name, (_, _, sign) in BOUNDS.items() if name in limits)
    meaning = str(limits.get("help", "")) + "".join(f" [{said}]" for said in (choices, bounds) if said)
    return f"    {key}={value}  {meaning}".rstrip()


def plain(value: Any) -> str:
    """Write a value as it stands in a ``key=value`` word."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


# What a disk, a quota or a path does to a program that is not at fault.
_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EMFILE)
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")


def guarded(command: Callable[[], int]) -> int:
    """Call ``command``; an error that a person can mend is one line on stderr and its exit status.

    Everything else is a fault of the program and keeps its traceback.

    Threads that wait for each other give up their core soon: libgomp reads this when torch is loaded. By default they
    spin for longer than the scheduler's slice, and two programs on the same cores come to a halt. This many turns, some
    tenths of a millisecond, outlast the gap between two operators and no more (docs/runs.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only must not end a run
    status = UsageError.status
    try:
        return command()
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        return 0
    except KeyboardInterrupt:
        message, status = "stopped by Ctrl-C, nothing was saved", 128 + signal.SIGINT
    except UsageError as error:
        message, status = str(error), error.status
    except OSError as error:
        if error.errno not in (*_DISKS, *_PATHS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        message = f"expected a disk and folders that can be used, got: {error.strerror}{where}; mend it, then resume"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in _NO_MEMORY):
            raise
        message = (
            f"expected a run that fits into memory, got: {str(error)[:200] or 'out of memory'}; raise "
            "trainer.accumulate (the same batch, in more parts), or lower trainer.batch_size, "
            "trainer.eval_batch_size, or the sizes of model or task"
        )
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return status
