"""Every test starts from the same state and leaves none behind."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whichever test comes first


@pytest.fixture(autouse=True)
def _clean_torch() -> Iterator[None]:
    """One thread (the tests run side by side), a fixed seed, and the default dtype as it was."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
