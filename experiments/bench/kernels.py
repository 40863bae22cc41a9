"""Benchmarks of what networks are made of: the long convolution, linear attention, the whole CHELA layer."""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from chela.layers.mixers.chela import ChelaLayer
from chela.layers.mixers.softmax import SoftmaxAttention
from chela.ops import fft_conv
from chela.ops import linear_attention as attention
from experiments.bench import Options, Row, timing
from experiments.bench.timing import Step, interleaved, peak_memory, training_step

CONVOLUTIONS = ((4, 128, 1024), (2, 128, 4096), (1, 128, 16384))  # batch, channels, length
WORK = "its products and FFTs"
WIDTH, QUERY, VALUE = 128, 64, 256
LENGTHS = (1024, 2048, 4096, 8192, 16384)
SOFTMAX_UP_TO = 8192  # a step at a greater length takes many seconds
PARTS = (
    f"{WORK}: the product of each linear map and both of its gradients; for each head of the attention two products of "
    f"keys and values, two with queries, two with values; 8 real FFTs of 2 L for each of {WIDTH} channels"
)

causal_attention = partial(attention, causal=True)
bidirectional_attention = partial(attention, causal=False)


def convolution(options: Options) -> list[Row]:
    """The long convolution, forward + backward, against autograd through rfft and irfft.

    CPU, float32, causal, K = L, with glibc's default allocator unless the environment sets another.
    """
    rows = []
    for batch, channels, length in CONVOLUTIONS[: 1 if options.quick else None]:
        u, d_out = torch.randn(2, batch, length, channels).unbind()
        kernel = torch.randn(channels, length) / length**0.5
        ours, theirs = (training_step(f, u, kernel, d_out=d_out) for f in (fft_conv, plain))
        times = interleaved({"fft_conv": ours, "plain": theirs}, seconds=2.0, least=5)
        median = times.median()
        values = {"fft_conv / plain": median["fft_conv"] / median["plain"]}
        values["peak memory, fft_conv / plain"] = peak_memory(ours) / peak_memory(theirs)
        key = {"B": batch, "C": channels, "L": length, "allocator": timing.allocator(keep=False)}
        rows.append(Row.timed(key, times, values))
    return rows


def plain(u: Tensor, kernel: Tensor) -> Tensor:
    """Convolve u ``(B, L, C)`` with kernel ``(C, L)`` as one writes it down; faster than the plain backend."""
    length = u.shape[1]
    n = 2 * length
    product: Tensor = torch.fft.rfft(u.transpose(1, 2), n=n) * torch.fft.rfft(kernel, n=n)
    y: Tensor = torch.fft.irfft(product, n=n)[..., :length]
    return y.transpose(1, 2)


def bare_convolution(batch: int, channels: int, length: int) -> Step:
    """Return the transforms and products of forward and backward, and nothing else."""
    n = 2 * length
    rows, kernel = torch.randn(batch, channels, n), torch.randn(channels, n)
    spectrum, of_kernel = torch.fft.rfft(rows), torch.fft.rfft(kernel)

    def work() -> None:
        for _ in range(3):  # u in the forward, u and the output's gradient in the backward
            torch.fft.rfft(rows)
        for _ in range(2):  # the kernel, in both
            torch.fft.rfft(kernel)
        for _ in range(2):  # y and the gradient of u
            torch.fft.irfft(spectrum * of_kernel, n=n)
        torch.fft.irfft((spectrum * spectrum).sum(0), n=n)  # the gradient of the kernel

    return work


def linear_attention(options: Options) -> list[Row]:
    """Linear attention, forward + backward: against softmax, its own products, other kernels.

    CPU: float32, H 4, D = E = 64. CUDA: bfloat16, D 64 and 128, against FlashAttention, and fla where it is installed.
    """
    lengths = (1024,) if options.quick else (1024, 4096, 16384, 65536)
    if torch.cuda.is_available():
        return [attention_row_gpu(L, D) for D in (64, 128) for L in lengths]
    return [attention_row(L) for L in lengths]


def attention_row(L: int) -> Row:
    """Return the times at one length, B 1, H 4, D = E = 64, float32."""
    H, D = 4, 64
    q, k, v, d_out = torch.randn(4, 1, L, H, D).unbind()
    causal: dict[str, Step] = {"causal": training_step(causal_attention, q, k, v, d_out=d_out)}
    if L <= 16384:  # a step at a greater length takes minutes
        softmax = partial(F.scaled_dot_product_attention, is_causal=True)
        *heads_first, d_first = (x.transpose(1, 2).contiguous() for x in (q, k, v, d_out))
        causal["softmax"] = training_step(softmax, *heads_first, d_out=d_first)
    bidirectional: dict[str, Step] = {
        "bidirectional": training_step(bidirectional_attention, q, k, v, d_out=d_out),
        "its products": partial(bidirectional_products, q, k, v, d_out),
    }
    # Only what is compared takes turns: anything in between would leave its mark on cache and heap.
    times = pd.concat([interleaved(group, seconds=2.0) for group in (causal, bidirectional)], axis=1)
    median = times.median()
    values = {"softmax / causal": median["softmax"] / median["causal"]} if "softmax" in times else {}
    values["bidirectional / products"] = median["bidirectional"] / median["its products"]
    results = 8 * q.numel() * q.element_size()  # q, k, v, o and their gradients
    for name, step in (("causal", causal["causal"]), ("bidirectional", bidirectional["bidirectional"])):
        # The output and three gradients are held at the peak, and are not extra.
        values[f"{name} extra / results"] = (peak_memory(step) - results / 2) / results
    return Row.timed({"L": L, "H": H, "D": D, "dtype": "float32"}, times, values)


