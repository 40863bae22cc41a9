"""Networks and runs whose sequences are spread over processes (gloo, CPU) against those of one process."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from chela.config.compose import resolve
from chela.config.schema import ModelConfig
from chela.core.errors import UsageError
from chela.layers import norm
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from chela.models.heads import Network
from chela.ops.sequence_parallel import sequence_parallel
from chela.training.objectives import Objective
from lra.tasks.base import IGNORED
from tests.processes import in_processes
from tests.training.launches import TINY, assert_equal, launch, left_by, only_run
from tests.training.test_processes import (
    PAIR,
    assert_close,
    finish,
    join_group,
    join_group_and_get_a_signal,
    logs,
    start,
)

# Every system, with what is not the same in all processes: kernels, decays from both sides, positions, statistics.
Network_ = tuple[str, dict[str, Any], dict[str, Any], str]
NETWORKS: list[Network_] = [
    ("chela", {}, {"norm": "batch"}, "classification"),
    ("chela", {"long_kernel": "ema"}, {"causal": True, "positions": "learned"}, "tokens"),
    ("chela", {"qk": "short", "gate": "highway"}, {}, "tokens"),
    ("chela", {"attention": "none", "gate": "highway"}, {}, "classification"),
    ("linear", {}, {}, "classification"),
    ("linear", {}, {"causal": True}, "tokens"),
    ("lightning", {}, {"causal": True}, "tokens"),
    ("lion", {"decay": "token"}, {"norm": "batch"}, "classification"),
    ("lion", {"decay": "token"}, {"causal": True}, "tokens"),
    ("lion", {"decay": "head"}, {}, "tokens"),
    ("hedgehog", {}, {}, "classification"),
    ("s4d", {}, {}, "tokens"),
    ("chela", {}, {"causal": True}, "tokens"),
    ("linear", {"short": 4}, {}, "tokens"),
    ("lion", {"decay": "token", "short": 4}, {"causal": True}, "classification"),
]  # fmt: skip
LENGTH = 23


def network(of: Network_) -> Network:
    name, options, config, objective = of
    mixer = mixer_options(name)(name=name, **options)
    sizes: dict[str, Any] = {"d_model": 8, "depth": 2, "d_ff": 8, "d_head": 8, "mixer": mixer}
    return build_model(ModelConfig(**sizes, **config), TaskFacts(5, 30, 9, objective=objective), seed=0).double()


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inputs, a mask with holes of which one is long, a row that ends early, and labels of each position."""
    draw = torch.Generator().manual_seed(number)
    mask = torch.rand(3, LENGTH, generator=draw) > 0.3
    mask[1, 4:] = False
    mask[2, 5:18] = False  # no real token in the second of three pieces
    labels = torch.randint(5, (3, LENGTH), generator=draw).masked_fill(~mask, IGNORED)
    return torch.randint(1, 9, (3, LENGTH), generator=draw), mask, labels


def outcome(number: int, pieces: bool) -> dict[str, torch.Tensor]:
    """Return loss, counts in training and evaluation, the gradients, and the running statistics."""
    of = NETWORKS[number]
    model, (inputs, mask, labels) = network(of), batch(number)
    objective = Objective(SimpleNamespace(objective=of[3], score="loss"))
    if of[3] == "classification":
        labels = labels[:, 0].clamp(min=0)
    model.backbone.checkpoint_blocks = pieces and number % 2 == 0  # computed again, outside, on their piece too
    if not pieces:
        scores = model(inputs, mask)
        loss = objective.loss(scores, labels)
        found = {"counts": objective.count(scores, labels, loss.detach())}
        loss.backward()
        found["evaluated"] = objective.count(model.eval()(inputs, mask), labels)
    else:
        with sequence_parallel(LENGTH) as piece:
            mine = piece.cut(labels) if labels.ndim > 1 else labels
            scores = model(piece.cut(inputs), piece.cut(mask))
            loss = objective.loss(scores, mine)
            found = {"counts": objective.count(scores, mine, loss.detach())}
        loss.backward()
        with sequence_parallel(LENGTH) as piece:
            found["evaluated"] = objective.count(model.eval()(piece.cut(inputs), piece.cut(mask)), mine)
    found["loss"] = loss.detach()
    found |= {f"gradient of {name}": w.grad for name, w in model.named_parameters() if w.grad is not None}
    return found | {f"buffer {name}": buffer for name, buffer in model.named_buffers() if "running" in name}


