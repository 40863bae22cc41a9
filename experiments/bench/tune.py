"""The search that the table of tiles in ``chela/ops/linear_attention/tiles.py`` comes from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from chela.core.errors import UsageError
from chela.ops import linear_attention
from chela.ops.backend import interpreted
from chela.ops.linear_attention import triton
from chela.ops.linear_attention.tiles import INTERPRETED, Launch, launches, padded
from experiments.bench import Options, Row
from experiments.bench.timing import interleaved, training_step

MOST = {"BT": 128, "BK": 256, "BC": 128, "BR": 128, "BU": 128, "BS": 128, "NB": 16, "warps": 8, "stages": 4}
LEAST = {"NB": 1, "warps": 2, "stages": 1}  # of the others 16, the least that tensor cores take
SECONDS = 110.0  # for each dtype and width, compiling included
BETTER = 0.97  # of the time before, or it is noise
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}  # ‖difference‖ / ‖gradient‖


def tune(options: Options) -> list[Row]:
    """Tiles, warps and stages of linear attention's kernels: from the table's launch, one field at a time.

    Causal, decay per head, forward + backward, 32,768 tokens, H = 2048 / D. A launch whose output or gradients are not
    those of the chunked backend is not taken, however fast. The notes are lines for the table.
    """
    if interpreted():
        return [tuned(torch.float32, 16, length=40, seconds=0.0)]
    if not torch.cuda.is_available():
        raise UsageError("expected a CUDA GPU, found none; TRITON_INTERPRET=1 tries the search without one")
    cases = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 64)]
    return [tuned(*case, length=32768, seconds=SECONDS) for case in cases[: 1 if options.quick else None]]


def tuned(dtype: torch.dtype, width: int, length: int, seconds: float) -> Row:
    """Return the best launch found in so many seconds; at least one field is tried."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads = 2048 // width if device == "cuda" else 2
    inputs = torch.randn(4, 1, length, heads, width, device=device, dtype=dtype).unbind()
    decay = -torch.logspace(-1, -8, heads, base=2, device=device)
    right, _ = attempt(None, inputs, decay)
    best = INTERPRETED
    if device == "cuda":
        card: Any = torch.cuda.get_device_properties(0)
        memory = int(card.shared_memory_per_block_optin)
        best = launches(width, width, dtype, memory, gradients=True, hopper=card.major == 9)[0]
    began, wrong = time.monotonic(), 0
    tried: set[Launch] = set()
    first, best_time = attempt(best, inputs, decay)
    table_time, ended = best_time, False
    assert all(close(x, y) for x, y in zip(first, right, strict=True)), "the table's own launch computes something else"
    while not ended:
        ended = True
        for launch in neighbours(best, padded(width)):
            if launch in tried or (len(tried) > 1 and time.monotonic() - began > seconds):
                continue
            tried.add(launch)
            try:
                found, took = attempt(launch, inputs, decay)
            except Exception:  # the compiler and the driver have many ways to refuse a tile
                continue
            if not all(close(x, y) for x, y in zip(found, right, strict=True)):
                wrong += 1
            elif took < BETTER * best_time:
                best, best_time, ended = launch, took, False
                break
    name = str(dtype).removeprefix("torch.")
    values = {"table's launch [ms]": table_time, "best [ms]": best_time, "tried": len(tried), "wrong": wrong}
    return Row({"dtype": name, "D": width, "L": length}, values, f"({dtype}, {width}): {best}")


def neighbours(launch: Launch, width: int) -> Iterator[Launch]:
    """Yield launches that differ in one field, by a factor of two."""
    for name, value in launch._asdict().items():
        most = min(MOST[name], width) if name in ("BK", "BC", "BS") else MOST[name]
        for other in (value // 2, value * 2):
            near = launch._replace(**{name: other})
            if LEAST.get(name, 16) <= other <= most and near.BR <= near.BK and near.BT % near.BU == 0:
                yield near


def attempt(launch: Launch | None, inputs: tuple[Tensor, ...], decay: Tensor) -> tuple[tuple[Tensor, ...], float]:
    """Return output and gradients, and the seconds of a step; without a launch of the chunked backend, untimed."""
    *leaves, d_out = inputs
    backend = "chunked" if launch is None else "triton"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return linear_attention(q, k, v, causal=True, log_decay=decay, backend=backend)

    with mock.patch.object(triton, "table", lambda problem, backward: (launch,)):
        step = training_step(attend, *leaves, d_out=d_out)
        results = (attend(*leaves), *step())
        return results, 0.0 if launch is None else float(interleaved({"": step}, seconds=0.3)[""].median())


def close(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are the same but for rounding."""
    error = torch.linalg.vector_norm((x - y).float()) / torch.linalg.vector_norm(y.float())
    return bool(error < CLOSE[x.dtype])
