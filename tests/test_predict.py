"""Labels for a user's own sequences: the right ones, in order, and bad input refused in one line."""

import io
import json

import numpy as np
import pytest
import torch

from chela.config.compose import resolve, to_yaml
from chela.config.identity import fingerprint
from chela.models import build_model
from chela.models.pretrained import from_pretrained, save_pretrained
from chela.predict import label_sequences, load_run, main
from chela.training import resume as checkpoint
from chela.training.run import WEIGHTS, RunFolder
from lra.tasks import get_task

EXPRESSIONS = ["[MAX 2 [MIN 4 7 ] ]", "( ( [SM 1 ) 9 ) ]", "[MED 1 2 3 4 5 6 7 8 ]"]


def _run(folder, *words: str) -> str:
    """A run's folder with an untrained network in it."""
    config = resolve([*words, "preset=tiny", f"runs={folder}"])
    run = RunFolder(folder / "run")
    run.best.parent.mkdir(parents=True)
    run.config.write_text(to_yaml(config))
    model = build_model(config.model, get_task(config.task), config.seed)
    state = dict.fromkeys(WEIGHTS, 0) | {"fingerprint": fingerprint(config), "model": model.state_dict()}
    checkpoint.save(run.best, state)
    return str(run.path)


@pytest.fixture
def listops(tmp_path) -> str:
    return _run(tmp_path, "task=listops", "model=chela")


def _said(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_each_line_gets_its_label(listops, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("\n".join(EXPRESSIONS) + "\n")
    assert main([f"run={listops}", f"input={tmp_path / 'in.txt'}", "batch=2"]) == 0
    said = _said(capsys)
    model, _ = load_run(listops)
    from lra.tasks.listops import tokenize

    for expression, answer in zip(EXPRESSIONS, said, strict=True):
        with torch.no_grad():
            alone = model(torch.from_numpy(tokenize(expression).astype(np.int64))[None]).softmax(-1)[0]
        assert answer["label"] == int(alone.argmax())
        assert answer["probabilities"] == pytest.approx(alone.tolist(), abs=2e-6)
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_standard_input(listops, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"[MAX 2 3 ]\r\n")))
    assert main([f"run={listops}", "input=-"]) == 0
    assert len(_said(capsys)) == 1


def test_weights_have_names(tmp_path, capsys):
    (tmp_path / "reviews").write_text(
        "A dull plot, wooden acting and terrible music.\nA wonderful film, a joy to watch."
    )
    assert main(["weights=text-lite", f"input={tmp_path / 'reviews'}"]) == 0
    assert [(answer["label"], answer["name"]) for answer in _said(capsys)] == [(0, "negative"), (1, "positive")]
    (tmp_path / "trees").write_text("[MAX 2 [MIN 4 7 ] ]")
    assert main(["weights=listops-lite", f"input={tmp_path / 'trees'}"]) == 0
    assert [answer.keys() for answer in _said(capsys)] == [{"label", "probabilities"}]


def test_weights_that_do_not_say_how_a_line_is_read_are_refused(tmp_path, capsys):
    model = from_pretrained("text-lite")
    for encoding, match in (({}, "expected an encoding in "), ({"name": "own:Task"}, "say trust=own")):
        model.encoding = encoding
        assert main([f"weights={save_pretrained(model, tmp_path)}", "input=-"]) == 2
        assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["task=text"], [b"A film.", "Schön".encode(), b"\xff\xfe odd bytes"]),
        (["task=retrieval"], [b"one paper\tanother, longer paper"]),
        (["task=image"], [b" ".join([b"17"] * 1024), b",".join([b"255"] * 3072)]),
        (["task=pathfinder"], [b" ".join([b"255"] * 256)]),
    ],
    ids=["text", "retrieval", "image", "pathfinder"],
)
def test_every_task_reads_its_lines(words, lines, tmp_path, capsys):
    run = _run(tmp_path, *words)
    (tmp_path / "in").write_bytes(b"\n".join(lines))
    assert main([f"run={run}", f"input={tmp_path / 'in'}"]) == 0
    assert len(_said(capsys)) == len(lines)


class PixelsAsScores(torch.nn.Linear):
    """Gives back the first ten pixels."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return inputs[:, :10, 0]


def test_gray_levels_are_what_three_equal_channels_are(tmp_path):
    _, task = load_run(_run(tmp_path, "task=image"))
    gray = " ".join(str(i % 256) for i in range(1024))
    rgb = " ".join(f"{i % 256} {i % 256} {i % 256}" for i in range(1024))
    model = PixelsAsScores()
    (a,), (b,) = (list(label_sequences(model, task, [line])) for line in (gray, rgb))
    assert a == b


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[MAX 2 3 ]\n\n", "line 2: the sequence is empty"),
        ("[MAX 2 3 ]\n[MAX 2 11 ]", "line 2: expected an expression"),
        ("[MAX 2 [MIN 4", "line 1: the expression is not closed"),
        ("[MAX " + "1 " * 40 + "]", "line 1: the sequence has 42 tokens, expected at most 32"),
    ],
)
def test_a_line_that_is_no_sequence_is_named(listops, tmp_path, capsys, text, match):
    (tmp_path / "in").write_text(text)
    assert main([f"run={listops}", f"input={tmp_path / 'in'}"]) == 2
    err = capsys.readouterr().err
    assert match in err
    assert err.count("\n") == 1


def test_pixels_out_of_range_are_refused(tmp_path, capsys):
    run = _run(tmp_path, "task=pathfinder")
    for line, match in ((" ".join(["300"] * 256), "from 0 to 255"), ("1 2 3", "3 pixels"), ("1 x", "expected numbers")):
        (tmp_path / "in").write_text(line)
        assert main([f"run={run}", f"input={tmp_path / 'in'}"]) == 2
        assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["run=RUN"], "input: expected"),
        (["run=RUN", "weights=text-lite", "input=-"], "run: expected run=FOLDER or weights=NAME, got both"),
        (
            ["weights=text-light", "input=-"],
            "weights: expected one of image-lite, listops-lite, pathfinder-lite, shakespeare, text-lite, or",
        ),
        (["run=RUN", "input=/no/such/file"], "input: expected a file"),
        (["run=/no/such/run", "input=-"], "there is no such folder"),
        (["run=RUN", "input=-", "checkpoint=worst"], "expected one of best, last, got"),
        (["run=RUN", "input=-", "checkpoint=last"], "there is none"),
        (["run=RUN", "input=-", "batch=0"], "batch: expected at least 1, got 0"),
        (["run=RUN", "input=-", "batch=" + "9" * 20], "batch: expected at most 999,999,999, got"),
        (["run=RUN", "colour=red"], "got 'colour=red'"),
    ],
)
def test_bad_words_are_refused_in_one_line(listops, capsys, words, match):
    assert main([word.replace("RUN", listops) for word in words]) == 2
    err = capsys.readouterr().err
    assert match in err
    assert err.count("\n") == 1
