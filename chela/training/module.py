"""The LightningModule: one step of training, one of evaluation."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from chela.core.errors import DivergedError
from chela.layers.param_groups import param_groups
from chela.ops.sequence_parallel import sequence_parallel
from chela.schema import Config, OptimizerConfig
from chela.training.objectives import Objective, Totals


class LitModel(L.LightningModule):
    """Train and score a network; everything random in step t follows from (seed, t, share of the batch).

    A launch is a fit of the remaining steps: ``step`` counts those of the whole run, from ``first_step`` on.

    Args:
        model: Maps ``(inputs, mask)`` to scores.
        objective: Says what the scores are for.
        config: The resolved configuration.
    """

    def __init__(self, model: nn.Module, objective: Objective, config: Config) -> None:
        super().__init__()
        self.model, self.objective, self.config = model, objective, config
        model.get_submodule("backbone").checkpoint_blocks = config.trainer.checkpoint_activations  # type: ignore[assignment]
        self.first_step = 0
        self.of_step = Totals(*objective.counted)  # of the step's batch, over its parts
        self.of_run = Totals("correct", "targets", "tokens")  # since the first step
        self.of_split = Totals(*objective.counted)  # of the evaluation that goes on
        self.evaluated: dict[str, float] = {}
        self.of_groups: dict[int, Totals] = {}  # of the test set, by the number that tells its records apart
        self.evaluated_groups: dict[int, dict[str, float]] = {}
        self.carried: dict[int, dict[str, Tensor]] = {}  # what each part of a batch left for the next step's
        self._sharers: Any = None  # the group of the processes that have a piece each of this one's sequences
        self.register_buffer("bad_step", torch.tensor(-1), persistent=False)  # the first that was not finite
        if config.trainer.compile:
            self.model.compile()

    bad_step: Tensor

    @property
    def step(self) -> int:
        """Steps of the run that are done."""
        return self.first_step + self.global_step

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return scores."""
        scores: Tensor = self.model(inputs, mask)
        return scores

    def setup(self, stage: str) -> None:
        """Make the groups of processes that share sequences: P neighbours each, of N × P in all."""
        pieces = self.config.trainer.sequence_parallel
        if pieces > 1 and self._sharers is None:
            shape = self.trainer.world_size // pieces, pieces
            mesh = init_device_mesh(self.trainer.strategy.root_device.type, shape, mesh_dim_names=("data", "sequence"))
            self._sharers = mesh["sequence"].get_group()

    @contextlib.contextmanager
    def own_piece(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Work on this process's piece of the sequences of a batch; on the whole of them where none are shared."""
        if self._sharers is None:
            yield batch
            return
        with sequence_parallel(batch["inputs"].shape[1], self._sharers) as piece:
            long = {name: batch[name] for name in ("inputs", "mask", "labels") if batch[name] is not None}
            yield batch | {name: piece.cut(x) for name, x in long.items() if x.ndim > 1}

    def scores(self, batch: dict[str, Any]) -> Tensor:
        """Score a batch.

        One of a text that is read in order goes on from the state that the one before left; one that is longer than the
        network was built for ("beyond") starts from no state.
        """
        inputs = batch["inputs"]
        scores: Tensor
        if "fresh" in batch or "beyond" in batch:
            part = int(batch["part"])
            state = None if batch.get("fresh", True) else self.carried[part]
            scores, self.carried[part] = self.model.prefill(inputs, state)  # type: ignore[operator]
        else:
            scores = self(inputs, batch["mask"])
        return scores

    # ---- training ----

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Seed this share of the step's batch and set the step's learning rate."""
        step = self.step
        if int(batch["step"]) != step:
            raise RuntimeError(f"expected the batch of step {step}, got that of step {int(batch['step'])}")
        share = self.global_rank + int(batch["part"]) * self.trainer.world_size
        key = f"{self.config.seed}:{step}:{share}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        factor = self.config.optimizer.lr_factor(step, self.config.trainer.max_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["peak_lr"] * factor

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss, and count."""
        with self.own_piece(batch) as batch:
            mask, labels = batch["mask"], batch["labels"]
            scores = self.scores(batch)
            loss = self.objective.loss(scores, labels)
            counts = self.objective.count(scores, labels, loss.detach())
        if int(batch["part"]) == 0:
            self.of_step.reset()
        self.of_step.update(counts)
        tokens = counts.new_tensor(batch["inputs"].shape[:2].numel()) if mask is None else mask.sum().double()
        self.of_run.update(torch.stack([counts[1], counts[2], tokens]))
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by the total norm, and note the first step at which it is not finite.

        Where the loss is not finite, neither are the gradients; processes share them, so that all stop at one step. A
        CPU is asked at once; a GPU only when a line is written or a checkpoint is due, since asking waits for it.
        """
        limit = self.config.optimizer.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        bad = ~torch.isfinite(norm) & (self.bad_step < 0)
        self.bad_step = torch.where(bad.to(self.bad_step.device), self.step + 1, self.bad_step)
        if self.device.type == "cpu":
            self.expect_finite()

    def expect_finite(self) -> None:
        """End the run where a gradient was not finite.

        Raises:
            DivergedError: One was, at the step that it names.
        """
        step = int(self.bad_step)
        if step >= 0:
            raise DivergedError(self.divergence(self._not_finite(), step))

    def _not_finite(self) -> str:
        if not self.of_step.sums.isfinite().all():
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
        self.of_split.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count one batch."""
        with self.own_piece(batch) as batch:
            self.of_split.update(self.objective.count(self.scores(batch), batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        """Sum over the processes; ``evaluated`` holds the objective's columns and the number of targets."""
        totals = self.of_split.compute()
        if not math.isfinite(totals["loss"]) and self.trainer.state.fn == TrainerFn.FITTING:
            raise DivergedError(self.divergence("the validation loss", self.step))
        self.evaluated = {**self.objective.values(totals), "count": totals["targets"]}

    @torch.no_grad()
    def score_tenth(self) -> dict[str, float]:
        """Return the objective's columns on the fixed tenth of validation; nothing of the run depends on it."""
        self.of_split.reset()
        modes = {module: module.training for module in self.modules()}
        self.eval()
        for batch in self.trainer.datamodule.tenth_dataloader():  # type: ignore[attr-defined]
            with self.trainer.precision_plugin.val_step_context():
                self.validation_step(self.trainer.strategy.batch_to_device(batch), 0)
        for module, mode in modes.items():
            module.training = mode
        return self.objective.values(self.of_split.compute())

    def on_test_epoch_start(self) -> None:
        """Start counting, of each group too."""
        self.of_split.reset()
        groups = self.trainer.test_dataloaders.dataset.records.groups()  # type: ignore[union-attr]
        names = [] if groups is None else sorted(set(groups.tolist()))  # all, so that all processes sum the same
        self.of_groups = {name: Totals(*self.objective.counted).to(self.device) for name in names}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count one batch, and each of its groups."""
        with self.own_piece(batch) as batch:
            scores, labels, groups = self.scores(batch), batch["labels"], batch["groups"]
            self.of_split.update(self.objective.count(scores, labels))
            for group in set(groups or ()):
                rows = [row for row, its in enumerate(groups) if its == group]
                self.of_groups[group].update(self.objective.count(scores[rows], labels[rows]))

    def on_test_epoch_end(self) -> None:
        """Sum over the processes."""
        self.on_validation_epoch_end()
        totals = {name: part.compute() for name, part in self.of_groups.items()}
        self.evaluated_groups = {
            name: {**self.objective.values(sums), "count": sums["targets"]} for name, sums in totals.items()
        }


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over ``param_groups``; each group remembers its peak rate as ``peak_lr``.

    Fused on a CPU, where that takes a quarter of the time. A fused one would unscale gradients after they are clipped
    under 16-mixed, which GPUs have.
    """
    kernel = {"kernel_lr": config.kernel_lr, "kernel_weight_decay": config.kernel_weight_decay}
    groups = param_groups(model, config.lr, config.weight_decay, **kernel)
    for group in groups:
        group["peak_lr"] = group["lr"]
    fused = all(parameter.device.type == "cpu" for parameter in model.parameters()) or None
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


class StepCallback(L.Callback):
    """Calls ``on_step_end`` once a step of the optimiser, after the last part of its batch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Pass on what ends a step."""
        module: LitModel = pl_module
        if int(batch["part"]) + 1 == module.config.trainer.accumulate:
            self.on_step_end(trainer, module)

    def on_step_end(self, trainer: L.Trainer, module: LitModel) -> None:
        """Act after a step; each callback says how."""
        raise NotImplementedError
