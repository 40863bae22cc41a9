"""Every bad input is one line on stderr and status 2; help is quick."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chela.__main__ import COMMANDS
from chela.__main__ import main as chela
from chela.config.compose import load, names, resolve
from chela.config.identity import fingerprint
from chela.config.schema import fields
from chela.config.words import guarded, read_words
from chela.core.errors import UsageError
from experiments.sweep import Options as SweepOptions
from tests.training.launches import TINY, launch, left_by, only_run

COLLECTED = Path(__file__).parents[2] / "experiments" / "results" / "core" / "runs.jsonl"
RUN = "listops-mini/chela-seed0-79c992bf"
AtStep = Callable[[int, Callable[[], None]], None]


@pytest.mark.parametrize(
    ("given", "turns"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_soon_give_up_their_core_unless_told_otherwise(given: dict[str, str], turns: str) -> None:
    """What libgomp says of itself when it is loaded, as it is with torch."""
    libraries = [str(path) for path in Path(torch.__file__).parents[1].glob("torch*/**/libgomp*.so*")]
    if not libraries:
        pytest.skip("this torch brings no libgomp")
    free = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    free |= {**given, "OMP_DISPLAY_ENV": "VERBOSE"}
    load = "import ctypes, sys, chela.config.words as words; words.guarded(lambda: bool(ctypes.CDLL(sys.argv[1])))"
    words = [sys.executable, "-c", load, libraries[0]]
    done = subprocess.run(words, capture_output=True, text=True, env=free, check=True)
    said = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert set(said) == {turns}


def test_help_names_every_group_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    text = launch("--help").out
    for group in ("task", "model"):
        assert f"{group}=" in text and ", ".join(names(group)) in text
    for key, _, field in fields(resolve([])):
        assert key.endswith(".name") or (f"    {key}=" in text and field.metadata.get("help", "") in text)
    assert "model.mixer.rotary" in launch("model=softmax", "--help").out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_wide_as_the_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert chela([command, "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_of_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    text = launch("--help", "optimizer", "preset=mini").out
    keys = set(re.findall(r"^    ([^ =]+)=", text, re.M))
    assert keys == {key for key, _, _ in fields(resolve([])) if key.startswith("optimizer.")}
    assert "(did you mean 'optimizer'?)" in launch("--help", "optimiser").error


def test_help_and_cfg_on_a_terminal_that_knows_ascii_only() -> None:
    for word in ("--help", "--cfg"):
        done = subprocess.run(
            [sys.executable, "-m", "chela.train", word, "runs=Läufe"],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seeds", ["0,1", "[0,1]", "[0, 1]"])
def test_a_list_is_written_with_or_without_brackets(seeds: str) -> None:
    made, rest = read_words(SweepOptions, ["grid.yaml", f"seed={seeds}", "task=[]", "data.size=[1,2]"])
    assert (made.seed, made.task, rest) == ([0, 1], [], ["data.size=[1,2]"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "2"], "expected key=value, got '--jobs', say jobs=2; see --help"),
        (["grid.yaml", "--seed=2"], "got '--seed=2', say seed=2; see --help"),
        (["grid.yaml", "-x"], "expected key=value, got '-x'; see --help"),
        (["grid.yaml", "other.yaml"], "file: expected one value, got grid.yaml other.yaml"),
        (["grid.yaml", "seed=0,one"], "seed: expected a list of whole numbers, got '0,one'"),
        (["grid.yaml", "dry_run=perhaps"], "dry_run: expected true or false, got 'perhaps'"),
    ],
)
def test_there_is_one_way_to_say_an_option(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        read_words(SweepOptions, words)


def test_a_run_again_from_its_own_configuration(one_step: Path) -> None:
    """Of a folder, its config.yaml, or a line of collected results; further words win."""
    own = load(one_step / "config.yaml")
    for name in (one_step, one_step / "config.yaml"):
        assert fingerprint(resolve([f"config={name}"])) == fingerprint(own)
        assert resolve([f"config={name}", "task=listops", "seed=5", "model.depth=1"]).seed == 5
    assert fingerprint(resolve([f"config={COLLECTED}:{RUN}"])) == RUN[-8:]
    assert "finished already" in launch(f"config={one_step}").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # keys
        (["trainer.max_step=3"], "'trainer.max_step' (did you mean 'trainer.max_steps'?); see --help"),
        (["modle=chela"], "expected key=value of a run, got 'modle' (did you mean"),
        (["lr=1e-3"], "expected key=value of a run, got 'lr' (did you mean 'optimizer.lr'?); see --help"),
        (["trainer.epochs=3"], "got 'trainer.epochs' (did you mean 'trainer.max_steps'?); see --help"),
        (["model.mixer.rotary=true"], "got 'model.mixer.rotary'"),
        (["trainer=3"], "trainer: expected one of its keys (trainer.NAME=…), got '3'"),
        (["nonsense"], "expected key=value, got 'nonsense'; see --help"),
        (["=3"], "expected key=value of a run, got ''"),
        (["resume=a", "config=b"], "expected resume=RUN or config=FILE, got both, a and b"),
        (["--task", "listops"], "expected key=value, got '--task', say task=listops; see --help"),
        (["schlüssel=3"], "expected key=value of a run, got 'schlüssel'"),
        # types
        (["model.depth=abc"], "model.depth: expected a whole number, got 'abc'"),
        (["model.prenorm=7up"], "model.prenorm: expected true or false, got '7up'"),
        (["optimizer.lr=fast"], "optimizer.lr: expected a number, got 'fast'"),
        (["optimizer.lr=nan"], "optimizer.lr: expected a finite number, got nan"),
        (["runs=${seed}"], "runs: expected a plain, printable value"),
        (["runs=a\nb"], "runs: expected a plain, printable value"),
        (["task=pathfinder", "task.contour_lengths=x"], "lengths: expected a list of whole numbers or null, got 'x'"),
        # bounds
        (["model.depth=-1"], "model.depth: expected at least 1, got -1"),
        (["model.dropout=2"], "model.dropout: expected less than 1, got 2.0"),
        (["optimizer.lr=0"], "optimizer.lr: expected more than 0, got 0.0"),
        (["model.d_model=" + "9" * 300], "model.d_model: expected at most 8,192, got 99999"),
        (["model.norm=bach"], "expected one of layer, scale, rms, batch, got 'bach' (did you mean 'batch'?)"),
        (["trainer.devices=3"], "trainer.batch_size: expected a multiple of the 3 processes, got 64"),
        (["trainer.accumulate=3"], "trainer.batch_size: expected a multiple of 3, processes times"),
        (["trainer.checkpoint_activations=true", "trainer.compile=true"], "trainer.compile: expected false with"),
        (["trainer.max_time=9"], "trainer.max_time: expected a time such as 30s, 9m, 1h30m or 2d, got '9'"),
        (["data.validation=train"], "data.validation: expected one of holdout, test, got 'train'"),
        (["task.max_length=5"], "task.max_length: expected min_length=16 or more, got 5"),
        # names
        (["task=listop"], "wikitext103 or a YAML file, got 'listop' (did you mean 'listops'?)"),
        (["model=chess"], f"model: expected one of {', '.join(names('model'))} or a YAML file, got 'chess'"),
        (["model=../model/chela"], "got '../model/chela'"),
        (["preset=big"], "preset: expected one of auto, full, mini, tiny, lite, got 'big'"),
        (["model.mixer.name=softmax"], "model.mixer.name: chosen by model=NAME, got 'softmax'"),
        # folders of runs
        (["resume=no/such/run"], "resume: expected the folder of a run, got 'no/such/run': there is no such folder"),
        (["resume=."], "resume: expected the folder of a run, got '.': it holds no config.yaml"),
        (["resume=last"], "resume: expected the folder of a run, there is none under "),
        (["config=no/such.yaml"], "expected a run's config.yaml at no/such.yaml, could not read it"),
        ([f"config={COLLECTED}:listops"], "could not read it (it has no run 'listops')"),
        ([f"config={COLLECTED}:{RUN}", "task=text"], f"of {COLLECTED}:{RUN}, got another (task listops -> 'text')"),
        (["resume=" + "x" * 300], "expected a disk and folders that can be used, got: File name too long"),
    ],
)  # fmt: skip
def test_bad_words(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = launch("preset=mini", *words)
    assert ended.status == 2 and ended.out == ""
    assert message in ended.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.accelerator=gpu"], "expected a CUDA GPU for gpu, torch sees none"),
        (["model=linear", "model.mixer.heads=5"], "model: d_value: expected a multiple of heads=5, got "),
        (["trainer.devices=999", "trainer.batch_size=999", "trainer.eval_batch_size=999"], "devices: expected at most"),
        (["trainer.num_nodes=2"], "expected a launcher (torchrun or srun) on every node, got none"),
        (["runs={folder}/file/runs"], "runs: expected a folder that can be written, got"),
        (["runs={folder}/file"], "runs: expected a folder that can be written, got"),
        (["runs=/proc/runs"], "runs: expected a folder that can be written, got"),
        (["runs=" + "x" * 300], "expected a disk and folders that can be used, got: File name too long"),
        (["data.dir={folder}/file/data"], "data.dir: expected a folder that can be written, got"),
        (["data.dir=" + "x" * 300], "File name too long"),
    ],
)  # fmt: skip
def test_bad_surroundings(
    words: list[str], message: str, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if message.startswith("expected a CUDA GPU") and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    ended = launch(*tiny, *(word.format(folder=tmp_path) for word in words))
    assert ended.status == 2
    assert message in ended.error
    assert words[0].startswith("data.") or not list(tmp_path.glob("runs/*/*"))


# ---- runs that cannot go on ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_step(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("one")
    assert launch(*TINY, f"data.dir={data}", f"runs={runs}", "trainer.max_steps=1").status == 0
    return only_run(runs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.depth=5"], "got another (model.depth 2 -> 5); start a new run for it"),
        (["model=softmax"], "got another (model chela -> 'softmax'); start a new run for it"),
        (["preset=mini"], "got another (preset tiny -> 'mini')"),
        (["seed=1", "optimizer.lr=1"], "(optimizer.lr 0.002 -> 1.0, seed 0 -> 1)"),
        (["model.dept=5"], "expected key=value of a run, got 'model.dept'"),
    ],
)
def test_a_run_goes_on_with_its_own_configuration(words: list[str], message: str, one_step: Path) -> None:
    ended = launch(f"resume={one_step}", *words)
    assert ended.status == 2 and message in ended.error


def test_what_may_be_said_anew(one_step: Path) -> None:
    words = ("task=listops", "model=chela", "preset=auto", "trainer.max_time=9m", "trainer.progress=plain", "runs=x")
    assert launch(f"resume={one_step}", *words).status == 0


def test_a_run_that_begins_with_the_weights_of_another(one_step: Path, data: str, tmp_path: Path) -> None:
    """It is a run of its own, and once it has a checkpoint it needs the other one no more."""
    other, runs = shutil.copytree(one_step, tmp_path / "other"), tmp_path / "runs"
    words = (*TINY, f"data.dir={data}", f"runs={runs}", f"weights={other}", "trainer.max_steps=2")
    still = ("optimizer.lr=1e-12", "optimizer.kernel_lr=1e-12")  # steps that change nothing
    assert launch(*words, *still).status == 0
    found, expected = (left_by(run)["best"] for run in (only_run(runs), one_step))
    assert found["fingerprint"] != expected["fingerprint"]
    for name in (name for name in expected["model"] if "running" not in name):  # statistics of a batch norm go on
        torch.testing.assert_close(found["model"][name], expected["model"][name], rtol=0, atol=1e-9)
    (only_run(runs) / "result.json").unlink()
    shutil.rmtree(other)
    assert launch(f"resume={only_run(runs)}").status == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights=no/such"], "weights: expected one of image-lite, "),
        (["weights=text-lite"], "a network like this one, got text-lite, whose do not fit (Error"),
    ],
)
def test_weights_that_do_not_fit(words: list[str], message: str, data: str, tmp_path: Path) -> None:
    ended = launch(*TINY, f"data.dir={data}", f"runs={tmp_path / 'runs'}", *words)
    assert ended.status == 2 and message in ended.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Missing key task"),
        ("a: [", "could not read it"),
        ("task: {name: chess}\nmodel: {mixer: {name: chela}}\n", "task.name: expected one of "),
        ("task: {name: listops}\nmodel: {mixer: {name: chela}}\nmodle: 3\n", "of this version"),
        ("task: {name: listops}\nmodel: {mixer: {name: chela}, depth: deep}\n", "of this version"),
        ("task: {name: listops}\nmodel: {mixer: {name: chela}, depth: -2}", "model.depth: expected at least 1, got -2"),
        ("!!python/object/apply:os.system ['touch owned']", "could not read it"),
    ],
)
def test_a_foreign_config(content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    ended = launch("resume=.")
    assert ended.status == 2 and message in ended.error
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 99}'])
def test_a_foreign_result(content: str, one_step: Path, tmp_path: Path) -> None:
    before = (one_step / "result.json").read_text()
    (one_step / "result.json").write_text(content)
    try:
        ended = launch(f"resume={one_step}")
    finally:
        (one_step / "result.json").write_text(before)
    assert ended.status == 2 and "result.json" in ended.error


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_does_not_parse_is_named(workers: int, tmp_path: Path) -> None:
    words = (*TINY, f"data.dir={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}")
    assert launch(*words, "trainer.max_steps=1").status == 0
    (records,) = (tmp_path / "data").rglob("*train.array_record*")
    whole = records.read_bytes()
    middle = len(whole) // 2
    records.write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])  # of the same size: seen when it is read
    ended = launch(*words, f"data.workers={workers}")  # a worker takes seconds to start
    assert ended.status == 2
    assert ended.error.startswith("record ") and " of split train in " in ended.error
    assert "cannot be read" in ended.error


# ---- memory, and faults of the program ------------------------------------------------------------------------------


def test_out_of_memory_is_one_line(tiny: tuple[str, ...], at_step: AtStep) -> None:
    at_step(2, lambda: torch.empty(2**50) and None)
    ended = launch(*tiny)
    assert ended.status == 2
    assert ended.error.startswith("expected a run that fits into memory, got: ")
    assert "raise trainer.accumulate" in ended.error


def fail(error: Exception) -> int:
    raise error


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("x"), KeyError("x"), OSError(2, "none")])
def test_faults_of_the_program_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        guarded(lambda: fail(error))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(28, "No space left on device", "x"),
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_surroundings_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: fail(error)) == 2
    assert capsys.readouterr().err.count("\n") == 1
