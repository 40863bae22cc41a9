"""A wheel built from the repository works in an empty environment that has torch and einops alone."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib.util, torch
absent = ("lightning", "omegaconf", "tensorflow_datasets", "safetensors", "triton", "numpy")
assert not any(importlib.util.find_spec(name) for name in absent), absent
from chela import ChelaLayer, linear_attention, param_groups
layer = ChelaLayer(16, l_max=64)
layer(torch.randn(2, 50, 16)).sum().backward()
torch.optim.AdamW(param_groups(layer, lr=1e-3, weight_decay=0.1)).step()
"""


def _run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment(tmp_path):
    """torch and einops are those of this environment, linked in; whatever else is installed stays out of sight."""
    import einops
    import torch

    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("chela_attention-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in held if name.startswith("experiments/results")]
    assert {f"chela/weights/text-lite/{name}" for name in ("config.json", "model.safetensors", "README.md")} <= {*held}
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    _run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    here = Path(torch.__file__).parents[1]
    needed = ["torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec"]
    for name in [*needed, "filelock", "typing_extensions.py"]:
        if (here / name).exists():
            (packages / name).symlink_to(here / name)
    (packages / "einops").symlink_to(Path(einops.__file__).parent)
    for library in here.glob("nvidia*"):
        (packages / library.name).symlink_to(library)
    _run(python, "-W", "ignore", "-c", PROGRAM, cwd=tmp_path)
    names = _run(python, "-c", "from chela.layers.mixers import systems; print(*systems())", cwd=tmp_path).split()
    assert "lion" in names
    assert (packages / "chela" / "configs" / "model" / "lion.yaml").is_file()
