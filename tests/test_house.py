"""Rules of the house that a reader relies on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chela import __version__

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("chela", "lra", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]
PRIVATE_OF_LIGHTNING = re.compile(
    r"lightning[.\w]*\.import _|\bfrom lightning\S* import (.*, )?_|"  # names that begin with _
    r"\b(trainer|module|pl_module|loop)\.\w*\._|\bfit_loop\b|\bepoch_loop\b|batch_progress|optim_progress"
)


def imports(path: Path) -> set[str]:
    """The modules that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_thing(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


ROOMS = ["chela/core", "chela/ops", "chela/layers", "chela/models", "chela/training"]


def test_imports_point_downhill() -> None:
    """experiments → chela.train → training → models → layers → ops → core; lra imports core alone."""
    for path in FILES:
        place = str(path.relative_to(ROOT))
        number = next((number for number, folder in enumerate(ROOMS) if place.startswith(f"{folder}/")), len(ROOMS))
        above = tuple(folder.replace("/", ".") for folder in ROOMS[number + 1 :])
        if place.startswith("chela/core"):
            above = ("chela.", "lra.")
        for name in imports(path):
            assert place.startswith("experiments") or not name.startswith("experiments"), f"{place} imports {name}"
            if place.startswith("lra"):
                assert not name.startswith("chela") or name.startswith("chela.core"), f"{place} imports {name}"
            elif not name.startswith("chela.core"):
                assert not name.startswith(above or "\0"), f"{place} imports {name}"


def test_lightning_is_used_by_its_public_doors() -> None:
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not PRIVATE_OF_LIGHTNING.search(line), f"{path}:{number}: {line.strip()}"


def test_help_answers_at_once_and_without_torch() -> None:
    program = (
        "import sys; from chela.__main__ import main; main(['--help']); main(['--version']); "
        "import chela.train, chela.evaluate, chela.predict, chela.generate; "
        "print('loaded', sorted({'torch', 'lightning', 'tensorflow_datasets', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "loaded []" in done.stdout and f"\nchela {__version__}\n" in done.stdout, done.stdout + done.stderr
    assert all(f"    {name} " in done.stdout for name in ("train", "evaluate", "sweep", "table", "bench"))


def test_an_unknown_command_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "chela", "trian"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "got 'trian' (did you mean 'train'?)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
