"""Both tasks train, go on after a stop, and evaluate, at the smallest size."""

import json
import os
import signal
from pathlib import Path

import pytest

from chela.evaluate import main as evaluate
from chela.training.step import LitModel
from tests.training.launches import assert_equal, launch, left_by, only_run

SMALL = (
    "preset=tiny",
    "task.train=48",
    "task.validation=20",
    "task.test=20",
    "trainer.max_steps=4",
    "trainer.batch_size=8",
    "trainer.val_every=2",
    "trainer.checkpoint_every=2",
    "trainer.threads=1",
    "trainer.progress=none",
    "data.processes=1",
    "tensorboard=false",
    "allocator=false",
)


@pytest.mark.parametrize("task", ["pathfinder", "pathx"])
def test_trains_resumes_and_evaluates(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"task={task}", *SMALL, f"data.dir={tmp_path / 'data'}")
    straight = launch(*words, f"runs={tmp_path / 'straight'}")
    assert straight.status == 0, straight.err

    plain = LitModel.training_step

    def stopped_at_three(self: LitModel, batch: object, batch_idx: int) -> object:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitModel, "training_step", stopped_at_three)
        assert launch(*words, f"runs={tmp_path / 'stopped'}").status == 128 + signal.SIGTERM
    run = only_run(tmp_path / "stopped")
    assert launch(f"resume={run}").status == 0
    assert_equal(left_by(run), left_by(only_run(tmp_path / "straight")))
    assert evaluate([f"run={run}"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert f"accuracy {result['test']['accuracy']}" in capsys.readouterr().out
