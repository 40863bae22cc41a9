"""A mixer and a task of a stranger, from YAML files alone; and whose code runs."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.training.launches import apart, assert_equal, in_step, left_by, only_run

HERE = Path(__file__).parent
TASK = """
task: {name: own_parts:Repeat}
model: {d_model: 8, depth: 2, d_ff: 8, causal: true, norm: layer, dropout: 0.1}
optimizer: {lr: 1e-2, warmup_steps: 2}
trainer: {max_steps: 12, batch_size: 8, eval_batch_size: 16, val_every: 5, checkpoint_every: 4, log_every: 3}
"""
MIXER = "model: {mixer: {name: own_parts:Average, width: 12}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(HERE / "own_parts.py", tmp_path)
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "mixer.yaml").write_text(MIXER)
    return tmp_path


def chela(folder: Path, *words: str, status: int = 0) -> str:
    done = apart(folder, *words)
    assert done.status == status, done.out + done.err
    return done.out if status == 0 else done.err


WORDS = ("task=./task.yaml", "model=./mixer.yaml", "trainer.progress=none", "tensorboard=false", "preset=mini")


def test_trained_killed_resumed_scored_and_in_a_table(folder: Path) -> None:
    out = chela(folder, "train", *WORDS, "runs=straight")
    assert "test accuracy" in out and "trust=own_parts" in out
    kill = partial(signal.raise_signal, signal.SIGKILL)
    killed = apart(folder, "train", *WORDS, "runs=cut", prepare=in_step, given=(11, kill))
    assert killed.status == -signal.SIGKILL, killed.err
    chela(folder, "train", *WORDS, "runs=cut", "resume=auto")
    straight, cut = only_run(folder / "straight"), only_run(folder / "cut")
    assert_equal(left_by(cut), left_by(straight))
    result = json.loads((straight / "result.json").read_text())
    assert (result["objective"], result["task_title"], result["model"]) == ("tokens", "Repeat", "mixer")
    heading = (straight / "metrics.csv").read_text().splitlines()[0]
    assert heading == "step,split,loss,bits,accuracy,lr,tokens_per_second,seconds,evaluation"
    said = chela(folder, "evaluate", f"run={straight}", "trust=own_parts")
    assert f"test: accuracy {result['test']['accuracy']:.2%} of " in said
    table = chela(folder, "table", "straight", "compact=true", "published=false")
    row = next(line for line in table.splitlines() if line.startswith("| mixer |"))
    assert f"{100 * result['test']['accuracy']:.2f} (1)" in row and "| system | Repeat |" in table
    named = ("predict", f"run={straight}", "trust=own_parts", "input=lines.txt")
    assert "input: expected a file to read" in chela(folder, *named, status=2)
    (folder / "lines.txt").write_text("1 2 3 4 5\n3 3 3\n")
    lines = chela(folder, *named).splitlines()
    assert [len(json.loads(line)["label"]) for line in lines] == [5, 3]


def test_in_a_sweep(folder: Path) -> None:
    sweep = "preset: mini\ntasks: [./task.yaml]\nmodels: [linear, ./mixer.yaml]\nseeds: [0, 1]\n"
    sweep += "per_model: {linear: {seeds: [0]}}\n"
    (folder / "sweep.yaml").write_text(f"{sweep}overrides: {{trainer.max_steps: 3, tensorboard: false}}\n")
    chela(folder, "sweep", "sweep.yaml", "runs=swept")
    table = chela(folder, "table", "swept", "compact=true", "published=false")
    rows = {line.split("|")[1].strip(): line for line in reversed(table.splitlines()) if line.startswith("| ")}
    assert " (1" in rows["linear"] and " (2" in rows["mixer"] and "±" in rows["mixer"]


def test_options_are_the_arguments(folder: Path) -> None:
    told = chela(folder, "train", *WORDS, "--help")
    assert "model.mixer.width=12  (int)  Width of the values." in told and "task.length=16  (int)" in told
    assert "width: 9" in chela(folder, "train", *WORDS, "model.mixer.width=9", "--cfg")
    wrong = chela(folder, "train", *WORDS, "model.mixer.widht=9", status=2)
    assert "got 'model.mixer.widht' (did you mean 'model.mixer.width'?)" in wrong
    assert "task.symbols: expected at least 2, got 1" in chela(folder, "train", *WORDS, "task.symbols=1", status=2)
    assert chela(folder, "models", "task=./task.yaml", "model=./mixer.yaml", "preset=mini").count("mixer ") >= 1


AHEAD = """
import torch

class Ahead(torch.nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x[:, 1:], (0, 0, 0, 1))

class Wide(Ahead):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()

class Named(torch.nn.Module):
    def __init__(self, d_model: int, *, name: str = "me") -> None:
        super().__init__()
"""


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("model: {mixer: {name: ahead:Ahead}}", "Ahead: expected a layer that looks back only"),
        ("model: ahead:Ahead", "model: {mixer: {name: …}} in that of model="),
        ("model: {mixer: ahead:Ahead}", "model: {mixer: {name: …}} in that of model="),
        ("model: {mixer: {name: ahead:Wide}}", "Wide: expected an update of torch.float32, got torch.float64"),
        ("model: {mixer: {name: ahead:Named}}", "constructor: expected a default, and another word than name"),
        ("model: {mixer: {name: ahead:Ahead}}\npresets: {mini: 4}", "and sections such as trainer: {…} in the file"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_told_in_a_line(folder: Path, model: str, told: str) -> None:
    (folder / "ahead.py").write_text(AHEAD)
    (folder / "ahead.yaml").write_text(model)
    words = [word.replace("mixer.yaml", "ahead.yaml") for word in WORDS]
    error = chela(folder, "train", *words, status=2)
    assert told in error and "Traceback" not in error


def test_a_run_from_elsewhere_names_no_code_unasked(folder: Path) -> None:
    """The module leaves a trace when it is imported; a run folder that names it must not get so far."""
    with open(folder / "own_parts.py", "a") as file:
        file.write("\nopen('imported', 'w').close()\n")
    chela(folder, "train", *WORDS, "runs=straight", "trainer.max_steps=1")
    run = only_run(folder / "straight")
    (folder / "imported").unlink()
    (folder / "lines.txt").write_text("1 2 3\n")
    named = f"run={run}"
    for command in (("evaluate", named), ("predict", named, "input=lines.txt"), ("train", f"resume={run}")):
        refused = chela(folder, *command, status=2)
        assert "names the module own_parts, whose code would be run" in refused and "trust=own_parts" in refused
        chela(folder, *command, "trust=own_part", status=2)
    chela(folder, "table", "straight")  # a table needs no code
    assert not (folder / "imported").exists()
    chela(folder, "evaluate", f"run={run}", "trust=own_parts")
    assert (folder / "imported").exists()
    with open(folder / "own_parts.py", "a") as file:
        file.write("\nEDITED = True\n")  # other code than the weights were trained with
    assert "or the code it was trained with" in chela(folder, "evaluate", named, "trust=own_parts", status=2)
