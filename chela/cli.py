"""What every command line shares: ``--help``, ``--cfg``, one line for an error."""

from __future__ import annotations

import dataclasses
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
    """Call ``command``; an error that a person can mend is one line on stderr and its exit status."""
    try:
        return command()
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.status
    except DataError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return UsageError.status
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        return 0


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
