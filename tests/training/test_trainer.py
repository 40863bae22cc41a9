"""The same step under a plain Lightning Trainer, and with blocks that are computed again."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from chela.config.compose import resolve
from chela.config.identity import fingerprint
from tests.test_examples import OWN, load_example
from tests.training.launches import assert_equal, launch, left_by, only_run


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_takes_the_steps_of_the_loop(accumulate: int, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Every weight to the last bit, and the score of the validation set."""
    words = (*tiny, f"trainer.accumulate={accumulate}", "trainer.val_every=12")
    assert launch(*words).status == 0
    left = left_by(only_run(tmp_path))
    module, data = load_example("reuse_in_lightning").task_of_this_package(*words)
    quiet: dict[str, Any] = dict.fromkeys(OWN, False)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=accumulate, num_sanity_val_steps=0, **quiet
    )
    trainer.fit(module, datamodule=data)
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, left["last"]["model"][name]), name
    for name in ("loss", "accuracy"):
        found = float(trainer.callback_metrics[f"validation/{name}"])
        assert found == pytest.approx(left["result"]["last_validation"][name], rel=1e-6)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/loss"] > 0


def test_blocks_computed_again_give_the_same_run(
    tiny: tuple[str, ...], straight: dict[str, Any], tmp_path: Path
) -> None:
    assert fingerprint(resolve([*tiny, "trainer.checkpoint_activations=false"])) == fingerprint(resolve([*tiny]))
    assert launch(*tiny, "trainer.checkpoint_activations=true").status == 0
    found = left_by(only_run(tmp_path))
    for part in ("last", "best", "result"):
        found[part]["fingerprint"] = straight[part]["fingerprint"]
    assert_equal(found, straight)
