"""Runs on texts: resume with and without a state that is carried on, and what a symbol is predicted from."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chela.config.compose import resolve
from chela.config.identity import fingerprint
from chela.config.schema import OptimizerConfig
from chela.core.errors import UsageError
from chela.evaluate import main as evaluate
from chela.training import loop, run, score
from chela.training.score import text_facts
from chela.training.step import scores_of
from tests.training.launches import assert_equal, launch, left_by, only_run
from tests.training.test_resume import terminate

TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(60))
WINDOW = 8

Arrange = Callable[[int, Callable[[], None]], None]


class Fake(nn.Module):
    """The least network that reads on: a running mean of embeddings, which fades, or nothing before this symbol."""

    def __init__(self, l_max: int, symbols: int, fade: float) -> None:
        super().__init__()
        self.l_max, self.fade = l_max, fade
        self.embedding = nn.Embedding(symbols, 12)
        self.out = nn.Linear(12, symbols)
        self.backbone = nn.Module()

    def start(self, batch: int) -> dict[str, Tensor]:
        return {"sum": torch.zeros(batch, 12), "read": torch.zeros(batch, dtype=torch.long)}

    def prefill(self, inputs: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        state = self.start(len(inputs)) if state is None else state
        memory, seen = state["sum"], []
        for x in self.embedding(inputs).unbind(1):
            memory = self.fade * memory + x
            seen.append(memory)
        after = {"sum": memory.detach(), "read": state["read"] + inputs.shape[1]}
        return self.out(torch.tanh(torch.stack(seen, 1))), after

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        assert inputs.shape[1] <= self.l_max
        return self.prefill(inputs)[0]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have every run train a fake network."""

    def put(fade: float = 0.9, base: type[Fake] = Fake) -> None:
        def build(config: Any, task: Any, seed: int) -> Fake:
            torch.manual_seed(seed)
            return base(task.l_max, task.vocab_size, fade)

        for module in (loop, run):
            monkeypatch.setattr(module, "build_model", build)

    return put


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    """A tiny run on a text of one's own: an epoch in order is 46 steps, validations at steps 2, 7 and 12."""
    (tmp_path / "mine.txt").write_text(TEXT)
    small = ("trainer.max_steps=12", "trainer.batch_size=8", "trainer.val_every=5", "trainer.checkpoint_every=4")
    quiet = ("trainer.threads=1", "trainer.progress=none", "tensorboard=false", "allocator=false")
    where = (f"data.root={tmp_path / 'mine.txt'}", f"data.dir={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}")
    return ("task=corpus", "preset=tiny", f"task.window={WINDOW}", *small, *quiet, *where)


def test_a_real_network_learns_and_goes_on(words: tuple[str, ...], tmp_path: Path, at_step: Arrange) -> None:
    apart = f"runs={tmp_path / 'apart'}"
    ended = launch(*words, apart)
    assert ended.status == 0, ended.err
    result = json.loads((only_run(tmp_path / "apart") / "result.json").read_text())
    assert result["context"] == "windows of 8, each alone: 1 to 8 symbols before"
    assert f"context: {result['context']}" in ended.out and "SHA-256" in result["data_note"]
    assert "generate: chela generate run=" in ended.out
    assert f"(accuracy {result['test']['accuracy']:.2%}, majority class" in ended.out
    assert result["test"]["count"] == len(TEXT) - len(TEXT) * 95 // 100
    at_step(3, terminate)
    assert launch(*words).status == 128 + signal.SIGTERM
    assert launch(*words, "resume=auto").status == 0
    assert_equal(left_by(only_run(tmp_path / "runs")), left_by(only_run(tmp_path / "apart")))


