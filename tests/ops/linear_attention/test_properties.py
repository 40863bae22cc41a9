"""What must hold whatever the numbers: pieces, steps, flips, masks, decays at their limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chela.ops import LinearAttentionState, linear_attention, linear_attention_step
from chela.ops.linear_attention import cpu
from tests.ops.linear_attention.cases import Case, draw, error_ratios, run

BACKENDS = ("reference", "plain", "chunked")
DECAYS = ("none", "head", "token")


def draw_double(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in draw(case, seed).items()}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into many segments and batch blocks what would fit one."""
    monkeypatch.setattr(cpu, "SEGMENT_ELEMENTS", 2048)
    monkeypatch.setattr(cpu, "ONE_CHUNK", 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", (False, True))
def test_pieces_equal_the_whole_gradients_included(backend: str, decay: str, normalize: bool) -> None:
    case = Case(150, 8, 16, True, decay, True, normalize)
    x = draw_double(case)
    d_out = x.pop("d_out")
    floats = {name: t.requires_grad_() for name, t in x.items() if t.is_floating_point()}
    options = {"causal": True, "normalize": normalize, "backend": backend, "return_state": True}
    whole, end = linear_attention(**x, **options)
    weight = torch.randn(end.S.shape, dtype=torch.float64)

    state, pieces = None, []
    for piece in (slice(0, 1), slice(1, 70), slice(70, 150)):
        part = {name: t if t.ndim == 1 else t[:, piece] for name, t in x.items()}
        out, state = linear_attention(**part, **options, initial_state=state)
        pieces.append(out)
    close(torch.cat(pieces, 1), whole)
    close(state.S, end.S)
    close(state.z, end.z)
    losses = [
        (o * d_out).sum() + (s.S * weight).sum() + (s.z * weight[..., 0]).sum()
        for o, s in ((whole, end), (torch.cat(pieces, 1), state))
    ]
    expected, got = (torch.autograd.grad(loss, list(floats.values())) for loss in losses)
    for a, b in zip(got, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", (False, True))
def test_steps_equal_the_whole(decay: str, normalize: bool) -> None:
    case = Case(40, 8, 16, True, decay, False, normalize)
    x = draw_double(case)
    x.pop("d_out")
    whole, end = linear_attention(**x, causal=True, normalize=normalize, return_state=True)
    state = LinearAttentionState.zeros(case.B, case.H, case.D, case.E, like=torch.empty(0, dtype=torch.float64))
    for t in range(case.L):
        part = {name: y if y.ndim == 1 else y[:, t] for name, y in x.items()}
        out, state = linear_attention_step(**part, state=state, normalize=normalize)
        close(out, whole[:, t])
    close(state.S, end.S)
    close(state.z, end.z)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("L", (20, 150))
def test_the_state_after_padding_is_that_after_the_last_real_token(decay: str, L: int) -> None:
    x = draw_double(Case(L, 8, 16, True, decay, False, True))
    x.pop("d_out")
    real = L // 3
    mask = (torch.arange(L) < real).expand(x["q"].shape[:2])
    _, end = linear_attention(**x, mask=mask, causal=True, return_state=True)
    part = {name: y if y.ndim == 1 else y[:, :real] for name, y in x.items()}
    _, expected = linear_attention(**part, causal=True, return_state=True, backend="reference")
    close(end.S, expected.S)
    close(end.z, expected.z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", DECAYS)
def test_flipping_the_sequence_and_exchanging_the_edges_flips_the_output(backend: str, decay: str) -> None:
    x = draw_double(Case(150, 8, 16, False, decay, False, True))
    x.pop("d_out")
    out = linear_attention(**x, causal=False, normalize=True, backend=backend)
    flipped = {name: x[name].flip(1) for name in "qkv"}
    if decay == "head":
        flipped |= {"log_decay": x["log_decay_back"], "log_decay_back": x["log_decay"]}
    if decay == "token":
        # The edge between t − 1 and t lies at t; from the other end it lies at L − t.
        flipped |= {"log_decay": x["log_decay_back"].flip(1).roll(1, 1)}
        flipped |= {"log_decay_back": x["log_decay"].flip(1).roll(1, 1)}
    close(linear_attention(**flipped, causal=False, normalize=True, backend=backend).flip(1), out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("L", (64, 150))
def test_masked_is_deleted(backend: str, causal: bool, decay: str, L: int) -> None:
    """One chunk, and a row without any token; or several chunks."""
    case = Case(L, 8, 16, causal, decay, True, True)
    x = draw_double(case)
    x["mask"][1:] = False
    for name in "qkv":
        x[name][~x["mask"]] = float("nan")  # nothing that is not there may be read
    got = run(case, x, backend)
    assert all(g.isfinite().all() for g in got.values())
    assert all((got[name][~x["mask"]] == 0).all() for name in ("out", "d_q", "d_k", "d_v"))

    kept = x["mask"][0]
    fewer = {n: t if t.ndim == 1 else t[:1, kept] for n, t in x.items() if n != "mask"}
    for name, expected in run(case, fewer, backend).items():
        close(got[name] if expected.ndim == 1 else got[name][:1, kept], expected)


@pytest.mark.parametrize("backend", (*BACKENDS, "triton"))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("decay", ("none", "head"))
def test_eps_may_be_zero(backend: str, causal: bool, decay: str) -> None:
    x = draw(Case(20, 8, 8, causal, decay, True, True))
    x["mask"][1] = False
    leaves = {n: t.requires_grad_() for n, t in x.items() if t.is_floating_point() and n != "d_out"}
    out = linear_attention(**leaves, mask=x["mask"], causal=causal, normalize=True, eps=0.0, backend=backend)
    assert (out[~x["mask"]] == 0).all()
    assert all(g.isfinite().all() for g in (out, *torch.autograd.grad(out, list(leaves.values()), x["d_out"])))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("value", (-float("inf"), -1e4, -88.0, 0.0))
def test_decay_at_its_limits(backend: str, causal: bool, value: float) -> None:
    case = Case(150, 8, 16, causal, "token", False, False)
    x = draw(case)
    x["log_decay"][:, 5::7] = value
    if backend == "chunked":
        ratios = error_ratios(case, x, backend)
        assert max(ratios.values()) <= 1e-5, ratios
    strong = {**x, "log_decay": torch.full_like(x["log_decay"], value)}
    if not causal:
        strong["log_decay_back"] = torch.full_like(x["log_decay"], value)
    got = run(case, strong, backend)
    assert all(g.isfinite().all() for g in got.values())
    if value == 0:
        plain = {name: t for name, t in x.items() if "decay" not in name}
        torch.testing.assert_close(got["out"], run(case, plain, backend)["out"], rtol=1e-4, atol=1e-4)
    if value < -100:  # every token hears itself alone
        own = (x["q"] * x["k"]).sum(-1, keepdim=True) * x["v"]
        torch.testing.assert_close(got["out"], own, rtol=1e-4, atol=1e-5)


def test_gradient_of_strong_decays_keeps_its_digits() -> None:
    """Each edge by itself, not their norm: a small gradient beside large ones is where cumulative sums fail."""
    case = Case(300, 16, 16, True, "token", False, False)
    x = draw(case)
    for name in ("q", "k", "v", "d_out"):
        x[name] = x[name].abs()
    x["log_decay"][:, ::3] = -20
    x["log_decay"][:, 0] = 0
    got = run(case, x, "chunked")["d_log_decay"].double()
    exact = run(case, {n: t.double() for n, t in x.items()}, "reference")["d_log_decay"]
    told = exact > 1e-9  # below, the float64 reference itself is rounding
    assert told.float().mean() > 0.9
    assert ((got - exact).abs() / exact)[told].max() < 1e-5


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("mask", (True, False))
def test_many_segments_equal_one(causal: bool, decay: str, mask: bool) -> None:
    case = Case(500, 8, 16, causal, decay, mask, True)
    ratios = error_ratios(case, draw(case), "chunked")
    assert max(ratios.values()) <= 1e-5, ratios


@settings(max_examples=60, deadline=None)
@given(
    case=st.builds(
        Case,
        L=st.integers(1, 200),
        D=st.integers(1, 40),
        E=st.integers(1, 40),
        causal=st.booleans(),
        decay=st.sampled_from(DECAYS),
        mask=st.booleans(),
        normalize=st.booleans(),
    ),
    seed=st.integers(0, 100),
)
def test_any_shape(case: Case, seed: int) -> None:
    ratios = error_ratios(case, draw(case, seed), "chunked")
    assert max(ratios.values()) <= 1e-5, ratios


@pytest.mark.parametrize("chunk_size", (1, 7, 64, 1000))
def test_chunk_size_does_not_change_the_answer(chunk_size: int) -> None:
    x = draw_double(Case(150, 8, 16, True, "token", False, True))
    x.pop("d_out")
    expected = linear_attention(**x, causal=True, normalize=True, backend="reference")
    close(linear_attention(**x, causal=True, normalize=True, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("shape", [(2, 0), (0, 5)], ids=str)
def test_nothing_in_gives_nothing_out_and_zero_gradients(
    backend: str, decay: str, causal: bool, shape: tuple[int, int]
) -> None:
    q, k, v = (torch.randn(*shape, 3, width, requires_grad=True) for width in (4, 4, 5))
    log_decay = {"none": None, "head": torch.zeros(3), "token": torch.zeros(*shape, 3)}[decay]
    leaves = [q, k, v] if log_decay is None else [q, k, v, log_decay.requires_grad_()]
    mask = torch.ones(shape, dtype=torch.bool)
    out = linear_attention(q, k, v, causal=causal, log_decay=log_decay, mask=mask, normalize=True, backend=backend)
    assert out.shape == v.shape
    gradients = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    assert all(gradient is None or gradient.abs().sum() == 0 for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", (False, True))
def test_the_state_after_no_tokens_is_the_first(backend: str, first: bool) -> None:
    q, k, v = (torch.randn(2, 0, 3, width) for width in (4, 4, 5))
    S, z = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    state = LinearAttentionState(S, z) if first else None
    _, end = linear_attention(q, k, v, causal=True, initial_state=state, return_state=True, backend=backend)
    assert torch.equal(end.S, S if first else torch.zeros_like(S))
    assert torch.equal(end.z, z if first else torch.zeros_like(z))
    if first:
        for gradient in torch.autograd.grad(end.S.sum() + end.z.sum(), [S, z]):
            assert (gradient == 1).all()
