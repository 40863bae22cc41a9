import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from lra.schema import TASKS, DataConfig, ImageConfig, ListOpsConfig, RetrievalConfig, TextConfig


def test_every_option_is_explained_and_every_default_is_right() -> None:
    for name, config in TASKS.items():
        assert config().name == name
        config().check()
    for config in (*TASKS.values(), DataConfig):
        for field in fields(config):
            assert field.metadata["help"], f"{config.__name__}.{field.name}"


def test_it_imports_neither_numpy_nor_anything_heavy() -> None:
    code = (
        "import sys, lra.schema; print(sorted({'numpy','torch','lightning','tensorflow_datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "wrong",
    [
        ListOpsConfig(train=0),
        ListOpsConfig(max_depth=-1),
        ListOpsConfig(max_args=1),
        ListOpsConfig(min_length=50, max_length=40),
        ListOpsConfig(seed=-1),
        TextConfig(encoding="utf"),
        TextConfig(max_length=1),
        TextConfig(validation=25_000),
        TextConfig(max_length=10**9),
        ImageConfig(form="hsv"),
        ImageConfig(normalization="none"),
        ImageConfig(resolution=20),
        ImageConfig(validation=0),
        RetrievalConfig(encoding=""),
        RetrievalConfig(min_frequency=0),
        DataConfig(source="aan"),
        DataConfig(validation="tset"),
        DataConfig(workers=-1),
        DataConfig(pool=0),
    ],
)
def test_out_of_range_is_one_line(wrong: Any) -> None:
    with pytest.raises(ValueError) as error:
        wrong.check()
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHELA_DATA", "/somewhere")
    assert str(DataConfig().folder()) == "/somewhere"
    assert str(DataConfig(dir="/else").folder()) == "/else"
    monkeypatch.delenv("CHELA_DATA")
    assert DataConfig().folder().parts[-2:] == (".cache", "chela")
