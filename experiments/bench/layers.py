"""The whole CHELA layer, forward + backward per sequence: against a softmax layer, and its own products and FFTs.

Width 128, queries and keys 64, values 256, bidirectional, batch 1, float32, output gate; with parallel short
branches and batch norms, and without them. On a CPU with an allocator that keeps its memory, unless the
environment says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from chela.layers.mixers.chela import ChelaLayer
from chela.layers.mixers.softmax import SoftmaxAttention
from chela.training.machine import tune_allocator
from experiments.bench.convolution import transforms_and_products
from experiments.bench.registry import Row
from experiments.bench.timing import ALLOCATOR_VARIABLES, interleaved, peak_memory, record

PLOT = ("L", "CHELA [ms]", "no branches [ms]", "softmax [ms]", "its products and FFTs [ms]")

WIDTH, QUERY, VALUE = 128, 64, 256
LENGTHS = (1024, 2048, 4096, 8192, 16384)
SOFTMAX_UP_TO = 8192  # beyond, one step takes many seconds
MATRICES = ((WIDTH, QUERY), (WIDTH, VALUE), (WIDTH, VALUE), (VALUE, WIDTH))  # z, v, gate, out


def run(quick: bool) -> list[Row]:
    """Measure every length; times are also given as multiples of the first one's."""
    given = any(name in os.environ for name in ALLOCATOR_VARIABLES)
    allocator = "as set" if given else "keeping" if tune_allocator() else "default"
    rows = [layer_row(length, allocator) for length in (LENGTHS[:1] if quick else LENGTHS)]
    for row in rows:
        row.values["time / time at the first length"] = row.values["CHELA [ms]"] / rows[0].values["CHELA [ms]"]
    return rows


def training_step(layer: nn.Module, length: int) -> Callable[[], None]:
    """Return forward + backward of a layer on one sequence, which leaves no gradient behind."""
    x = torch.randn(1, length, WIDTH, requires_grad=True)
    d_out = torch.randn(1, length, WIDTH)
    leaves = [x, *layer.parameters()]

    def step() -> None:
        torch.autograd.grad(layer(x), leaves, d_out)

    return step


def products_and_transforms(length: int) -> Callable[[], None]:
    """Return the layer's matrix products and FFTs, forward and backward, and nothing else."""
    weights = [torch.randn(d_in, d_out) for d_in, d_out in MATRICES]
    by_width = {width: torch.randn(length, width) for width in (QUERY, WIDTH, VALUE)}
    q, v, S = by_width[QUERY], by_width[VALUE], torch.randn(QUERY, VALUE)
    convolution = transforms_and_products(1, WIDTH, length)

    def work() -> None:
        convolution()
        for weight in weights:
            x, y = by_width[weight.shape[0]], by_width[weight.shape[1]]
            _ = x @ weight, y @ weight.T, x.T @ y
        for _ in range(2):  # k^T v and q S; then q^T do and k dS
            _ = q.T @ v, q @ S
        _ = v @ S.T, v @ S.T  # do S^T and v dS^T

    return work


def layer_row(length: int, allocator: str) -> Row:
    """Return times and peak memory at one length."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "CHELA": ChelaLayer(WIDTH, l_max=length, d_qk=QUERY, d_value=VALUE),
        "no branches": ChelaLayer(WIDTH, l_max=length, d_qk=QUERY, d_value=VALUE, reparam=False),
    }
    if length <= SOFTMAX_UP_TO:
        layers["softmax"] = SoftmaxAttention(WIDTH, rotary=False)
    steps: dict[str, Callable[[], object]] = {name: training_step(layer, length) for name, layer in layers.items()}
    work = "its products and FFTs"
    times = interleaved(steps | {work: products_and_transforms(length)}, seconds=3.0, least=3)
    values = {f"{name} [ms]": t.median for name, t in times.items()}
    for name in ("CHELA", "no branches"):
        if "softmax" in times:
            values[f"softmax / {name}"] = times["softmax"].median / times[name].median
        values[f"{name} / its products and FFTs"] = times[name].median / times[work].median
    values |= {f"{name} [MiB]": peak_memory(step) / 2**20 for name, step in steps.items()}
    shapes = ", ".join(f"{length}x{d_in}x{d_out}" for d_in, d_out in MATRICES)
    note = (
        f"L {length}: products {shapes}, each with both gradients; of the attention two {QUERY}x{length}x{VALUE}, two "
        f"{length}x{QUERY}x{VALUE}, two {length}x{VALUE}x{QUERY}; 8 real "
        f"FFTs of {2 * length} for each of {WIDTH} channels"
    )
    return Row({"L": length, "allocator": allocator}, values, note, {name: record(t) for name, t in times.items()})
