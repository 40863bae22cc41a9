"""No program here unpickles: a checkpoint, a cache or a data set may come from anybody."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
REQUIRED = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
REFUSED = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "numpy.load", "pd.read_pickle"}


def unsafe(code: str) -> list[str]:
    """Name what could run code that stands in a file."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            argument, value = REQUIRED.get(name, (None, None))
            if name in REFUSED or (argument and given.get(argument) != value):
                found.append(name)
    return found


@pytest.mark.parametrize("package", ["chela", "lra", "experiments", "examples"])
def test_nothing_is_unpickled(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    assert {str(path): found for path in files if (found := unsafe(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
    ],
)
def test_what_is_unsafe_is_seen(code: str) -> None:
    assert unsafe(code)
