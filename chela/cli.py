"""What every command line shares: ``--help``, ``--cfg``, one line for an error."""

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

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chela.config import first_line, resolve, to_yaml, type_name, unfit
from chela.core.errors import UsageError
from chela.core.options import check_options, closest, shown
from chela.groups import names
from chela.identity import fields
from chela.presets import PRESETS
from chela.schema import Config

T = TypeVar("T")
Field = dataclasses.Field[Any]


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
            if "--help" in words or "-h" in words:
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


def read_words(options: type[T], words: Sequence[str]) -> tuple[T, list[str]]:
    """Read a command's own options from its words; return them and the other ``key=value`` words.

    ``key=value`` is the one dialect. ``--key value``, ``--key`` and ``--no-key`` mean ``key=value``, ``key=true`` and
    ``key=false``. A bare word goes to the positional option. A list takes ``key=a,b`` or ``key=[a,b]``, or all bare
    words after it.

    Raises:
        UsageError: A flag that is not known, a value of another type or out of its limits, a missing option.
    """
    known = {field.metadata.get("key", field.name): field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    found, rest = _sorted_out(words, known)
    cfg = OmegaConf.structured(options)
    for key, texts in found.items():
        field = known[key]
        if not _is_list(field) and len(texts) != 1:
            raise UsageError(f"{key}: expected one value, got {' '.join(texts) or 'none'}")
        try:
            OmegaConf.update(cfg, field.name, texts if _is_list(field) else texts[0])
        except OmegaConfBaseException:
            raise UsageError(unfit(key, type_name(field), texts[0])) from None
    for key, field in known.items():
        if OmegaConf.is_missing(cfg, field.name):
            raise UsageError(f"{key}: expected {key}=…, {field.metadata['help']}; see --help")
    try:
        made: Any = OmegaConf.to_object(cfg)
        check_options(made)
    except (OmegaConfBaseException, ValueError) as error:
        raise UsageError(first_line(error)) from None
    return made, rest


def _sorted_out(words: Sequence[str], known: dict[str, Field]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the texts of each known key, and the words of others."""
    positional = next((key for key, field in known.items() if field.metadata.get("positional")), None)
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    taker = positional  # what a bare word is for
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("--"):
            key = key[2:].replace("-", "_")
            negated = key not in known and key.startswith("no_")
            key = key.removeprefix("no_") if negated else key
            if key not in known:
                raise UsageError(f"unknown option {word!r}{closest(key, known)}; see --help")
            if not equals and type_name(known[key]) != "bool":
                taker, found[key] = key, []
                continue
            value = value if equals else str(not negated).lower()
        elif not equals or key not in known:
            if equals and taker == positional:
                rest.append(word)
                continue
            if taker is None:
                raise UsageError(f"expected key=value, got {shown(word)}; see --help")
            found.setdefault(taker, []).append(word)
            taker = taker if _is_list(known[taker]) else positional
            continue
        found[key], taker = _items(value) if _is_list(known[key]) else [value], positional
    return found, rest


def _items(value: str) -> list[str]:
    """Split ``a,b``, or ``[a, b]`` as the help shows a default and YAML writes one."""
    if not (value.startswith("[") and value.endswith("]")):
        return value.split(",")
    return [item.strip() for item in value[1:-1].split(",") if item.strip()]


def _is_list(field: Field) -> bool:
    return type_name(field).startswith("list[")


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


def no_more(rest: list[str], options: type) -> None:
    """Refuse words that a command does not know.

    Raises:
        UsageError: There is one.
    """
    if rest:
        known = [field.metadata.get("key", field.name) for field in dataclasses.fields(options)]
        key = rest[0].partition("=")[0]
        raise UsageError(
            f"expected {', '.join(f'{name}=…' for name in known)}, got {shown(rest[0])}{closest(key, known)}"
        )


def options_text(options: type, about: str) -> str:
    """Return the help of a command: its docstring and its options with their defaults."""
    lines = [about.strip(), "", "Words are key=value:"]
    for field in dataclasses.fields(options):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        value = "…" if default is dataclasses.MISSING else plain(default)
        lines.append(f"    {field.metadata.get('key', field.name)}={value}  {_meaning(field)}".rstrip())
    return "\n".join(lines) + "\n"


def main(run: Callable[[Config], int], about: str, words: list[str]) -> int:
    """Answer ``--help`` and ``--cfg``, or resolve the configuration and run; return the exit status."""

    def begin() -> int:
        if "--help" in words or "-h" in words:
            sys.stdout.write(help_text(about, [word for word in words if not word.startswith("-")]))
            return 0
        config = resolve([word for word in words if word != "--cfg"])
        if "--cfg" in words:
            sys.stdout.write(to_yaml(config))
            return 0
        return run(config)

    return guarded(begin)


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
    for key, value, item in fields(config):
        head = key.rpartition(".")[0]
        if head != section:
            section = head
            lines.append(f"\n  {section or 'the run'}")
        lines.append(f"    {key}={plain(value)}  ({type_name(item)})  {_meaning(item)}".rstrip())
    return "\n".join(lines) + "\n"


def plain(value: Any) -> str:
    """Write a value as it stands in a ``key=value`` word."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _meaning(item: Field) -> str:
    limits, signs = item.metadata, {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    choices = ", ".join(map(str, limits.get("choices", ())))
    bounds = ", ".join(f"{sign} {limits[name]}" for name, sign in signs.items() if name in limits)
    return str(limits.get("help", "")) + "".join(f" [{said}]" for said in (choices, bounds) if said)