def every_outcome() -> list[dict[str, torch.Tensor]]:
    return [outcome(number, pieces=True) for number in range(len(NETWORKS))]


def test_every_system_in_pieces_is_the_whole(tmp_path: Path) -> None:
    """The average over processes of loss and gradients, as DDP takes it; the sum of what is counted.

    Three share neither tokens nor channels equally, and one of them has a neighbour on either side.
    """
    results = in_processes(3, tmp_path, every_outcome)
    with mock.patch.object(norm, "_several_processes", lambda: False):
        for number, of in enumerate(NETWORKS):
            for name, expected in outcome(number, pieces=False).items():
                of_all = torch.stack([of_one[number][name] for of_one in results])
                found = of_all.sum(0) if name in ("counts", "evaluated") else of_all.mean(0)
                scale = float(expected.abs().max())
                single = 1e-6 if name == "evaluated" else 1e-9  # losses are summed in float32 there
                where = f"{of} {name}: found {found}, expected {expected}"
                torch.testing.assert_close(found, expected, rtol=single, atol=single * max(scale, 1e-3), msg=where)


def together(words: tuple[str, ...], folder: Path, count: int, join: Any = join_group) -> list[int]:
    return finish(start((*words, "trainer.sequence_parallel=2"), folder, join, count), folder)


def test_sequences_and_records_over_processes(data: str, tmp_path: Path) -> None:
    """Two times two processes, batch norms and a test by ragged batches included, are one."""
    words = (*PAIR, f"data.dir={data}", "model.mixer.reparam=false", "trainer.max_steps=8")  # into the second epoch
    alone = launch(*words, f"runs={tmp_path / 'alone'}")
    assert alone.status == 0, alone.err
    assert together((*words, f"runs={tmp_path / 'four'}"), tmp_path, 4) == [0] * 4, logs(tmp_path)
    assert_close(only_run(tmp_path / "four"), only_run(tmp_path / "alone"))


def test_a_language_model_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """Two processes, a window of 31; they go on to the last bit, and are one process within rounding.

    Of three, the order in which gloo adds depends on how DDP packs the gradients, which is otherwise in a first step.
    """
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(60)))
    words = ("task=corpus", f"data.root={text}", f"data.dir={tmp_path / 'data'}", "preset=tiny", *TINY[6:])
    words += ("model.norm=layer", "model.dropout=0", "task.window=31", "trainer.accumulate=2", "optimizer.eps=1e-4")
    words += ("trainer.max_steps=8",)
    alone = launch(*words, f"runs={tmp_path / 'alone'}")
    assert alone.status == 0, alone.err
    straight, stopped = ((*words, f"runs={tmp_path / name}", "resume=auto") for name in ("straight", "stopped"))
    assert together(straight, tmp_path, 2) == [0] * 2, logs(tmp_path)
    assert_close(only_run(tmp_path / "straight"), only_run(tmp_path / "alone"))
    assert together(stopped, tmp_path, 2, join_group_and_get_a_signal) == [128 + signal.SIGTERM, 0], logs(tmp_path)
    assert together(stopped, tmp_path, 2) == [0] * 2, logs(tmp_path)
    assert_equal(left_by(only_run(tmp_path / "stopped")), left_by(only_run(tmp_path / "straight")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trainer.devices=3", "trainer.batch_size=12"), "trainer.sequence_parallel: expected a divisor of"),
        (("trainer.devices=2", "trainer.compile=true"), "trainer.compile: expected false with"),
        (("trainer.devices=4", "trainer.batch_size=3"), "trainer.batch_size: expected a multiple of the 2 processes"),
    ],
)
def test_words_that_do_not_fit(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve(["preset=tiny", "trainer.sequence_parallel=2", *words])


@pytest.mark.parametrize(("model", "name"), [("softmax", "SoftmaxAttention"), ("mega", "MEGA")])
def test_a_system_that_needs_the_whole_sequence(model: str, name: str, data: str, tmp_path: Path) -> None:
    words = (*TINY, f"data.dir={data}", f"runs={tmp_path}", f"model={model}", "trainer.sequence_parallel=2")
    ended = launch(*words, "trainer.devices=2")
    assert ended.status == 2 and f", {name} cannot; set it to 1" in ended.error
    assert not list(tmp_path.rglob("config.yaml"))
