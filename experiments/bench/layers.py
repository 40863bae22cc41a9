"""The whole CHELA layer, forward + backward per sequence: against a softmax layer, and its own products and FFTs.

Width 128, queries and keys 64, values 256, bidirectional, batch 1, float32, all else as by default. On a CPU the
allocator keeps its memory, unless the environment says otherwise.
"""

from __future__ import annotations

import torch
from torch import nn

from chela.layers.mixers.chela import ChelaLayer
from chela.layers.mixers.softmax import SoftmaxAttention
from experiments.bench import Options, Row, timing
from experiments.bench.convolution import transforms_and_products
from experiments.bench.timing import Step, interleaved, peak_memory, training_step

WORK = "its products and FFTs"

WIDTH, QUERY, VALUE = 128, 64, 256
LENGTHS = (1024, 2048, 4096, 8192, 16384)
SOFTMAX_UP_TO = 8192  # a step at a greater length takes many seconds
PARTS = (
    f"{WORK}: the product of each linear map and both of its gradients; for each head of the attention two products of "
    f"keys and values, two with queries, two with values; 8 real FFTs of 2 L for each of {WIDTH} channels"
)


def run(options: Options) -> list[Row]:
    """Measure every length."""
    allocator = timing.allocator(keep=True)
    return [layer_row(length, allocator) for length in (LENGTHS[:1] if options.quick else LENGTHS)]


def products_and_transforms(layer: ChelaLayer, length: int) -> Step:
    """Return the layer's matrix products and FFTs, forward and backward, and nothing else."""
    weights = [torch.randn(m.in_features, m.out_features) for m in layer.modules() if isinstance(m, nn.Linear)]
    by_width = {width: torch.randn(length, width) for weight in weights for width in weight.shape}
    heads = [
        [torch.randn(core.heads, *shape) for shape in ((length, QUERY), (length, width), (QUERY, width))]
        for core in layer.cores
        for width in (core.width // core.heads,)
    ]
    convolution = transforms_and_products(1, WIDTH, length)

    def work() -> None:
        convolution()
        for weight in weights:
            x, y = by_width[weight.shape[0]], by_width[weight.shape[1]]
            _ = x @ weight, y @ weight.T, x.T @ y
        for q, v, S in heads:
            for _ in range(2):  # k^T v and q S; then q^T do and k dS
                _ = q.mT @ v, q @ S
            _ = v @ S.mT, v @ S.mT  # do S^T and v dS^T

    return work


def layer_row(length: int, allocator: str) -> Row:
    """Return times and peak memory at one length."""
    torch.manual_seed(0)
    chela = ChelaLayer(WIDTH, l_max=length, d_qk=QUERY, d_value=VALUE)
    layers: dict[str, nn.Module] = {"CHELA": chela}
    if length <= SOFTMAX_UP_TO:
        layers["softmax"] = SoftmaxAttention(WIDTH, rotary=False)
    x, d_out = torch.randn(2, 1, length, WIDTH).unbind()
    steps = {name: training_step(layer, x, d_out=d_out, weights=layer.parameters()) for name, layer in layers.items()}
    times = interleaved(steps | {WORK: products_and_transforms(chela, length)}, seconds=3.0, least=3)
    median = times.median()
    values = {f"CHELA / {WORK}": median["CHELA"] / median[WORK]}
    if "softmax" in times:
        values["softmax / CHELA"] = median["softmax"] / median["CHELA"]
    values |= {f"{name} [MiB]": peak_memory(step) / 2**20 for name, step in steps.items()}
    return Row.timed({"L": length, "allocator": allocator}, times, values, PARTS)
