"""The reuse door: what docs/reuse.md shows runs, and it opens with torch and einops alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Everything that is not torch or einops (or needed by them); safetensors only for the pretrained folder.
BLOCKED = ("lightning", "omegaconf", "tensorflow_datasets", "triton", "array_record", "numba", "rich", "torchmetrics")
BLOCKED += ("PIL", "importlib_resources")


def test_the_snippets_and_all_modules_need_nothing_but_torch_einops_and_safetensors():
    program = f"""
import importlib, pkgutil, re, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # any import of it is now an ImportError
for package in ("chela.ops", "chela.layers", "chela.models"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if "triton" in found.name or "kernels" in found.name or found.name.endswith("__main__"):
            continue  # loaded by their op when asked for
        importlib.import_module(found.name)
namespace = {{}}
for snippet in re.findall(r"```python\\n(.*?)```", open("docs/reuse.md").read(), re.DOTALL):
    exec(snippet, namespace)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_layers_need_nothing_but_torch_and_einops():
    program = f"""
import sys
for name in {(*BLOCKED, "safetensors", "numpy")!r}:
    sys.modules[name] = None
import warnings
warnings.simplefilter("ignore")  # torch says once that there is no numpy
import torch
from chela import ChelaLayer, param_groups
from chela.layers.mixers import build_mixer
from chela.models import TaskFacts, build_model
from chela.layers.mixers import mixer_options, systems
from chela.config.schema import ModelConfig
for name in systems():
    mixer = build_mixer(name, 16, {{}}, l_max=64, causal=name == "lightning", layer=0, depth=2)
    mixer(torch.randn(2, 50, 16)).sum().backward()
    torch.optim.AdamW(param_groups(mixer, lr=1e-3, weight_decay=0.1)).step()
    config = ModelConfig(mixer=mixer_options(name)(), d_model=16, depth=1, causal=name == "lightning")
    build_model(config, TaskFacts(num_classes=2, l_max=64, vocab_size=9), 0)(torch.ones(2, 5, dtype=torch.long))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
