"""The memory of a training step: counted with fake tensors, against what a step on the CPU holds at its peak."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from chela.config.compose import resolve
from chela.models import build_model
from chela.models.__main__ import main
from chela.models.cost import step_memory
from experiments.bench.timing import peak_memory
from lra.tasks import get_task

SIZE = 64  # records: scratch inside an operator is bounded, and a small part of this


@pytest.mark.parametrize(
    ("task", "name", "again"),
    [
        *(
            ("image", name, False)
            for name in ("chela", "mega", "s4d", "softmax", "linear", "lion_s", "lightning", "hedgehog")
        ),
        *(("image", name, True) for name in ("chela", "mega", "lion_s")),
        ("listops", "chela", False),
    ],
)
def test_it_is_the_peak_of_a_step(task: str, name: str, again: bool) -> None:
    words = ["preset=mini", f"trainer.batch_size={SIZE}", "model.depth=3"]
    words += ["trainer.checkpoint_activations=true"] if again else []
    config = resolve([f"task={task}", f"model={name}", *words])
    about = get_task(config.task)
    model = build_model(config.model, about, 0).train()
    model.backbone.checkpoint_blocks = again
    inputs, mask = torch.randn(SIZE, about.l_max, 1), None
    if about.vocab_size is not None:
        inputs = torch.randint(1, about.vocab_size, (SIZE, about.l_max))
        mask = torch.arange(about.l_max) < torch.tensor([about.l_max] * (SIZE - 1) + [9])[:, None]

    def step() -> None:
        F.cross_entropy(model(inputs, mask), torch.zeros(SIZE, dtype=torch.long)).backward()
        model.zero_grad()

    step()
    weights, activations = step_memory(config, about)
    assert activations == pytest.approx(peak_memory(step), rel=0.15)
    parameters = sum(p.numel() for p in model.parameters())
    assert weights == 4 * (3 * parameters + sum(b.numel() for b in model.buffers()))


def test_parts_of_a_batch_take_a_part_of_the_memory() -> None:
    words = ["task=image", "preset=mini", "model=softmax", "trainer.batch_size=32"]
    about = get_task(resolve(words).task)
    whole, part = (step_memory(resolve([*words, f"trainer.accumulate={parts}"]), about) for parts in (1, 4))
    assert part[1] == pytest.approx(whole[1] / 4, rel=0.1)
    parameters = sum(p.numel() for p in build_model(resolve(words).model, about, 0).parameters())
    assert part[0] == whole[0] + 4 * parameters  # the gradients stay from part to part


def test_a_piece_of_a_sequence_takes_its_share_of_the_memory() -> None:
    words = ["task=image", "preset=mini", "model=chela", "trainer.batch_size=2"]
    about = get_task(resolve(words).task)
    spread = resolve([*words, "trainer.devices=4", "trainer.sequence_parallel=4"])
    assert step_memory(spread, about)[1] == pytest.approx(step_memory(resolve(words), about)[1] / 4, rel=0.2)
    assert about.l_max == 256


def test_the_command_tells_memory_where_task_and_preset_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("chela.models.__main__.names", lambda group: ["softmax"])
    assert main(["task=image", "preset=tiny"]) == 0
    told = capsys.readouterr().out
    assert "activations" in told
    assert main(["task=image"]) == 0
    assert "activations" not in capsys.readouterr().out
