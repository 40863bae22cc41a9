"""The examples run: layers in other code, a system and a task of one's own."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import yaml

from chela import train
from chela.config.compose import resolve

OWN = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")  # of a Trainer
EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def test_reuse_in_a_lightning_module():
    text = (EXAMPLES / "reuse_in_lightning.py").read_text()
    assert len(text.splitlines()) < 60
    lightning.seed_everything(0)
    module = load_example("reuse_in_lightning").Tagger()
    batches = torch.utils.data.DataLoader(torch.randint(0, 2, (640, 12)), batch_size=32)
    before = module.training_step(next(iter(batches)), 0).item()
    quiet = dict.fromkeys(OWN, False)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet)
    trainer.fit(module, batches)
    assert module.training_step(next(iter(batches)), 0).item() < 0.9 * before
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates["marked(lr=0.001, weight_decay=0.01)"] == 1e-3
    assert rates["decay"] == 3e-3


def test_a_system_and_a_task_of_ones_own(tmp_path, monkeypatch):
    files = sorted(EXAMPLES.glob("my_*"))
    assert len(files) == 5 and sum(len(path.read_text().splitlines()) for path in files) < 60
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", (EXAMPLES.parent / "docs/extend.md").read_text(), re.DOTALL)
    assert {path.read_text() for path in files} <= set(blocks)  # docs/extend.md shows them as they are
    monkeypatch.syspath_prepend(EXAMPLES)
    words = [f"task={EXAMPLES / 'my_task.yaml'}", f"model={EXAMPLES / 'my_mixer.yaml'}", "preset=mini"]
    sizes = ["model.d_model=32", "model.depth=1", "trainer.max_steps=150", "optimizer.lr=1e-2"]
    assert train.main([*words, *sizes, f"runs={tmp_path}"]) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["test"]["accuracy"] > 0.9
    assert train.main([words[0], f"resume={result.parent}", "trust=my_task,my_mixer"]) == 0  # the same task again


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_tested(path):
    assert path.stem in Path(__file__).read_text()


def test_recall_in_plain_torch_begins() -> None:
    assert 0 <= load_example("recall_in_plain_torch").main(steps=2) < 0.1


@pytest.mark.slow
def test_recall_in_plain_torch_recalls() -> None:
    assert load_example("recall_in_plain_torch").main() >= 0.97


def read_cells(preset: str) -> list[str]:
    """The notebook's code, without what installs."""
    cells = json.loads((EXAMPLES / "recall.ipynb").read_text())["cells"]
    code = ["".join(line for line in cell["source"] if line[0] != "%") for cell in cells if cell["cell_type"] == "code"]
    return [cell.replace("preset=mini", f"preset={preset}") for cell in code]


@pytest.mark.parametrize("preset", ["tiny", pytest.param("mini", marks=pytest.mark.slow)])
def test_the_notebook_on_recall(preset, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in read_cells(preset):
        exec(cell, names)
    assert names["weights"].shape[0] == 4 * 16 or preset == "tiny"
    assert preset == "tiny" or names["found"]["scores"]["as it is"] > 0.97 > 0.5 > names["found"]["scores"]["mean"]


def test_the_sweep_of_weights_and_biases_names_what_there_is():
    sweep = yaml.safe_load((EXAMPLES / "wandb_sweep.yaml").read_text())
    chosen = {
        name: said.get("value", (said.get("values") or [said.get("min")])[0])
        for name, said in sweep["parameters"].items()
    }
    resolve([f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in chosen.items()])
    assert sweep["command"][-1] == "${args_no_hyphens}" and sweep["program"] == "chela.train"
