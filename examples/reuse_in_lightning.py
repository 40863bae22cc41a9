"""A LightningModule of your own with CHELA layers; the learning rates of their kernels come along by `param_groups`."""

import lightning
import torch
from torch import nn

from chela import ChelaLayer, param_groups


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
            x = x + layer(norm(x), mask, stream=x)
        return self.out(x)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch).mT, batch.cumsum(1) % 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Let `param_groups` say which parameters learn how fast."""
        return torch.optim.AdamW(param_groups(self, lr=3e-3, weight_decay=0.01))


if __name__ == "__main__":
    data = torch.utils.data.DataLoader(torch.randint(0, 2, (2000, 20)), batch_size=32)
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Tagger(), data)
