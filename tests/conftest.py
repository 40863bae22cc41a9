"""Every test starts from the same state and leaves none behind; the longest ones begin."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whichever test comes first

# One thread, also where a fixture of a module computes and in processes that a test starts: tests run side by side,
# and the threads of one would wait for a core that another one has.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_torch() -> Iterator[None]:
    """A fixed seed; the default dtype and the number of threads as they were."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
