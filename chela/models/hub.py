"""A network as the Hugging Face Hub wants it; needs ``pip install huggingface_hub``.

HubModel(model).push_to_hub("me/listops-chela")
model = HubModel.from_pretrained("me/listops-chela").network      trust="module" if its system is one of your own
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin  # type: ignore[import-not-found]
from torch import Tensor, nn

from chela.models.pretrained import find, from_pretrained, save_pretrained


class HubModel(nn.Module, ModelHubMixin):  # type: ignore[misc]
    """A network with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``; only safetensors are fetched.

    Args:
        network: As ``chela.models.build_model`` makes it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Call the network."""
        scores: Tensor = self.network(inputs, mask)
        return scores

    def _save_pretrained(self, save_directory: Path) -> None:
        save_pretrained(self.network, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, trust: str | Collection[str] = (), **download: Any) -> HubModel:
        return cls(from_pretrained(find(model_id, **download), trust))
