"""What a CPU's products cost by MKL and by oneDNN: of matrices, in a layer, in a step of the main job."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from chela.config.compose import resolve
from chela.layers.mixers.chela import ChelaLayer
from chela.training.machine import MATMUL, use_matmul
from experiments.bench import Options, Row, timing
from experiments.bench.kernels import QUERY, VALUE, WIDTH
from experiments.bench.models import random_records, training_step
from experiments.bench.timing import Step, interleaved
from lra.tasks import get_task

SHAPES = ((1, 8192, 64, 128), (1, 8192, 128, 256), (1, 8192, 256, 512), (32, 1024, 64, 48))  # N, rows, inner, columns
LENGTHS = (1024, 4096, 8192)


def products(options: Options) -> list[Row]:
    """MKL beside oneDNN by turns: products alone (bfloat16 too), a CHELA layer, a step of ListOps mini.

    float32, forward and backward. The step is of records as long as the longest. The allocator keeps its memory.
    """
    timing.allocator(keep=True)
    shapes, lengths = (SHAPES[:1], LENGTHS[:1]) if options.quick else (SHAPES, LENGTHS)
    rows = [product_row(*shape) for shape in shapes]
    rows += [by_turns({"L": length, "what": "layer"}, layer_step(length)) for length in lengths]
    return [*rows, by_turns({"what": "listops mini"}, main_job_step())]


def product_row(N: int, M: int, K: int, E: int) -> Row:
    """Return GFLOP/s of ``(N, M, K) @ (N, K, E)``, and the largest errors beside float64."""
    torch.manual_seed(0)
    a, b = torch.randn(N, M, K), torch.randn(N, K, E)
    a16, b16 = a.bfloat16(), b.bfloat16()
    steps = {name: with_matmul(name, partial(torch.matmul, a, b)) for name in MATMUL}
    times = interleaved(steps | {"bfloat16": partial(torch.matmul, a16, b16)}, seconds=0.5)
    work = 2 * N * M * K * E / 1e9
    values = {f"{name} [GFLOP/s]": work / took for name, took in times.median().items()}
    exact = a.double() @ b.double()
    values |= {f"{name} error": float((step() - exact).abs().max()) for name, step in steps.items()}
    return Row({"N": N, "rows": M, "inner": K, "columns": E}, values)


def with_matmul(name: str, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return the step with these products."""

    def run() -> torch.Tensor:
        use_matmul(name)
        return step()

    return run


def by_turns(key: dict[str, object], step: Step) -> Row:
    """Time a step with either's products."""
    steps: dict[str, Step] = {name: with_matmul(name, step) for name in MATMUL}  # type: ignore[arg-type]
    times = interleaved(steps, seconds=3.0, least=5)
    median = times.median()
    return Row.timed(key, times, {"mkl / onednn": median["mkl"] / median["onednn"]})


def layer_step(length: int) -> Step:
    """Return a training step of one layer, as in ``chela bench layers``."""
    torch.manual_seed(0)
    layer = ChelaLayer(WIDTH, l_max=length, d_qk=QUERY, d_value=VALUE)
    x, d_out = torch.randn(2, 1, length, WIDTH).unbind()
    return timing.training_step(layer, x, d_out=d_out, weights=layer.parameters())


def main_job_step() -> Step:
    """Return a training step of ListOps mini."""
    config = resolve(["task=listops", "preset=mini"])
    task = get_task(config.task)
    records = random_records(task, config.trainer.batch_size, "cpu")
    return partial(training_step(config, task, "cpu", "32-true"), *records)
