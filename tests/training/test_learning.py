"""What a run says when it does not learn, or learns nonsense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chela.config.compose import resolve
from chela.models import TaskFacts, build_model
from chela.training.objectives import Objective, above_majority
from chela.training.run import RunFolder
from chela.training.step import LitModel
from lra.tasks.listops import ListOps
from tests.training.launches import launch, metrics_of, only_run

STUCK = ("optimizer.lr=1e-12", "optimizer.kernel_lr=1e-12", "optimizer.warmup_steps=2", "model.norm=layer")


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """Make something no finite number while a step (from 1) is taken."""
    plain = LitModel.training_step

    def training_step(self: LitModel, batch: Any, batch_idx: int) -> Any:
        out = plain(self, batch, batch_idx)
        if self.step + 1 == step:
            if what == "loss":
                self.step_counts.fill_(float("nan"))
                out = out * float("nan")
            else:
                bias = self.model.head.out.bias
                assert isinstance(bias, torch.Tensor)
                bias.register_hook(lambda grad: grad * float("inf"))
        return out

    monkeypatch.setattr(LitModel, "training_step", training_step)


@pytest.mark.parametrize(("what", "named"), [("loss", "the loss"), ("gradient", "the gradient of head.out.bias")])
def test_the_first_number_that_is_not_finite_ends_the_run(
    what: str, named: str, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 6, what)
    ended = launch(*tiny)
    run = RunFolder(only_run(tmp_path))
    assert ended.status == 3
    assert ended.error.startswith(f"step 6: expected finite numbers, {named} is not. Usual causes: a learning rate")
    assert ended.error.endswith(f"Last good checkpoint: {run.last}")
    state = run.load_last(run.path.name[-8:], lambda _: None)
    assert state is not None and state["step"] == 4
    assert max(int(row["step"]) for row in metrics_of(run.path)) == 5


def test_before_the_first_checkpoint(tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 1, "loss")
    ended = launch(*tiny)
    assert ended.status == 3 and ended.error.endswith("Last good checkpoint: none yet")


def test_weights_that_are_not_finite_are_never_saved(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite gradients can still throw the weights over: seen before they reach the disk."""
    plain = LitModel.on_train_batch_start

    def on_train_batch_start(self: LitModel, batch: Any, batch_idx: int) -> None:
        plain(self, batch, batch_idx)
        if self.step + 1 == 8:
            for group in self.optimizers().param_groups:
                group["lr"] = float("inf")

    monkeypatch.setattr(LitModel, "on_train_batch_start", on_train_batch_start)
    ended = launch(*tiny)
    assert ended.status == 3 and "step 8: expected finite numbers, " in ended.error
    run = RunFolder(only_run(tmp_path))
    state = run.load_last(run.path.name[-8:], lambda _: None)
    assert state is not None and state["step"] == 4


def test_a_validation_loss_that_is_not_finite(
    tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validation_step(self: LitModel, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.full((1, 3), float("nan"))

    monkeypatch.setattr(LitModel, "validation_step", validation_step)
    ended = launch(*tiny)
    assert ended.status == 3 and "step 2: expected finite numbers, the validation loss is not" in ended.error


def test_a_run_that_stays_at_chance_is_told_so(
    tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert straight["result"]["learned"] is None  # of 12 steps
    monkeypatch.setattr("chela.training.run.TOO_EARLY", 5)
    ended = launch(*tiny, *STUCK)
    assert ended.status == 0
    assert "warning: the best validation accuracy is within luck of the majority class. Usual causes: a " in ended.out
    assert json.loads((only_run(tmp_path) / "result.json").read_text())["learned"] is False


@pytest.mark.parametrize(
    ("accuracy", "targets", "learned"),
    [(0.109, 10**5, False), (0.112, 10**5, True), (0.15, 100, False), (0.5, 100, True), (0.0, 100, False)],
)
def test_learned_is_more_than_a_point_above_the_majority_and_than_luck(
    accuracy: float, targets: int, learned: bool
) -> None:
    assert above_majority({"accuracy": accuracy, "count": targets}, 0.1) is learned


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_gradients_are_clipped_by_their_total_norm(clip: float) -> None:
    config = resolve(["preset=tiny", f"optimizer.clip={clip}", "optimizer.kernel_lr=3e-4"])
    task = TaskFacts(num_classes=3, l_max=20, vocab_size=9)
    module = LitModel(build_model(config.model, task, 0), Objective(ListOps()), config)
    module.model(torch.randint(1, 9, (2, 20)), None).square().sum().backward()
    before = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    optimizer = module.configure_optimizers()
    module.configure_gradient_clipping(optimizer)
    after = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    assert before > 0.01 and after.item() == pytest.approx(clip or before.item(), rel=1e-3)
    peaks = {group["peak_lr"] for group in optimizer.param_groups}
    assert peaks == {3e-4, config.optimizer.lr}
