"""CHELA layers in a LightningModule of your own, and a task of this package under a Trainer of yours.

`param_groups` says which parameters learn how fast.
"""

import lightning
import torch
from torch import nn

from chela import ChelaLayer, param_groups
from chela.config.compose import resolve
from chela.models import build_model
from chela.training.objectives import Objective
from chela.training.score import data_of
from chela.training.step import LitModel


class Tagger(lightning.LightningModule):
    """Tag every token: the parity of the ones so far."""

    def __init__(self, d_model: int = 32, depth: int = 2, l_max: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(depth))
        self.layers = nn.ModuleList(ChelaLayer(d_model, l_max=l_max, causal=True) for _ in range(depth))
        self.out = nn.Linear(d_model, 2)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Score tokens (B, L): (B, L, 2)."""
        x = self.embed(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), mask)
        return self.out(x)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch).mT, batch.cumsum(1) % 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Let `param_groups` say which parameters learn how fast."""
        return torch.optim.AdamW(param_groups(self, lr=3e-3, weight_decay=0.01))


def task_of_this_package(*words: str) -> tuple[LitModel, lightning.LightningDataModule]:
    """Return the module and the data of `chela train WORDS`, for `Trainer.fit`: its epoch is the whole run."""
    config = resolve(list(words))
    data = data_of(config)
    model = build_model(config.model, data.task, config.seed)
    return LitModel(model, Objective(data.task), config), data


if __name__ == "__main__":
    data = torch.utils.data.DataLoader(torch.randint(0, 2, (2000, 20)), batch_size=32)
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Tagger(), data)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    module, task = task_of_this_package("task=listops", "preset=tiny")
    trainer.fit(module, datamodule=task)
