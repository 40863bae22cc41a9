"""What every command line shares: reading its words, ``--help``, ``--cfg``, one line for an error."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, TypeVar

from chela.config.compose import resolve, to_yaml
from chela.config.groups import PRESETS, names
from chela.config.schema import fields
from chela.core.errors import UsageError
from chela.core.options import Field, check_options, closest, kind_of, read_value, shown

T = TypeVar("T")
HELP = ("--help", "-h")


def command(
    options: type[T], about: str | None, *, others: bool = False
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make ``main(argv)`` of a function of options: it answers ``--help``, or reads the words and runs.

    Args:
        options: A dataclass whose fields are declared with ``chela.core.options.option``.
        about: The command's docstring; the first line of its help.
        others: Whether the function also takes the ``key=value`` words that are not among them; else one is an error.
    """

    def wrapped(run: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(run)
        def main(argv: Sequence[str] | None = None, **more: Any) -> int:
            words = list(sys.argv[1:] if argv is None else argv)
            if set(HELP) & set(words):
                sys.stdout.write(options_text(options, about or ""))
                return 0

            def begin() -> int:
                made, rest = read_words(options, words)
                if others:
                    return run(made, rest, **more)
                no_more(rest, options)
                return run(made)

            return guarded(begin)

        return main

    return wrapped


def configured(run: Callable[..., int], about: str, words: list[str], options: type | None = None) -> int:
    """Answer ``--help`` and ``--cfg``, or resolve the configuration and run; return the exit status.

    Args:
        run: Is given the configuration, and the command's own options where it has some.
        about: The command's docstring.
        words: What was said.
        options: A dataclass of the command's own options.
    """

    def begin() -> int:
        rest = [word for word in words if word not in (*HELP, "--cfg")]
        own: list[Any] = []
        if options is not None:
            read, rest = read_words(options, rest)  # type: ignore[var-annotated]
            own.append(read)
        if set(HELP) & set(words):
            sys.stdout.write(help_text(about, rest))
            return 0
        config = resolve(rest)
        if "--cfg" in words:
            sys.stdout.write(to_yaml(config))
            return 0
        return run(config, *own)

    return guarded(begin)


def read_words(options: type[T], words: Sequence[str]) -> tuple[T, list[str]]:
    """Read a command's own options from its ``key=value`` words; return them and the words of other keys.

    A bare word goes to the positional option. A list is ``key=a,b``, or ``key=[a,b]``.

    Raises:
        UsageError: A word that is neither, a value of another type or out of its limits, a missing option.
    """
    known: dict[str, Field] = {_key(field): field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    bare = next((key for key, field in known.items() if field.metadata.get("positional")), None)
    given: dict[str, Any] = {}
    rest: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("-") or not (equals or bare):
            raise UsageError(f"expected key=value, got {shown(word)}{_meant(word, known)}; see --help")
        if key in known and equals:
            given[key] = value
        elif equals:
            rest.append(word)
        elif isinstance(given.setdefault(str(bare), []), list):
            given[str(bare)].append(word)
    if bare and isinstance(given.get(bare), list) and not kind_of(known[bare]).startswith("list["):
        if len(given[bare]) > 1:
            raise UsageError(f"{bare}: expected one value, got {' '.join(given[bare])}")
        [given[bare]] = given[bare]
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


def _meant(word: str, known: dict[str, Field]) -> str:
    """Say how ``--flag`` or ``--flag=value`` is written here, where it is an option."""
    flag, _, value = word.lstrip("-").partition("=")
    key = flag.replace("-", "_")
    if key not in known:
        return closest(key, known)
    return f": say {key}={value or ('true' if kind_of(known[key]) == 'bool' else '…')}"


def no_more(rest: list[str], options: type) -> None:
    """Refuse words that a command does not know.

    Raises:
        UsageError: There is one.
    """
    if rest:
        known = [_key(field) for field in dataclasses.fields(options)]
        key = rest[0].partition("=")[0]
        raise UsageError(
            f"expected {', '.join(f'{name}=…' for name in known)}, got {shown(rest[0])}{closest(key, known)}"
        )


@contextlib.contextmanager
def opened(name: str) -> Iterator[IO[bytes]]:
    """Open the file of the word ``input``, or standard input for ``-``.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        given = contextlib.nullcontext(sys.stdin.buffer)  # not ours to close
        file = given if name == "-" else open(os.path.expanduser(name), "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"input: expected a file to read, got {name} ({error.strerror})") from None
    with file as opened_file:
        yield opened_file


def options_text(options: type, about: str) -> str:
    """Return the help of a command: its docstring and its options with their defaults."""
    lines = [about.strip(), "", "Words are key=value:"]
    for field in dataclasses.fields(options):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        value = "…" if default is dataclasses.MISSING else plain(default)
        lines.append(f"    {_key(field)}={value}  {_meaning(field)}".rstrip())
    return "\n".join(lines) + "\n"


def help_text(about: str, words: list[str]) -> str:
    """List every group and key with its type, default and meaning, for the groups chosen in ``words``."""
    config = resolve(words)
    lines = [
        about.strip(),
        "",
        "Words are key=value. Groups are chosen by name:",
        f"  task=    {', '.join(names('task'))}",
        f"  model=   {', '.join(names('model'))}",
        f"  preset=  {', '.join(PRESETS)}; of some tasks also lite, hard, nano",
        "  --cfg    print the resolved configuration and stop",
        "",
        f"Keys, with their values for task={config.task.name} model={config.model.name} preset={config.preset}:",
    ]
    section = ""
    for key, value, field in fields(config):
        head = key.rpartition(".")[0]
        if head != section:
            section = head
            lines.append(f"\n  {section or 'the run'}")
        lines.append(f"    {key}={plain(value)}  ({kind_of(field)})  {_meaning(field)}".rstrip())
    return "\n".join(lines) + "\n"


def _meaning(field: Field) -> str:
    limits, signs = field.metadata, {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    choices = ", ".join(map(str, limits.get("choices", ())))
    bounds = ", ".join(f"{sign} {limits[name]}" for name, sign in signs.items() if name in limits)
    return str(limits.get("help", "")) + "".join(f" [{said}]" for said in (choices, bounds) if said)


def plain(value: Any) -> str:
    """Write a value as it stands in a ``key=value`` word."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def duration(seconds: float) -> str:
    """Write seconds for people.

    >>> duration(42), duration(190), duration(7260)
    ('42 s', '3 min 10 s', '2 h 01 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def guarded(command: Callable[[], int]) -> int:
    """Call ``command``; an error that a person can mend is one line on stderr and its exit status.

    Everything else is a fault of the program and keeps its traceback.
    """
    _share_cores()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only must not end a run
    try:
        return command()
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        return 0
    except KeyboardInterrupt:
        return _failed("stopped by Ctrl-C, nothing was saved", 128 + signal.SIGINT)
    except UsageError as error:
        return _failed(str(error), error.status)
    except OSError as error:
        if error.errno not in (*_DISKS, *_PATHS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _failed(
            f"expected a disk and folders that can be used, got: {error.strerror}{where}; mend it, then resume"
        )
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _failed(
            f"expected a run that fits into memory, got: {str(error)[:200] or 'out of memory'}; "
            "raise trainer.accumulate (the same batch, in more parts), or lower trainer.batch_size, "
            "trainer.eval_batch_size, or the sizes of model or task"
        )


def _share_cores() -> None:
    """Let threads that wait for each other give up their core soon: libgomp reads this when torch is loaded.

    By default they spin for longer than the scheduler's slice, and two programs on the same cores come to a halt. This
    many turns, some tenths of a millisecond, outlast the gap between two operators and no more (docs/runs.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


# What a disk, a quota or a path does to a program that is not at fault.
_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EMFILE)


def _failed(message: str, status: int = UsageError.status) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return status


def _out_of_memory(error: Exception) -> bool:
    """Tell an allocation that failed from other errors; torch (not imported here) has a type for it on a GPU only."""
    known = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")
    of_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return of_type or any(text in str(error) for text in known)
