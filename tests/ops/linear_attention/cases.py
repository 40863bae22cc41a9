"""What every backend is tried on, and how its error is measured."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chela.ops import linear_attention
from chela.ops.linear_attention.reference import weights

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 500, 1000)
WIDTHS = (8, 16, 24, 64, 96, 128, 256)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    L: int
    D: int
    E: int
    causal: bool
    decay: str
    mask: bool
    normalize: bool
    dtype: torch.dtype = torch.float32

    @property
    def B(self) -> int:
        return 2 if self.L <= 64 else 1

    @property
    def H(self) -> int:
        return 2 if self.L <= 500 else 1

    def __str__(self) -> str:
        direction = "causal" if self.causal else "both"
        extras = ("-mask" if self.mask else "") + ("-normalize" if self.normalize else "")
        return f"L{self.L}-D{self.D}-E{self.E}-{direction}-{self.decay}{extras}-{str(self.dtype)[6:]}"


def pairwise(*axes: tuple, seed: int) -> Iterator[tuple]:
    """Yield rows, one value per axis, until every pair of values of every two axes has been in one (greedy, seeded)."""
    rng = random.Random(seed)
    pairs = itertools.combinations(range(len(axes)), 2)
    missing = {(a, x, b, y) for a, b in pairs for x in range(len(axes[a])) for y in range(len(axes[b]))}
    while missing:
        a, x, b, y = min(missing)
        best, covered = None, -1
        for _ in range(60):
            row = [rng.randrange(len(axis)) for axis in axes]
            row[a], row[b] = x, y
            hits = sum((i, row[i], j, row[j]) in missing for i, j in itertools.combinations(range(len(axes)), 2))
            if hits > covered:
                best, covered = row, hits
        missing -= {(i, best[i], j, best[j]) for i, j in itertools.combinations(range(len(axes)), 2)}
        yield tuple(axis[i] for axis, i in zip(axes, best, strict=True))


def cases(
    dtypes: tuple[torch.dtype, ...],
    lengths: tuple[int, ...] = LENGTHS,
    widths: tuple[int, ...] = WIDTHS,
    seed: int = 0,
) -> list[Case]:
    flags = (False, True)
    rows = pairwise(lengths, widths, widths, flags, ("none", "head", "token"), flags, flags, dtypes, seed=seed)
    return [Case(*row) for row in rows]


def draw(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Return q, k, v, the decays and the mask of a case, and d_out, the gradient of its output."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    B, L, H, D, E = case.B, case.L, case.H, case.D, case.E
    q, k = torch.randn(2, B, L, H, D, generator=g) / D**0.25
    if case.normalize:  # a sum of weights is divided by: they must be positive, as feature maps make them
        q, k = q.abs() + 0.1, k.abs() + 0.1
    drawn = {"q": q, "k": k, "v": torch.randn(B, L, H, E, generator=g)}
    drawn = {name: x.to(case.dtype) for name, x in drawn.items()}
    if case.decay != "none":
        shape = (H,) if case.decay == "head" else (B, L, H)
        drawn["log_decay"] = -torch.rand(shape, generator=g).square()
        if not case.causal:
            drawn["log_decay_back"] = -torch.rand(shape, generator=g).square()
    if case.mask:
        drawn["mask"] = torch.rand(B, L, generator=g) > 0.3
    drawn["d_out"] = torch.randn(B, L, H, E, generator=g).to(case.dtype)
    return drawn


def run(case: Case, drawn: dict[str, Tensor], backend: str, chunk_size: int | None = None) -> dict[str, Tensor]:
    """Return the output and the gradient of each input, by name."""
    d_out, mask = drawn["d_out"], drawn.get("mask")
    leaves = {name: x.detach().requires_grad_() for name, x in drawn.items() if name not in ("d_out", "mask")}
    options = {"causal": case.causal, "normalize": case.normalize, "mask": mask, "backend": backend}
    options["chunk_size"] = chunk_size
    out = linear_attention(**leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), d_out)
    return {"out": out.detach(), **{f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def sizes(case: Case, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the output and each gradient would be if no term of their sums cancelled another (float64)."""
    x = {name: t.double().abs() for name, t in drawn.items() if name in ("q", "k", "v", "d_out")}
    leaves = {name: x[name].requires_grad_() for name in ("q", "k", "v")}
    decays = {n: drawn[n].double().requires_grad_() for n in ("log_decay", "log_decay_back") if n in drawn}
    mask = drawn.get("mask")
    if mask is not None:
        x = {name: t * mask[..., None, None] for name, t in x.items()}
    M = weights(
        x["q"],
        causal=case.causal,
        log_decay=decays.get("log_decay"),
        log_decay_back=decays.get("log_decay_back"),
        mask=mask,
    )
    P = torch.einsum("blhd,bmhd->bhlm", x["q"], x["k"]) * M
    total = (1e-6 + P.sum(-1)).transpose(1, 2)[..., None].detach() if case.normalize else 1
    out = torch.einsum("bhlm,bmhe->blhe", P, x["v"]) / total
    d_sum = x["d_out"].detach() / total
    flow = torch.einsum("blhe,bmhe->bhlm", d_sum, x["v"])
    if case.normalize:
        flow = flow + (d_sum * out.detach()).sum(-1).transpose(1, 2)[..., None]
    grads = torch.autograd.grad((P * flow).sum(), [*leaves.values(), *decays.values()])
    return {"out": out.detach(), **{f"d_{n}": g for n, g in zip((*leaves, *decays), grads, strict=True)}}


def error_ratios(
    case: Case, drawn: dict[str, Tensor], *backends: str, chunk_size: int | None = None
) -> dict[tuple[str, str], float]:
    """Return, for the output and each gradient of each backend, the norm of the error over that of ``sizes``.

    The float64 definition, which takes longest, is computed once for all backends.
    """
    exact = run(case, {n: x.double() if x.is_floating_point() else x for n, x in drawn.items()}, "reference")
    scale, ratios = sizes(case, drawn), {}
    for backend in backends:
        for name, value in run(case, drawn, backend, chunk_size).items():
            assert value.dtype == (drawn["v"].dtype if name in ("out", "d_q", "d_k", "d_v") else torch.float32), name
            error = (value.double() - exact[name]).norm()
            ratios[backend, name] = (error / scale[name].norm()).item() if error != 0 else 0.0
    return ratios
