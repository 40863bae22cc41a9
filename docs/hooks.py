"""Pages of the site that are made when it is built: the command line from ``--help``, and the report of the sweep."""

import contextlib
import io
import re
import tempfile
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``reference/commands.md`` and ``report.html``."""
    from chela.__main__ import COMMANDS

    parts = ["# Command line\n\nWords are `key=value`. Every page below is what `--help` prints.\n"]
    for name, (_, about) in COMMANDS.items():
        parts.append(
            f"## chela {name}\n\n{about[:1].upper()}{about[1:]}.\n\n```\n{chela(name, '--help').strip()}\n```\n"
        )
    files.append(File.generated(config, "reference/commands.md", content="\n".join(parts)))
    with tempfile.TemporaryDirectory() as folder:
        chela("report", "experiments/results/lra_mini", f"out={folder}/report.html")
        files.append(File.generated(config, "report.html", content=Path(folder, "report.html").read_text()))
    return files


class Doctests(griffe.Extension):
    """Fence what stands after ``>>>`` in a docstring, which Markdown would take for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring in place."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^>>> .+(?:\n.+)*", r"```python\n\g<0>\n```", obj.docstring.value)


def chela(*words: str) -> str:
    """Return what a command prints."""
    from chela.__main__ import main

    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()) as out:
        main(list(words))
    return out.getvalue()
