"""Callbacks by the optimiser's step, of which the batches that Lightning is handed may be parts."""

from __future__ import annotations

from typing import Any

import lightning as L

from chela.training.module import LitClassifier


class StepCallback(L.Callback):
    """Calls ``on_step_end`` once a step, after the last part of its batch."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pass on what ends a step."""
        assert isinstance(pl_module, LitClassifier)
        if pl_module.ends_step(batch):
            self.on_step_end(trainer, pl_module)

    def on_step_end(self, trainer: L.Trainer, module: LitClassifier) -> None:
        """Do what is to be done after a step."""
        raise NotImplementedError
