from __future__ import annotations

import os

import pytest
import torch

from chela.ops.memory import Workspace

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is when its backend is first used


@pytest.fixture(autouse=True)
def nan_in_uninitialized_memory():
    """Let torch fill what torch.empty returns with NaN, so that an output nobody wrote shows."""
    Workspace.release()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
