"""The command that writes on after a prompt, and the real networks that carry a state through a text."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from chela.generate import main
from chela.models.pretrained import save_pretrained
from chela.predict import load_run
from tests.training.launches import assert_equal, launch, left_by, only_run
from tests.training.test_resume import terminate
from tests.training.test_texts import TEXT


def words_of(folder: Path) -> tuple[str, ...]:
    (folder / "mine.txt").write_text(TEXT)
    small = ("trainer.max_steps=6", "trainer.batch_size=4", "trainer.val_every=6", "task.window=16", "model.depth=1")
    quiet = ("trainer.threads=1", "trainer.progress=none", "tensorboard=false", "allocator=false")
    where = (f"data.root={folder / 'mine.txt'}", f"data.dir={folder / 'data'}", f"runs={folder / 'runs'}")
    return ("task=corpus", "preset=tiny", *small, *quiet, *where)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    assert launch(*words_of(folder)).status == 0
    return only_run(folder / "runs")


def test_it_prints_the_prompt_and_what_follows(run, capsys):
    asked = [f"run={run}", "tokens=30", "temperature=1", "top_k=60", "seed=2"]
    assert main([*asked, "prompt=a ☃\\n"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("a ☃\n") and shown.out.endswith("\n")
    assert "30 symbols made" in shown.err and "KiB" in shown.err


def test_weights_write_as_their_run_does(run, capsys, tmp_path):
    asked = ["prompt=fox", "tokens=9", "seed=2"]
    assert main([f"run={run}", *asked]) == 0
    shown = capsys.readouterr().out
    network, _ = load_run(str(run))
    assert main([f"weights={save_pretrained(network, tmp_path / 'weights')}", *asked]) == 0
    assert capsys.readouterr().out == shown
    assert main(["weights=shakespeare", "prompt=ROMEO:", "tokens=20"]) == 0
    assert capsys.readouterr().out.startswith("ROMEO:")
    assert main(["weights=text-lite", *asked]) == 2
    assert "expected a language model, such as one of task=shakespeare, got one of text" in capsys.readouterr().err


def test_the_result_has_a_sample(run, tmp_path):
    assert len(json.loads((run / "result.json").read_text())["sample"]) >= 100
    assert launch(*words_of(tmp_path), "model=mega").status == 0  # which ends with its window, of 16
    assert 1 <= len(json.loads((only_run(tmp_path / "runs") / "result.json").read_text())["sample"]) <= 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokens=0"], "tokens: expected at least 1, got 0"),
        (["top_k=-1"], "top_k: expected at least 0"),
    ],
)
def test_bad_words_are_one_line(run, words, message, capsys):
    assert main([f"run={run}", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def _generating(run: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "chela", "generate", f"run={run}", "tokens=1000000", "prompt=the "]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background are deaf to it
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, env=dict(os.environ), preexec_fn=heed)


@pytest.mark.parametrize("end", ["interrupt", "closed pipe"])
def test_it_ends_clean(run, end):
    process = _generating(run)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(4) == b"the "
    process.stdout.read(1)
    if end == "interrupt":
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
        assert process.returncode == 130 and out.endswith(b"\n")
        assert b" symbols made, " in said and said.count(b"\n") == 1
    else:
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 0 and said == b""


@pytest.mark.parametrize("model", ["chela", "lightning"])
def test_a_state_that_is_carried_resumes_bit_equal(model, tmp_path, at_step):
    words = (*words_of(tmp_path), f"model={model}", "data.carry=true", "trainer.checkpoint_every=1")
    ended = launch(*words, f"runs={tmp_path / 'straight'}")
    assert ended.status == 0, ended.err
    at_step(4, terminate)
    assert launch(*words).status != 0
    run = only_run(tmp_path / "runs")
    assert launch(f"resume={run}").status == 0
    assert_equal(left_by(run), left_by(only_run(tmp_path / "straight")))
