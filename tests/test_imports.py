"""The reuse door: layers and models need torch and einops, and nothing else."""

import subprocess
import sys

BLOCKED = ("lightning", "omegaconf", "tensorflow_datasets", "triton", "array_record", "numba", "rich", "torchmetrics")
PROGRAM = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # any import of it is now an ImportError
import pkgutil, importlib
for package in ("chela.ops", "chela.layers", "chela.models"):
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        if "triton" in found.name or "kernels" in found.name or found.name.endswith("__main__"):
            continue  # loaded by their op when asked for
        if found.name == "chela.models.hub":
            continue  # for those who have huggingface_hub
        importlib.import_module(found.name)
import torch, chela
layer = chela.ChelaLayer(16, l_max=64)
layer(torch.randn(2, 64, 16)).sum().backward()
torch.optim.AdamW(chela.param_groups(layer, lr=1e-3, weight_decay=0.1)).step()
"""


def test_layers_need_torch_and_einops_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_loads_nothing_before_it_is_asked() -> None:
    program = "import sys, chela; assert not {'torch', 'lightning', 'omegaconf'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