def bidirectional_products(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> None:
    """Run the matrix products of bidirectional attention without decay, forward and backward, and nothing else."""
    for b in range(q.shape[0]):
        q_, k_, v_, do = (x[b].transpose(0, 1) for x in (q, k, v, d_out))
        S = k_.mT @ v_
        dS = q_.mT @ do
        _ = q_ @ S, do @ S.mT, v_ @ dS.mT, k_ @ dS


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run causal FlashAttention, no other kernel of softmax attention."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_row_gpu(L: int, D: int) -> Row:
    """Return the times at one length and width: bfloat16, 32,768 tokens or one sequence, H = 2048 / D."""
    H = 2048 // D
    B = max(1, 32768 // L)
    q, k, v, d_out = torch.randn(4, B, L, H, D, device="cuda", dtype=torch.bfloat16).unbind()
    decay = -torch.logspace(-1, -8, H, base=2, device="cuda")
    *heads_first, d_first = (x.transpose(1, 2).contiguous() for x in (q, k, v, d_out))
    rivals: dict[str, Step] = {"FlashAttention": training_step(flash_attention, *heads_first, d_out=d_first)}
    note = ""
    try:
        from fla.ops.simple_gla import chunk_simple_gla

        per_token = decay.expand(q.shape[:3])
        fla = lambda q, k, v: chunk_simple_gla(q, k, v, g=per_token, scale=1.0)[0]  # noqa: E731
        rivals["fla"] = training_step(fla, q, k, v, d_out=d_out)
    except ImportError as error:
        note = f"fla: {error}"
    ours = {
        "causal": causal_attention,
        "per-head decay": partial(causal_attention, log_decay=decay),
        "bidirectional": bidirectional_attention,
    }
    steps = rivals | {name: training_step(f, q, k, v, d_out=d_out) for name, f in ours.items()}
    times = interleaved(steps, seconds=1.0, least=10)
    best = times[list(rivals)].median().min()
    values = {"best other [ms]": best, "best other / ours": best / times["per-head decay"].median()}
    return Row.timed({"L": L, "B": B, "H": H, "D": D, "dtype": "bfloat16"}, times, values, note)


def layers(options: Options) -> list[Row]:
    """The whole CHELA layer, forward + backward per sequence: against a softmax layer, and its own products and FFTs.

    Width 128, queries and keys 64, values 256, bidirectional, batch 1, float32, all else as by default. On a CPU the
    allocator keeps its memory, unless the environment says otherwise.
    """
    rows, allocator = [], timing.allocator(keep=True)
    for length in LENGTHS[: 1 if options.quick else None]:
        torch.manual_seed(0)
        chela = ChelaLayer(WIDTH, l_max=length, d_qk=QUERY, d_value=VALUE)
        modules: dict[str, nn.Module] = {"CHELA": chela}
        if length <= SOFTMAX_UP_TO:
            modules["softmax"] = SoftmaxAttention(WIDTH, rotary=False)
        x, d_out = torch.randn(2, 1, length, WIDTH).unbind()
        steps = {name: training_step(f, x, d_out=d_out, weights=f.parameters()) for name, f in modules.items()}
        times = interleaved(steps | {WORK: bare_layer(chela, length)}, seconds=3.0, least=3)
        median = times.median()
        values = {f"CHELA / {WORK}": median["CHELA"] / median[WORK]}
        if "softmax" in times:
            values["softmax / CHELA"] = median["softmax"] / median["CHELA"]
        values |= {f"{name} [MiB]": peak_memory(step) / 2**20 for name, step in steps.items()}
        rows.append(Row.timed({"L": length, "allocator": allocator}, times, values, PARTS))
    return rows


def bare_layer(layer: ChelaLayer, length: int) -> Step:
    """Return the layer's matrix products and FFTs, forward and backward, and nothing else."""
    weights = [torch.randn(m.in_features, m.out_features) for m in layer.modules() if isinstance(m, nn.Linear)]
    by_width = {width: torch.randn(length, width) for weight in weights for width in weight.shape}
    heads = [
        [torch.randn(core.heads, *shape) for shape in ((length, QUERY), (length, width), (QUERY, width))]
        for core in layer.cores
        for width in (core.width // core.heads,)
    ]
    convolution = bare_convolution(1, WIDTH, length)

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
