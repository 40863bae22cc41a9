"""What every command line shares: ``--help``, ``--cfg``, one line for an error."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from chela.config import PRESETS, fields, names, resolve, to_yaml
from chela.errors import UsageError
from chela.schema import Config
from lra.errors import DataError


def main(run: Callable[[Config], int], about: str, argv: list[str] | None = None) -> int:
    """Answer ``--help`` and ``--cfg``, or resolve the configuration and run; return the exit status."""
    words = sys.argv[1:] if argv is None else argv

    def command() -> int:
        if "--help" in words or "-h" in words:
            sys.stdout.write(help_text(about, [word for word in words if not word.startswith("-")]))
            return 0
        config = resolve([word for word in words if word != "--cfg"])
        if "--cfg" in words:
            sys.stdout.write(to_yaml(config))
            return 0
        return run(config)

    return guarded(command)


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
    except DataError as error:
        # a loader's worker hands its error over with the traceback in the text; the last one is the error itself
        return _failed(str(error).rpartition("DataError: ")[2])
    except OSError as error:
        if error.errno not in _SURROUNDINGS:
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
_SURROUNDINGS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EMFILE,
}


def _failed(message: str, status: int = UsageError.status) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return status


def _out_of_memory(error: Exception) -> bool:
    """Tell an allocation that failed from other errors; torch (not imported here) has a type for it on a GPU only."""
    known = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(text in str(error) for text in known)
    )


def help_text(about: str, words: list[str]) -> str:
    """List every group and key with its type, default and meaning, for the groups chosen in ``words``."""
    config = resolve(words)
    lines = [
        about.strip(),
        "",
        "Words are key=value. Groups are chosen by name:",
        f"  task=    {', '.join(names('task'))}",
        f"  model=   {', '.join(names('model'))}",
        f"  preset=  {', '.join(PRESETS)}",
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
        lines.append(f"    {key}={_plain(value)}  ({_type(item)})  {_meaning(item)}".rstrip())
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(item: dataclasses.Field[Any]) -> str:
    return item.type if isinstance(item.type, str) else item.type.__name__


def _meaning(item: dataclasses.Field[Any]) -> str:
    limits = dict(item.metadata)
    meaning = str(limits.pop("help", ""))
    if "choices" in limits:
        meaning += f" [{', '.join(map(str, limits['choices']))}]"
    bounds = [
        f"{sign} {limits[name]}"
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if name in limits
    ]
    return meaning + (f" [{', '.join(bounds)}]" if bounds else "")
