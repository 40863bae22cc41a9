"""The README's commands, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"<!-- run: (\w+) -->\n+```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("kind", "block"),
    [pytest.param(kind, block, marks=pytest.mark.slow if kind == "slow" else ()) for kind, block in BLOCKS],
    ids=[f"{kind}{number}" for number, (kind, _) in enumerate(BLOCKS)],
)
def test_commands(kind: str, block: str, tmp_path: Path) -> None:
    """Each block is one shell script in an empty folder, with an empty data directory; installing is left to CI."""
    script = "\n".join(line.split(" && ")[-1] if line.startswith("pip") else line for line in block.splitlines())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CHELA_DATA": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_there_are_commands_to_run() -> None:
    assert {"fast", "slow"} <= {kind for kind, _ in BLOCKS}


def test_python_snippets_run() -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