@pytest.mark.parametrize(
    ("more", "stop"),
    [
        ((), 11),
        (("trainer.accumulate=2",), 7),
        (("trainer.max_steps=60", "trainer.val_every=50"), 3),  # into the next epoch
    ],
)
def test_a_state_that_is_carried_on_is_saved(
    more: tuple[str, ...],
    stop: int,
    words: tuple[str, ...],
    tmp_path: Path,
    fake: Callable[..., None],
    at_step: Arrange,
) -> None:
    fake()
    carry = (*words, *more, "data.carry=true")
    ended = launch(*carry, f"runs={tmp_path / 'apart'}")
    assert ended.status == 0, ended.err
    whole = left_by(only_run(tmp_path / "apart"))
    parts = whole["last"]["carried"]
    per_epoch = len(TEXT) * 90 // 100 // 8 // WINDOW
    steps = whole["last"]["step"] % per_epoch
    assert set(parts) == set(range(2 if "trainer.accumulate=2" in more else 1))
    assert all(part["read"].tolist() == [steps * WINDOW] * (8 // len(parts)) for part in parts.values())
    at_step(stop, terminate)
    assert launch(*carry).status == 128 + signal.SIGTERM
    assert launch(*carry, "resume=auto").status == 0
    assert_equal(left_by(only_run(tmp_path / "runs")), whole)


def test_carrying_on_is_another_run(words: tuple[str, ...], tmp_path: Path, fake: Callable[..., None]) -> None:
    fake()
    assert launch(*words).status == 0
    plain = left_by(only_run(tmp_path / "runs"))
    assert "carried" not in plain["last"]
    assert fingerprint(resolve([*words])) == fingerprint(resolve([*words, "data.carry=false"]))
    assert fingerprint(resolve([*words])) != fingerprint(resolve([*words, "data.carry=true"]))


def test_another_text_is_another_run(words: tuple[str, ...], tmp_path: Path) -> None:
    here = fingerprint(resolve([*words]))
    assert fingerprint(resolve([*words, f"data.root={tmp_path / 'other' / 'mine.txt'}"])) == here
    assert fingerprint(resolve([*words, "data.root=yours.txt"])) != here
    listops = [fingerprint(resolve(["preset=tiny", "task=text", f"data.root={root}"])) for root in ("a", "b")]
    assert listops[0] == listops[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("task=shakespeare", "model.causal=false"), "model.causal: expected true for task=shakespeare, got false"),
        (("task=corpus", "data.carry=true", "trainer.devices=2"), "data.carry: expected one process, got 2"),
    ],
)
def test_what_does_not_fit_is_one_line(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(["preset=tiny", *more])


def test_a_network_that_cannot_carry_is_refused(
    words: tuple[str, ...], tmp_path: Path, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.delattr(Fake, "prefill")
        fake()
        expected = "data.carry=true: expected a network with prefill(inputs, state), Fake has none"
        assert expected in launch(*words, "data.carry=true").error
    assert not list((tmp_path / "runs").rglob("config.yaml"))


@pytest.mark.parametrize("window", [5, 8, 50, 100000])
def test_without_memory_windows_that_overlap_score_what_the_run_says(
    window: int, words: tuple[str, ...], tmp_path: Path, fake: Callable[..., None]
) -> None:
    """Also where they do not divide the text, and are longer than the network was built for."""
    fake(fade=0.0)
    assert launch(*words).status == 0
    folder = only_run(tmp_path / "runs")
    assert evaluate([f"run={folder}", f"out={folder / 'score.json'}"]) == 0
    found, result = (json.loads((folder / name).read_text()) for name in ("score.json", "result.json"))
    assert (found["loss"], found["count"]) == (result["test"]["loss"], result["test"]["count"])
    assert found["context"] == result["context"] and found["perplexity"] == math.exp(found["loss"])
    config = resolve([f"resume={folder}"])
    data = score.data_of(config)
    data.prepare_data()
    network = run.RunFolder(folder).network(config, data.task, "best")
    objective, batches = score.Objective(data.task), score.overlapping(data, network, "test", window)
    nats, _, count = score.sum_counts(network, batches, lambda b: objective.count(scores_of(network, b), b["labels"]))
    assert count == found["count"] and nats / count == pytest.approx(found["loss"], abs=1e-5)


def test_the_rate_ends_at_a_tenth() -> None:
    config = OptimizerConfig(warmup_steps=10, schedule="cosine_tenth")
    rates = [round(config.lr_factor(step, 110), 4) for step in (0, 9, 10, 60, 110)]
    assert rates == [0.1, 1.0, 1.0, 0.55, 0.1]


def test_perplexity_by_words() -> None:
    """Two nats a symbol and five symbols a word are ten nats a word."""
    task = SimpleNamespace(in_order=True, words=lambda split: 20, context="windows of 8")
    told = text_facts(task, "test", {"loss": 2.0, "count": 100.0})
    assert told["words"] == 20 and told["word_perplexity"] == pytest.approx(math.exp(10))
    assert told["perplexity"] == math.exp(2) and told["context"] == "windows of 8"
    assert text_facts(SimpleNamespace(in_order=False), "test", {}) == {}
