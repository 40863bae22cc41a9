"""Every system can fit a handful of sequences: gradients reach what has to move, at the rates of `param_groups`."""

import pytest
import torch

from chela.config.compose import resolve
from chela.config.groups import names
from chela.layers.param_groups import param_groups
from chela.models import build_model
from tests.models.test_one_block import LISTOPS

FAST = ("chela", "mega_chunk")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names("model")]
)
def test_fits_sixteen_sequences(name):
    torch.manual_seed(0)
    inputs, labels = torch.randint(1, 17, (16, 20)), torch.randint(0, 10, (16,))
    mask = torch.arange(20) < torch.randint(8, 21, (16, 1))
    model = build_model(resolve([f"model={name}", "preset=tiny", "model.d_model=32"]).model, LISTOPS, 0)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.0))
    losses = []
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(model(inputs, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses[::10]
