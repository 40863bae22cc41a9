"""Every test starts from the same state and leaves none behind; the longest ones begin."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whichever test comes first
    # Without a GPU, torch writes down the stack at each seed, in case it finds one later, which takes milliseconds; the
    # weights of a network are drawn with hundreds of seeds.
    for device in ("cuda", "mtia", "xpu"):
        if hasattr(torch, device):
            getattr(torch, device).manual_seed_all = lambda seed: None

# One thread, also where a fixture of a module computes and in processes that a test starts: tests run side by side,
# and the threads of one would wait for a core that another one has.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# The modules of the longest tests. Two workers share them by turns: one of them has most of those that fork.
LONGEST = [
    "stranger/test_own_parts.py", "ops/linear_attention/test_triton.py", "test_readme.py",
    "layers/mixers/test_compile.py", "training/test_resume.py", "test_doctests.py",
    "training/test_processes.py", "lra/test_pathfinder_task.py", "training/test_stopping.py",
    "experiments/test_bench.py", "experiments/test_sweep.py", "training/test_cli_random.py",
]  # fmt: skip


@pytest.hookimpl(trylast=True)  # when those that are not asked for are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no worker is left with one when nothing remains that others could take.

    ``--dist worksteal`` gives each worker an equal part of the list, from its begin to its end.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    rest = [item for item in items if item.path not in places]
    longest = sorted((item for item in items if item.path in places), key=lambda item: places[item.path])
    whole = len(items)
    items.clear()
    for worker in range(workers):
        items += [item for item in longest if places[item.path] % workers == worker]
        room = max(0, whole * (worker + 1) // workers - len(items))
        items += rest[:room]
        del rest[:room]


@pytest.fixture(autouse=True)
def _clean_torch() -> Iterator[None]:
    """A fixed seed; the default dtype, the number of threads and the products as they were."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
