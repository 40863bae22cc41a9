import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from chela.config.compose import load, resolve, to_yaml
from chela.config.identity import identity_of
from chela.core.errors import UsageError
from chela.core.options import check_options
from lra.source import DataConfig
from lra.tasks import TASKS, get_task, task_class, task_options
from lra.tasks.image import Image
from lra.tasks.listops import ListOps
from lra.tasks.retrieval import Retrieval
from lra.tasks.text import Text


def test_every_option_is_explained_and_every_default_is_right() -> None:
    for name in TASKS:
        options = task_options(name)()
        assert options.name == get_task(options).name == name
        for field in (*fields(options), *fields(DataConfig)):
            assert field.metadata["help"], f"{name}.{field.name}"


def test_importing_a_task_loads_numpy_at_most() -> None:
    heavy = ("numba", "torch", "lightning", "tensorflow_datasets", "PIL", "filelock", "omegaconf")
    code = f"import sys, lra.tasks; print(set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "wrong",
    [
        partial(ListOps, train=0),
        partial(ListOps, max_depth=-1),
        partial(ListOps, max_args=1),
        partial(ListOps, min_length=50, max_length=40),
        partial(ListOps, seed=-1),
        partial(Text, validation=25_000),
        partial(Retrieval, test=-1),
        partial(Text, max_length=10**9),
        partial(Image, normalization="none"),
        partial(Image, resolution=20),
        partial(Image, validation=0),
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


@pytest.mark.parametrize("name", ["text", "retrieval", "image", "pathfinder", "pathx"])
def test_an_option_that_went_is_read_at_its_one_value_and_still_counts(name: str, tmp_path: Path) -> None:
    config, retired = resolve([f"task={name}", "preset=tiny"]), task_class(name).retired
    counted = identity_of({"task.name": name})
    assert retired and all(counted[f"task.{option}"] == value for option, value in retired.items())
    saved = OmegaConf.create(to_yaml(config))
    saved.task.update(retired)
    path = tmp_path / "config.yaml"
    OmegaConf.save(saved, path)
    assert load(path) == config
    option = next(iter(retired))
    saved.task[option] = "another"
    OmegaConf.save(saved, path)
    with pytest.raises(UsageError, match=rf"task\.{option}.*, the one value"):
        load(path)
