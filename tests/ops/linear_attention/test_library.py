"""What torch expects of an operator: exact gradients, opcheck, whole graphs, autocast."""

from __future__ import annotations

import pytest
import torch

from chela.ops import LinearAttentionState, linear_attention
from experiments.bench.timing import peak_memory
from tests.ops.linear_attention.cases import Case, draw

DECAYS = ("none", "head", "token")


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("normalize", "mask"), [(True, True), (False, False)])
@pytest.mark.parametrize("in_chunks", (True, False))
def test_gradcheck(causal: bool, decay: str, normalize: bool, mask: bool, in_chunks: bool) -> None:
    case = Case(7, 3, 2, causal, decay, mask, normalize)
    x = {n: t.double() if t.is_floating_point() else t for n, t in draw(case).items()}
    x.pop("d_out")
    real = x.pop("mask", None)
    names = list(x)
    leaves = [t[:1].clone() if t.ndim > 1 else t for t in x.values()]
    if causal and in_chunks:
        names += ["S", "z"]
        leaves += [torch.rand(1, 2, 3, 2, dtype=torch.float64), torch.rand(1, 2, 3, dtype=torch.float64)]

    def f(*values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        options = {"causal": causal, "normalize": normalize, "mask": None if real is None else real[:1]}
        options["chunk_size"] = 3 if in_chunks else None
        if not causal:
            return linear_attention(**given, **options)
        state = LinearAttentionState(given.pop("S"), given.pop("z")) if in_chunks else None
        out, end = linear_attention(**given, **options, initial_state=state, return_state=True)
        return out, *end

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("chunk", (8, 0))
def test_opcheck(causal: bool, decay: str, chunk: int) -> None:
    x = draw(Case(20, 4, 3, causal, decay, True, True))
    q, k, v = (x[name].requires_grad_() for name in "qkv")
    state = torch.randn(2, 2, 4, 4, requires_grad=True) if causal and chunk else None
    decays = [x[n].requires_grad_() if n in x else None for n in ("log_decay", "log_decay_back")]
    args = (q, k, v, *decays, x["mask"], state, causal, True, True, 1e-6, chunk)
    torch.library.opcheck(torch.ops.chela.linear_attention_chunked, args)


@pytest.mark.parametrize(("causal", "decay"), [(True, "token"), (False, "head"), (False, "none")])
def test_compiles_to_one_graph(causal: bool, decay: str) -> None:
    x = draw(Case(100, 8, 4, causal, decay, True, True))
    d_out = x.pop("d_out")
    leaves = [t.requires_grad_() for t in x.values() if t.is_floating_point()]

    def f(**given: torch.Tensor) -> torch.Tensor:
        return linear_attention(**given, causal=causal, normalize=True)

    expected = torch.autograd.grad(f(**x), leaves, d_out)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(**x), leaves, d_out)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_one_graph_serves_many_lengths() -> None:
    f = torch.compile(
        lambda q, k, v: linear_attention(q, k, v, causal=True), fullgraph=True, backend="aot_eager", dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for L in (100, 101, 257, 1000):
            q, k, v = torch.randn(3, 2, L, 2, 8).unbind()
            torch.testing.assert_close(f(q, k, v), linear_attention(q, k, v, causal=True))


def test_autocast() -> None:
    q, k, v = torch.randn(3, 2, 50, 2, 8).unbind()
    plain = linear_attention(q, k, v, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        # What comes in float32 stays so; mixed inputs, as projections and feature maps give, become the autocast dtype.
        assert torch.equal(linear_attention(q, k, v, causal=True), plain)
        mixed = linear_attention(q, k, v.bfloat16(), causal=True)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True))


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("decay", DECAYS)
def test_memory_beyond_results_is_small(causal: bool, decay: str) -> None:
    x = draw(Case(4096, 64, 64, causal, decay, False, True))
    d_out = x.pop("d_out")
    leaves = [t.requires_grad_() for t in x.values()]
    results = 8 * d_out.nbytes  # q, k, v, o and their gradients

    def step() -> None:
        torch.autograd.grad(linear_attention(**x, causal=causal, normalize=True), leaves, d_out)

    # Of what is held at the peak, the output and three gradients are results themselves.
    assert peak_memory(step) - results / 2 <= 1.5 * results
    assert peak_memory(step) >= results / 2  # the measurement sees at least those
