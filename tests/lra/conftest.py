import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from lra.source import DataConfig
from lra.tasks.listops import VOCABULARY, ListOps


def text(tokens: np.ndarray) -> str:
    """Return ListOps' ids in words."""
    return " ".join(VOCABULARY[i] for i in tokens.tolist())


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, or a skip with the reason."""
    folder = Path(os.environ.get("CHELA_SHARED_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set CHELA_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def small_listops() -> ListOps:
    return ListOps(train=300, validation=40, test=50, min_length=8, max_length=40, max_depth=4, max_args=4)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """One data folder for all tests that only read."""
    return DataConfig(dir=str(tmp_path_factory.mktemp("records")), processes=1)


def common(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all workers of a test session share."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def real_text(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The whole of IMDb as records, built by whoever asks first."""
    return DataConfig(dir=str(common(tmp_path_factory, "real-text")), root=str(shared / "text"))


@pytest.fixture(scope="session")
def real_image(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The whole of CIFAR-10, laid out as its authors ship it."""
    folder = common(tmp_path_factory, "real-image")
    with FileLock(folder / ".mine.lock"):
        subprocess.run([sys.executable, str(shared / "unpack.py"), str(folder / "mine"), "image"], check=True)
    return DataConfig(dir=str(folder / "records"), root=str(folder / "mine"))
