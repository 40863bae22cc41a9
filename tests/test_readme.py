"""The README's commands and the pages' Python run; tables and sentences are what their commands print."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
filled = runpy.run_path(str(ROOT / "docs" / "make.py"))["filled"]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = re.findall(r"<!-- run: (\w+) -->\n+```bash\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    ("kind", "block"),
    [pytest.param(kind, block, marks=pytest.mark.slow if kind == "slow" else ()) for kind, block in BLOCKS],
    ids=[f"{kind}{number}" for number, (kind, _) in enumerate(BLOCKS)],
)
def test_commands(kind: str, block: str, tmp_path: Path) -> None:
    """Each block is one shell script in an empty folder, with an empty data directory; installing is left to CI."""
    script = "\n".join(line.split(" && ")[-1] if line.startswith("pip") else line for line in block.splitlines())
    command = tmp_path / "bin" / "chela"  # this checkout, whatever is installed
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m chela "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CHELA_DATA": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_there_are_commands_to_run() -> None:
    assert {"fast", "slow"} <= {kind for kind, _ in BLOCKS}


@pytest.mark.parametrize("page", ["README.md", "docs/chela.md"])
def test_python_snippets_run(page: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {})


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_blocks_are_what_their_commands_print(path: Path) -> None:
    text = path.read_text()
    assert filled(text) == text, "python docs/make.py makes them again"


def test_pages_are_short() -> None:
    assert len(README.splitlines()) <= 180
    assert (
        sum(
            len(path.read_text().splitlines())
            for path in (ROOT / "docs").glob("**/*.md")
            if "notebook" not in path.parts
        )
        <= 1300
    )


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))], ids=lambda path: path.name
)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        assert "://" in link or (path.parent / link).exists(), link
