"""The LightningModule: one step of training, one of evaluation."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F

from chela.errors import DivergedError
from chela.schema import Config
from chela.training.optim import build_optimizer, lr_factor


class LitClassifier(L.LightningModule):
    """Classify sequences; everything random in step t follows from (seed, t, share of the batch).

    Args:
        model: Maps ``(inputs, mask)`` to class scores.
        config: The resolved configuration.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.counts: Tensor | None = None  # of the step so far: tokens, correct, records, sum of the losses
        self.sums: Tensor | None = None
        self.evaluated: dict[str, float] = {}
        if config.trainer.compile:
            self.model.compile()

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return class scores."""
        scores: Tensor = self.model(inputs, mask)
        return scores

    # ---- training ----

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Seed this share of the step's batch and set the step's learning rate."""
        step = self.global_step
        if int(batch["step"]) != step:
            raise RuntimeError(f"expected the batch of step {step}, got that of step {int(batch['step'])}")
        share = self.global_rank + int(batch["part"]) * self.trainer.world_size
        key = f"{self.config.seed}:{step}:{share}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        factor = lr_factor(self.config.optimizer, step, self.config.trainer.max_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["peak_lr"] * factor

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss, and count."""
        scores = self(batch["inputs"], batch["mask"])
        loss = F.cross_entropy(scores, batch["labels"])
        correct = (scores.argmax(-1) == batch["labels"]).sum()
        count = correct.new_tensor(len(scores))
        counts = torch.stack([batch["mask"].sum(), correct, count, loss.detach().double() * count])
        self.counts = counts if self.counts is None or int(batch["part"]) == 0 else self.counts + counts
        return loss

    def ends_step(self, batch: dict[str, Any]) -> bool:
        """Whether the optimiser steps after this part of a batch."""
        return int(batch["part"]) + 1 == self.config.trainer.accumulate

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by the total norm, and stop at the first gradient that is no finite number.

        A loss that is none gives such gradients, to all processes: each of them stops here, at the same step.
        """
        limit = self.config.optimizer.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        if not torch.isfinite(norm):
            raise DivergedError(self.divergence(self._not_finite(), self.global_step + 1))

    def _not_finite(self) -> str:
        if self.counts is not None and not self.counts[-1].isfinite():
            return "the loss"
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {name}"
        return "the norm of the gradients"

    def divergence(self, tensor: str, step: int) -> str:
        """Say what is no longer a finite number, and why that may be."""
        return (
            f"step {step}: expected finite numbers, {tensor} is not. Usual causes: a learning rate too high, a warm-up "
            "too short, no gradient clipping, bf16 where fp32 is needed, or attention weights whose sum is not "
            "positive (normalize with another feature map than elu)"
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimiser; its rate is set step by step."""
        return build_optimizer(self.model, self.config.optimizer)

    # ---- evaluation ----

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self.sums = torch.zeros(3, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count one batch."""
        scores = self(batch["inputs"], batch["mask"])
        labels = batch["labels"]
        loss = F.cross_entropy(scores.float(), labels, reduction="sum")
        row = torch.stack(
            [
                loss.double().cpu(),
                (scores.argmax(-1) == labels).sum().double().cpu(),
                torch.tensor(float(len(labels))).double(),
            ]
        )
        assert self.sums is not None
        self.sums += row

    def on_validation_epoch_end(self) -> None:
        """Sum over the processes; ``evaluated`` holds loss, accuracy and count."""
        assert self.sums is not None
        sums = self.sums.to(self.device)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        loss, correct, count = sums.tolist()
        if not math.isfinite(loss) and self.trainer.state.fn == TrainerFn.FITTING:
            raise DivergedError(self.divergence("the validation loss", self.global_step))
        self.evaluated = {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1), "count": count}

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
