from __future__ import annotations

import pytest
import torch

from chela.ops.memory import Workspace


@pytest.fixture(autouse=True)
def nan_in_uninitialized_memory():
    """Let torch fill what torch.empty returns with NaN, so that an output nobody wrote shows."""
    Workspace.release()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
