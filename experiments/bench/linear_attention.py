"""Linear attention, forward + backward: against softmax, its own products, other kernels.

CPU: float32, H 4, D = E = 64. CUDA: bfloat16, D 64 and 128, against FlashAttention, and fla where it is installed.
"""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chela.ops import linear_attention
from experiments.bench import Options, Row
from experiments.bench.timing import Step, interleaved, peak_memory, training_step

causal_attention = partial(linear_attention, causal=True)
bidirectional_attention = partial(linear_attention, causal=False)


def run(options: Options) -> list[Row]:
    """Measure on the CUDA device if there is one, else on the CPU."""
    if torch.cuda.is_available():
        return [gpu_row(L, D) for D in (64, 128) for L in ((1024,) if options.quick else (1024, 4096, 16384, 65536))]
    return [cpu_row(L) for L in ((256,) if options.quick else (1024, 4096, 16384, 65536))]


def cpu_row(L: int) -> Row:
    """Return the times at one length, B 1, H 4, D = E = 64, float32."""
    H, D = 4, 64
    q, k, v, d_out = torch.randn(4, 1, L, H, D).unbind()
    slow = torch.full((1, L, H), -0.01)
    causal: dict[str, Step] = {"causal": training_step(causal_attention, q, k, v, d_out=d_out)}
    if L <= 16384:  # a step at a greater length takes minutes
        softmax = partial(F.scaled_dot_product_attention, is_causal=True)
        *heads_first, d_first = (x.transpose(1, 2).contiguous() for x in (q, k, v, d_out))
        causal["softmax"] = training_step(softmax, *heads_first, d_out=d_first)
    bidirectional: dict[str, Step] = {
        "bidirectional": training_step(bidirectional_attention, q, k, v, d_out=d_out),
        "its products": partial(bidirectional_products, q, k, v, d_out),
    }
    decays: dict[str, Step] = {"per-token decay": training_step(decayed, q, k, v, slow, d_out=d_out)}
    # Only what is compared takes turns: anything in between would leave its mark on cache and heap.
    times = pd.concat([interleaved(group, seconds=2.0) for group in (causal, bidirectional, decays)], axis=1)
    median = times.median()
    values = {"softmax / causal": median["softmax"] / median["causal"]} if "softmax" in times else {}
    values["bidirectional / products"] = median["bidirectional"] / median["its products"]
    results = 8 * q.numel() * q.element_size()  # q, k, v, o and their gradients
    for name, step in (("causal", causal["causal"]), ("bidirectional", bidirectional["bidirectional"])):
        # The output and three gradients are held at the peak, and are not extra.
        values[f"{name} extra / results"] = (peak_memory(step) - results / 2) / results
    return Row.timed({"L": L, "H": H, "D": D, "dtype": "float32"}, times, values)


def decayed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Run causal attention with decay, whose gradient is taken too."""
    return linear_attention(q, k, v, log_decay=log_decay, causal=True)


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


def gpu_row(L: int, D: int) -> Row:
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
