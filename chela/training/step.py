"""The LightningModule: one step of training, one of evaluation; for the loop of this package and for a ``Trainer``."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from chela.config.schema import Config, OptimizerConfig
from chela.core.errors import DivergedError
from chela.layers.param_groups import param_groups
from chela.ops.sequence_parallel import sequence_parallel
from chela.training.objectives import Objective
from lra.batches import Batch


class LitModel(L.LightningModule):
    """Train and score a network; everything random in step t follows from (seed, t, share of the batch).

    ``model`` maps ``(inputs, mask)`` to scores, and ``objective`` says what these are for.
    """

    def __init__(self, model: nn.Module, objective: Objective, config: Config) -> None:
        super().__init__()
        self.model, self.objective, self.config = model, objective, config
        model.get_submodule("backbone").checkpoint_blocks = config.trainer.checkpoint_activations  # type: ignore[assignment]
        self.step = 0  # steps of the whole run that are done
        self.step_counts = torch.zeros(3, dtype=torch.float64)  # counted in the present step, as Objective.count
        self.run_counts = torch.zeros(3, dtype=torch.float64)  # targets hit, targets, tokens; ``totals`` takes them
        self.groups: Sequence[int] = ()  # values of ``Records.groups``, each of which is counted on its own
        self.carried: dict[int, dict[str, Tensor]] = {}  # what each part of a batch left for the next step's
        self._bad_step = torch.tensor(-1)  # the first whose gradients were not finite
        self._sharers: Any = None  # the processes that have a piece each of this one's sequences
        if config.trainer.compile:
            self.model.compile()

    def setup(self, stage: str = "fit") -> None:
        """Make the groups of processes that share sequences: P neighbours each, of N × P in all."""
        pieces = self.config.trainer.sequence_parallel
        if pieces > 1 and self._sharers is None:
            shape = self.trainer.world_size // pieces, pieces
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "sequence"))
            self._sharers = mesh["sequence"].get_group()

    # ---- training ----

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed this process's share of the step's batch, and set the step's learning rate."""
        self.step, part = int(batch["step"]), int(batch["part"])
        key = f"{self.config.seed}:{self.step}:{self.trainer.global_rank + part * self.trainer.world_size}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        factor = self.config.optimizer.lr_factor(self.step, self.config.trainer.max_steps)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = group["peak_lr"] * factor
        if part == 0:
            self.step_counts = torch.zeros_like(self.step_counts)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a part of the step's batch, and count."""
        with self._own_piece(batch) as batch:
            mask, labels = batch["mask"], batch["labels"]
            scores = self._scores(batch)
            loss = self.objective.loss(scores, labels)
            counts = self.objective.count(scores, labels, loss.detach())
        tokens = counts.new_tensor(batch["inputs"].shape[:2].numel()) if mask is None else mask.sum().double()
        self.step_counts = self.step_counts.to(counts) + counts
        self.run_counts = self.run_counts.to(counts) + torch.stack([counts[1], counts[2], tokens])
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
        before = self._bad_step.to(norm.device)
        self._bad_step = torch.where(~torch.isfinite(norm) & (before < 0), self.step + 1, before)
        if norm.device.type == "cpu":
            self.expect_finite()

    def expect_finite(self) -> None:
        """End the run by a DivergedError, which names the step, where a gradient was not finite."""
        if (step := int(self._bad_step)) < 0:
            return
        if not self.step_counts.isfinite().all():
            raise diverged("the loss", step)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                raise diverged(f"the gradient of {name}", step)
        raise diverged("the norm of the gradients", step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimiser; its rate is set step by step."""
        return build_optimizer(self.model, self.config.optimizer)

    # ---- evaluation ----

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Count a batch, then each of ``groups`` in it: ``(1 + groups, 3)``, as ``Objective.count``."""
        with self._own_piece(batch) as batch:
            scores, labels = self._scores(batch), batch["labels"]
            counts = [self.objective.count(scores, labels)]
            for group in self.groups:
                rows = [row for row, its in enumerate(batch["groups"]) if its == group]
                counts.append(self.objective.count(scores[rows], labels[rows]))
        return torch.stack(counts)

    test_step = validation_step

    # ---- what a Trainer's loggers and callbacks are told; the loop of this package has its own ----

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the loss."""
        self.log("train/loss", outputs["loss"])

    def on_validation_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the columns, averaged over the targets of all batches."""
        split = "test" if self.trainer.testing else "validation"
        columns = self.objective.values(outputs[0].tolist())
        targets = int(columns.pop("count"))
        self.log_dict({f"{split}/{name}": columns[name] for name in columns}, batch_size=targets, sync_dist=True)

    on_test_batch_end = on_validation_batch_end

    # ---- the network ----

    @contextlib.contextmanager
    def _own_piece(self, batch: Batch) -> Iterator[Batch]:
        """Work on this process's piece of the sequences of a batch; on the whole of them where none are shared."""
        if self._sharers is None:
            yield batch
            return
        with sequence_parallel(batch["inputs"].shape[1], self._sharers) as piece:
            long = {name: batch[name] for name in ("inputs", "mask", "labels") if batch[name] is not None}
            yield batch | {name: piece.cut(x) for name, x in long.items() if x.ndim > 1}

    def _scores(self, batch: Batch) -> Tensor:
        """Score a batch; one of a text that is read in order goes on from the state that the one before left."""
        if "fresh" not in batch:
            return scores_of(self.model, batch)
        part = int(batch["part"])
        state = None if batch["fresh"] else self.carried[part]
        scores: Tensor
        scores, self.carried[part] = self.model.prefill(batch["inputs"], state)  # type: ignore[operator]
        return scores


def scores_of(model: nn.Module, batch: Batch) -> Tensor:
    """Score a batch: ``(B, K)``, or ``(B, L, K)`` where each position has a label.

    A text longer than the network was built for ("beyond") is read by ``prefill``.
    """
    inputs = batch["inputs"]
    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
    scores: Tensor = model.prefill(inputs)[0] if "beyond" in batch else model(inputs, batch["mask"])  # type: ignore[operator]
    return scores


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


def diverged(tensor: str, step: int) -> DivergedError:
    """Say what is no longer a finite number, and why that may be."""
    return DivergedError(
        f"step {step}: expected finite numbers, {tensor} is not. Usual causes: a learning rate too high, a warm-up too "
        "short, no gradient clipping, or bf16 where fp32 is needed"
    )
