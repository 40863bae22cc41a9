import ast
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chela.core.options import check_options
from lra.schema import DataConfig
from lra.tasks import get_task, names, task_options
from lra.tasks.image import Image
from lra.tasks.listops import ListOps
from lra.tasks.retrieval import Retrieval
from lra.tasks.text import Text

ROOT = Path(__file__).parents[2]


def test_every_option_is_explained_and_every_default_is_right() -> None:
    for name in names():
        options = task_options(name)()
        assert options.name == get_task(options).name == name
        for field in (*fields(options), *fields(DataConfig)):
            assert field.metadata["help"], f"{name}.{field.name}"


def test_importing_a_task_loads_numpy_at_most() -> None:
    heavy = ("numba", "torch", "lightning", "tensorflow_datasets", "PIL", "filelock", "omegaconf")
    code = f"import sys, lra.tasks; lra.tasks.names(); print(set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_lra_stands_without_chela() -> None:
    files = sorted((ROOT / "lra").rglob("*.py"))
    for file in files:
        for node in ast.parse(file.read_text()).body:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in found if name and name.split(".")[0] == "chela"], file
    kept = taken_out()
    sys.modules["chela"] = None  # type: ignore[assignment]
    try:
        for file in files:
            importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    finally:
        taken_out()
        sys.modules.update(kept)


def taken_out() -> dict[str, ModuleType]:
    """Forget the modules of both packages, so that they are imported anew, and return them."""
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] in ("chela", "lra")}


@pytest.mark.parametrize(
    "wrong",
    [
        partial(ListOps, train=0),
        partial(ListOps, max_depth=-1),
        partial(ListOps, max_args=1),
        partial(ListOps, min_length=50, max_length=40),
        partial(ListOps, seed=-1),
        partial(Text, encoding="utf"),
        partial(Text, max_length=1),
        partial(Text, validation=25_000),
        partial(Text, max_length=10**9),
        partial(Image, form="hsv"),
        partial(Image, normalization="none"),
        partial(Image, resolution=20),
        partial(Image, validation=0),
        partial(Retrieval, encoding=""),
        partial(Retrieval, min_frequency=0),
        partial(DataConfig, validation="tset"),
        partial(DataConfig, workers=-1),
        partial(DataConfig, pool=0),
    ],
)
def test_out_of_range_is_one_line(wrong: Callable[[], Any]) -> None:
    with pytest.raises(ValueError) as error:
        check_options(wrong(), "data.")  # a task has checked itself
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHELA_DATA", "/somewhere")
    assert str(DataConfig().folder()) == "/somewhere"
    assert str(DataConfig(dir="/else").folder()) == "/else"
    monkeypatch.delenv("CHELA_DATA")
    assert DataConfig().folder().parts[-2:] == (".cache", "chela")
